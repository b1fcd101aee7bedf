"""Formats besides NIfTI: what goes in comes out, and damaged files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from numpy.typing import NDArray
from PIL import Image

from medmamba import io
from medmamba.errors import InputError

ITK_SUFFIXES = (".nrrd", ".mha", ".gipl")
DIRECTION = (0.0, 0.8, 0.6, 1.0, 0.0, 0.0, 0.0, 0.6, -0.8)


def itk_file(path: Path, voxels: NDArray[np.int16], *, compress: bool = True) -> sitk.Image:
    """The phantom with an oblique, permuted, anisotropic grid (axis-aligned for GIPL)."""
    image = sitk.GetImageFromArray(voxels.T.copy())
    image.SetSpacing((0.7, 1.3, 3.1))
    image.SetOrigin((-12.5, 4.25, 100.0))
    if path.suffix != ".gipl":
        image.SetDirection(DIRECTION)
    sitk.WriteImage(image, str(path), compress)
    return image


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_itk_round_trip(suffix: str, voxels: NDArray[np.int16], tmp_path: Path) -> None:
    path, out = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    itk_file(path, voxels, compress=suffix != ".gipl")
    stored = sitk.ReadImage(str(path))
    volume, header = io.read_image(path)
    assert np.array_equal(volume.array[0], voxels.T.astype(np.float32))
    assert volume.geometry.spacing_mm == stored.GetSpacing()[::-1]
    # World positions: ITK's are left-posterior-superior, ours right-anterior-superior.
    point = stored.TransformIndexToPhysicalPoint((5, 6, 7))
    ours = volume.geometry.matrix @ np.array([7, 6, 5, 1.0])
    assert np.allclose(ours[:3], np.array(point) * (-1, -1, 1), atol=1e-9)
    assert io.read_geometry(path) == volume.geometry
    labels = (volume.array[0] > 200).astype(np.uint8) * 2
    io.write_labels(out, labels, header)
    first = out.read_bytes()
    io.write_labels(out, labels, header)
    assert out.read_bytes() == first
    written = sitk.ReadImage(str(out))
    assert np.array_equal(sitk.GetArrayFromImage(written), labels)
    assert written.GetDirection() == pytest.approx(stored.GetDirection())
    assert written.GetOrigin() == stored.GetOrigin()
    assert written.GetSpacing() == stored.GetSpacing()
    back, _ = io.read_labels(out)
    assert back.geometry == volume.geometry


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
@pytest.mark.parametrize("how", ["half", "tail", "empty", "text"])
def test_damaged_itk_files(
    how: str, suffix: str, compress: bool, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    path = tmp_path / f"in{suffix}"
    itk_file(path, voxels, compress=compress and suffix != ".gipl")
    raw = path.read_bytes()
    spoiled = {"half": raw[: len(raw) // 2], "tail": raw[:-30], "empty": b"",
               "text": b"<html>" + b" " * 1000}[how]  # fmt: skip
    expected = {"half": "E_IO_TRUNCATED", "tail": "E_IO_TRUNCATED", "empty": "E_IO_EMPTY",
                "text": "E_IO_FORMAT"}[how]  # fmt: skip
    path.write_bytes(spoiled)
    findings = io.check_file(path)
    assert [finding.code for finding in findings] == [expected]
    assert str(tmp_path) not in findings[0].message
    assert "\n" not in findings[0].message


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_flipped_bits_in_compressed_itk_files(
    suffix: str, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    path = tmp_path / f"in{suffix}"
    itk_file(path, voxels)
    raw = path.read_bytes()
    for at in range(len(raw) - 4, len(raw) - 4000, -500):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        assert [finding.code[:5] for finding in io.check_file(path)] == ["E_IO_"]


@pytest.mark.parametrize(
    ("suffix", "old", "new"),
    [(".mha", b"ElementDataFile = LOCAL", b"ElementDataFile = ../x.raw"),
     (".nrrd", b"encoding: gzip", b"encoding: gzip\ndata file: ../x.raw")],
)  # fmt: skip
def test_voxels_elsewhere_are_refused(
    suffix: str, old: bytes, new: bytes, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    path = tmp_path / f"in{suffix}"
    itk_file(path, voxels)
    path.write_bytes(path.read_bytes().replace(old, new))
    findings = io.check_file(path)
    assert [finding.code for finding in findings] == ["E_IO_FORMAT"]
    assert "another file" in findings[0].message


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [(b"TransformMatrix = 0 1 0", b"TransformMatrix = 0 0 0", "E_GEOM_SINGULAR"),
     (b"TransformMatrix = 0 1 0", b"TransformMatrix = nan 1 0", "E_GEOM_SINGULAR"),
     (b"TransformMatrix = 0 1 0", b"TransformMatrix = 2 1 0", "E_GEOM_SHEAR"),
     (b"ElementSpacing = 0.5", b"ElementSpacing = 900", "E_GEOM_SPACING")],
)  # fmt: skip
def test_impossible_itk_geometry(
    old: bytes, new: bytes, code: str, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    path = tmp_path / "in.mha"
    image = sitk.GetImageFromArray(voxels.T.copy())
    image.SetSpacing((0.5, 1.3, 3.1))
    image.SetOrigin((-12.5, 4.25, 100.0))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))
    assert code in [finding.code for finding in io.check_file(path)]


def test_itk_limits_planes_and_vectors(voxels: NDArray[np.int16], tmp_path: Path) -> None:
    path = tmp_path / "in.nrrd"
    itk_file(path, voxels)
    (finding,) = io.check_file(path, gate=io.Gate(max_voxels=100))
    assert finding.code == "E_LIMIT_VOXELS"
    plane = sitk.GetImageFromArray(voxels[:, :, 0].T.copy())
    plane.SetSpacing((0.5, 0.25))
    sitk.WriteImage(plane, str(tmp_path / "plane.mha"))
    volume, header = io.read_image(tmp_path / "plane.mha")
    assert (volume.array.shape, header.dimension) == ((1, 1, 24, 20), 2)
    assert volume.geometry.spacing_mm == (999 * 0.5, 0.25, 0.5)
    io.write_labels(tmp_path / "out.mha", (volume.array[0] > 0).astype(np.uint8), header)
    assert sitk.ReadImage(str(tmp_path / "out.mha")).GetSpacing() == (0.5, 0.25)
    colours = np.stack([voxels.T, voxels.T + 1, voxels.T + 2], -1)
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(tmp_path / "c.nrrd"))
    volume, header = io.read_image(tmp_path / "c.nrrd")
    assert header.channels == 3
    assert np.array_equal(volume.array[2], voxels.T.astype(np.float32) + 2)
    with pytest.raises(InputError) as caught:
        io.read_labels(tmp_path / "c.nrrd")
    assert caught.value.code == "E_SHAPE_4D"


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_planes_of_grey_and_colour(suffix: str, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    grey = random.integers(0, 256, (13, 17), dtype=np.uint8)
    colour = random.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / f"grey{suffix}")
    Image.fromarray(colour).save(tmp_path / f"colour{suffix}")
    volume, header = io.read_image(tmp_path / f"grey{suffix}")
    assert np.array_equal(volume.array, grey[np.newaxis, np.newaxis].astype(np.float32))
    assert (volume.geometry.spacing_mm, header.dimension) == ((999, 1, 1), 2)
    volume, header = io.read_image(tmp_path / f"colour{suffix}")
    assert np.array_equal(volume.array[:, 0], np.moveaxis(colour, -1, 0).astype(np.float32))
    labels = (grey > 100).astype(np.uint8)[np.newaxis] * 7
    io.write_labels(tmp_path / f"out{suffix}", labels, header)
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert (written.mode, written.size) == ("L", (17, 13))
    back, _ = io.read_labels(tmp_path / f"out{suffix}")
    assert np.array_equal(back.array[0], labels)


def test_palette_labels_are_indices_and_wide_labels_fit(tmp_path: Path) -> None:
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    picture = Image.fromarray(indices).convert("P")
    picture.putdata(indices.ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    picture.save(tmp_path / "p.png")
    assert np.array_equal(io.read_labels(tmp_path / "p.png")[0].array[0, 0], indices)
    assert io.read_image(tmp_path / "p.png")[0].array.shape == (3, 1, 2, 3)
    _, header = io.read_labels(tmp_path / "p.png")
    wide = np.array([[[0, 300, 2], [65535, 1, 0]]])
    for suffix in (".png", ".tif"):
        io.write_labels(tmp_path / f"wide{suffix}", wide, header)
        assert np.array_equal(io.read_labels(tmp_path / f"wide{suffix}")[0].array[0], wide)
    with pytest.raises(InputError, match="BMP"):
        io.write_labels(tmp_path / "wide.bmp", wide, header)


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_tiff_stacks(suffix: str, voxels: NDArray[np.int16], tmp_path: Path) -> None:
    import tifffile

    path = tmp_path / f"case_0000{suffix}"
    tifffile.imwrite(path, voxels.T, photometric="minisblack")
    volume, header = io.read_image(path)
    assert header.warning_codes == ("W_GEOM_UNCODED",)
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [2.0, 0.5, 0.25]}))
    volume, header = io.read_image(path)
    assert np.array_equal(volume.array[0], voxels.T.astype(np.float32))
    assert volume.geometry.spacing_mm == (2.0, 0.5, 0.25)
    assert (header.warnings, header.dimension) == ((), 3)
    labels = (volume.array[0] > 200).astype(np.uint8)
    out = tmp_path / f"case{suffix}"
    io.write_labels(out, labels, header)
    back, _ = io.read_labels(out)
    assert np.array_equal(back.array[0], labels)
    assert back.geometry == volume.geometry
    first = out.read_bytes()
    io.write_labels(out, labels, header)
    assert out.read_bytes() == first
    raw = path.read_bytes()
    for cut in (len(raw) // 2, len(raw) - 100, 20):
        path.write_bytes(raw[:cut])
        assert [finding.code[:5] for finding in io.check_file(path)] == ["E_IO_"]
    (tmp_path / "case.json").write_text('{"spacing": [1, 0, 1]}')
    path.write_bytes(raw)
    assert [finding.code for finding in io.check_file(path)] == ["E_GEOM_SPACING"]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("how", ["half", "tail", "empty", "text"])
def test_damaged_pictures(how: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"in{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(path)
    raw = path.read_bytes()
    path.write_bytes({"half": raw[: len(raw) // 2], "tail": raw[:-60], "empty": b"",
                      "text": b"<html>not found</html>"}[how])  # fmt: skip
    findings = io.check_file(path)
    assert len(findings) == 1
    assert findings[0].code == {"empty": "E_IO_EMPTY", "text": "E_IO_FORMAT"}.get(
        how, findings[0].code
    )
    assert findings[0].code.startswith("E_IO_")
    assert "\n" not in findings[0].message


def test_flipped_bits_in_png(tmp_path: Path) -> None:
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(path)
    raw = path.read_bytes()
    for at in range(60, len(raw) - 12, 400):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        assert [finding.code[:5] for finding in io.check_file(path)] == ["E_IO_"]
