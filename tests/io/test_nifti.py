"""Reading NIfTI against two independent programs, and writing labels onto the same grid."""

import gzip
import itertools
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medmamba import io
from medmamba.errors import EnvironmentFault, GeometryError, InputError
from medmamba.files import from_plain, to_plain
from medmamba.volume import Geometry, VolumeKind

SENTINEL = b"ZZPHI^NAME"


def orientations() -> list[NDArray[np.float64]]:
    """All 48 ways to store axes along the world's."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            matrix = np.zeros((3, 3))
            for axis, (row, sign) in enumerate(zip(order, signs, strict=True)):
                matrix[row, axis] = sign
            found.append(matrix)
    return found


def rotation(degrees: float) -> NDArray[np.float64]:
    angle = np.deg2rad(degrees)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    tilt = np.array([[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])
    return np.asarray(turn @ tilt)


def save_nifti(
    path: Path, voxels: NDArray[np.generic], affine: NDArray[np.float64], *, version: int = 1
) -> None:
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(voxels, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def affine_of(directions: NDArray[np.float64], spacing: tuple[float, ...]) -> NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, :3] = directions * np.array(spacing)
    matrix[:3, 3] = (-31.5, 12.25, 7.125)
    return matrix


GRIDS = [*orientations(), rotation(30), rotation(77), rotation(30) @ orientations()[5]]


@pytest.mark.parametrize("index", range(len(GRIDS)))
def test_agrees_with_simpleitk(index: int, voxels: NDArray[np.int16], tmp_path: Path) -> None:
    path = tmp_path / "case.nii.gz"
    save_nifti(path, voxels, affine_of(GRIDS[index], (0.7, 1.3, 3.1)))
    volume, header = io.read_image(path)
    image = sitk.ReadImage(str(path))
    assert np.array_equal(volume.array[0], sitk.GetArrayFromImage(image).astype(np.float32))
    # To the last bit, oblique grids included: plans are compared exactly.
    assert volume.geometry.spacing_mm == image.GetSpacing()[::-1]
    oracle = np.eye(4)
    oracle[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    oracle[:3, 3] = image.GetOrigin()
    oracle[:2] *= -1
    assert np.allclose(volume.geometry.matrix, oracle[:, [2, 1, 0, 3]], atol=2e-5)
    assert header.warnings == ()
    assert io.read_geometry(path) == volume.geometry


@pytest.mark.parametrize("slope", [(2.5, -7.125), (0.1, 0.0), (1.0, -1024.0), (1e-4, 3.3)])
@pytest.mark.parametrize("kind", ["i2", "u1", "i4", "f4"])
def test_scaling_agrees_with_simpleitk(
    slope: tuple[float, float], kind: str, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    values = np.abs(voxels).astype(kind) if kind == "u1" else (voxels.astype(kind) * 3)
    if kind == "i4":
        values = values * 12345  # beyond what single precision holds exactly
    image = nibabel.Nifti1Image(values, np.eye(4))
    raw = bytearray(image.to_bytes())
    raw[112:120] = struct.pack("<2f", *slope)
    path = tmp_path / "case.nii"
    path.write_bytes(raw)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
    volume, _ = io.read_image(path)
    assert np.array_equal(volume.array[0], expected)


def test_real_images_agree_with_simpleitk(data_dir: Path) -> None:
    paths = sorted(data_dir.rglob("*_000*.nii.gz"))[::7] + sorted(data_dir.rglob("image.nii.gz"))
    assert paths
    for path in paths:
        volume, _ = io.read_image(path)
        image = sitk.ReadImage(str(path))
        assert np.array_equal(volume.array[0], sitk.GetArrayFromImage(image).astype(np.float32))
        assert volume.geometry.spacing_mm == image.GetSpacing()[::-1]


def test_big_endian_and_nifti2(
    voxels: NDArray[np.int16], affine: NDArray[np.float64], tmp_path: Path
) -> None:
    little, big, second = (tmp_path / f"{name}.nii.gz" for name in ("little", "big", "second"))
    save_nifti(little, voxels, affine)
    header = nibabel.load(little).header.as_byteswapped(">")
    nibabel.save(nibabel.Nifti1Image(voxels.astype(">i2"), None, header=header), big)
    save_nifti(second, voxels, affine, version=2)
    expected, source = io.read_image(little)
    for path in (big, second):
        volume, other = io.read_image(path)
        assert np.array_equal(volume.array, expected.array)
        assert volume.geometry == expected.geometry
        out = tmp_path / "out.nii.gz"
        io.write_labels(out, (volume.array[0] > 200).astype(np.uint8), other)
        assert np.array_equal(nibabel.load(out).affine, nibabel.load(path).affine)
    assert nibabel.load(out).header.sizeof_hdr == 540
    assert source.suffix == ".nii.gz"


def test_planes_and_four_dimensions(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "four.nii.gz")
    volume, header = io.read_image(tmp_path / "four.nii.gz")
    assert (volume.array.shape, header.channels, header.dimension) == ((5, 4, 3, 2), 5, 3)
    assert np.array_equal(volume.array[2], values[..., 2].T)
    plane = nibabel.Nifti1Image(values[:, :, 0, 0], np.diag([0.5, 0.25, 1, 1]))
    nibabel.save(plane, tmp_path / "plane.nii.gz")
    volume, header = io.read_image(tmp_path / "plane.nii.gz")
    assert (volume.array.shape, header.dimension) == ((1, 1, 3, 2), 2)
    assert volume.geometry.spacing_mm == (999 * 0.5, 0.25, 0.5)
    out = tmp_path / "out.nii.gz"
    io.write_labels(out, np.ones((1, 3, 2), dtype=np.uint8), header)
    assert nibabel.load(out).shape == (2, 3)
    slice_of_one = nibabel.Nifti1Image(values[:, :, :1, 0], np.eye(4))
    nibabel.save(slice_of_one, tmp_path / "slice.nii.gz")
    volume, header = io.read_image(tmp_path / "slice.nii.gz")
    assert (volume.array.shape, header.dimension) == ((1, 1, 3, 2), 3)
    assert volume.geometry.spacing_mm == (1, 1, 1)


def test_labels_keep_integers_and_round_what_is_nearly_whole(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    values = np.zeros((4, 5, 6), np.float32)
    values[0] = 0.9999
    values[1] = 2.0
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    volume, header = io.read_labels(path)
    assert (volume.kind, volume.array.dtype) == (VolumeKind.LABELS, np.int16)
    assert set(np.unique(volume.array)) == {0, 1, 2}
    assert header.warning_codes == ("N_GEOM_UNITS", "W_VAL_ROUNDED")
    values[2] = 1.4
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    with pytest.raises(InputError, match="30 label values are not whole") as caught:
        io.read_labels(path)
    assert caught.value.code == "E_VAL_FRACTIONS"
    nibabel.save(nibabel.Nifti1Image(np.full((2, 2, 2), 70000, np.int32), np.eye(4)), path)
    assert io.read_labels(path)[0].array.dtype == np.int32


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("grid", [0, 13, 48, 49])
def test_mask_lies_on_the_bits_of_the_input_grid(
    grid: int, version: int, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    source_path, out = tmp_path / "in.nii.gz", tmp_path / "out.nii.gz"
    save_nifti(source_path, voxels, affine_of(GRIDS[grid], (0.7, 1.3, 3.1)), version=version)
    volume, header = io.read_image(source_path)
    labels = (volume.array[0] > 200).astype(np.int64) * 3
    io.write_labels(out, labels, header)
    written, original = nibabel.load(out), nibabel.load(source_path)
    for name in ("pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
                 "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
                 "xyzt_units", "sizeof_hdr"):  # fmt: skip
        left, right = written.header[name], original.header[name]
        assert np.array_equal(left[:4] if name == "pixdim" else left,
                              right[:4] if name == "pixdim" else right), name  # fmt: skip
    raw = gzip.decompress(out.read_bytes())
    scaling = (
        struct.unpack_from("<2f", raw, 112) if version == 1 else struct.unpack_from("<2d", raw, 176)
    )
    assert scaling == (1.0, 0.0)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(written.dataobj), labels.T)
    independent = sitk.ReadImage(str(out)) if version == 1 else None
    if independent is not None:
        assert np.array_equal(sitk.GetArrayFromImage(independent), labels)
    assert io.read_labels(out)[0].geometry == volume.geometry


def test_writing_is_reproducible_atomic_and_anonymous(
    plain: bytes, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    # Text in every free field of the header, and in an extension before the voxels.
    raw = bytearray(plain)
    for offset, size in ((4, 10), (14, 18), (148, 80), (228, 24), (328, 16)):
        raw[offset : offset + size] = SENTINEL.ljust(size, b"\0")
    extension = struct.pack("<2i", 32, 6) + SENTINEL.ljust(24, b"\0")
    raw[108:112] = struct.pack("<f", 352 + len(extension))
    raw[348:352] = b"\1\0\0\0"
    source = tmp_path / "in.nii.gz"
    source.write_bytes(gzip.compress(bytes(raw[:352]) + extension + bytes(raw[352:])))
    volume, header = io.read_image(source)
    assert np.array_equal(volume.array[0], voxels.T)
    assert SENTINEL.decode() not in str(to_plain(header))
    assert SENTINEL not in bytes.fromhex(header.nifti_header)
    labels = (volume.array[0] > 200).astype(np.uint8)
    first, second = tmp_path / "a" / "one.nii.gz", tmp_path / "b" / "two.nii.gz"
    io.write_labels(first, labels, header, label_names={"0": "background", "1": "organ"})
    restored = from_plain(io.SourceHeader, to_plain(header), what="header", error=InputError)
    assert restored == header
    io.write_labels(second, labels, restored, label_names={"1": "organ", "0": "background"})
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == bytes(4)  # no time in the gzip header
    assert SENTINEL not in gzip.decompress(first.read_bytes())
    assert [path.name for path in first.parent.iterdir()] == ["one.nii.gz"]
    (extension,) = nibabel.load(first).header.extensions
    assert extension.get_code() == 6
    assert b'"organ"' in gzip.decompress(first.read_bytes())
    plain_out = tmp_path / "plain.nii"
    io.write_labels(plain_out, labels, header)
    assert np.array_equal(np.asarray(nibabel.load(plain_out).dataobj), labels.T)


@pytest.mark.parametrize(("highest", "kind"), [(1, "u1"), (255, "u1"), (256, "u2"), (65535, "u2")])
def test_type_follows_values(
    highest: int, kind: str, plain: bytes, save: Callable[..., Path], tmp_path: Path
) -> None:
    volume, header = io.read_image(save(plain))
    labels = np.zeros(volume.geometry.shape, np.int32)
    labels[3, 4, 5] = highest
    io.write_labels(tmp_path / "out.nii.gz", labels, header)
    assert nibabel.load(tmp_path / "out.nii.gz").get_data_dtype() == np.dtype(kind)
    assert io.read_labels(tmp_path / "out.nii.gz")[0].array[0, 3, 4, 5] == highest


def test_refuses_labels_that_do_not_fit(
    plain: bytes, save: Callable[..., Path], tmp_path: Path
) -> None:
    _, header = io.read_image(save(plain))
    shape = header.geometry.shape
    out = tmp_path / "out.nii.gz"
    for labels in (np.zeros(shape[::-1], np.uint8), np.zeros(shape), np.full(shape, -1),
                   np.full(shape, 70000)):  # fmt: skip
        with pytest.raises(GeometryError):
            io.write_labels(out, labels, header)
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(EnvironmentFault):
        io.write_labels(blocked / "out.nii.gz", np.zeros(shape, np.uint8), header)
    assert not out.exists()


def test_needs_neither_simpleitk_nor_torch(
    plain: bytes, save: Callable[..., Path], tmp_path: Path
) -> None:
    # nibabel loads pydicom where it is installed, and pydicom loads Pillow: none of our doing.
    code = (
        "import sys; sys.modules['pydicom'] = None\n"
        "import numpy as np; from medmamba import io\n"
        "volume, header = io.read_image(sys.argv[1])\n"
        "io.write_labels(sys.argv[2], (volume.array[0] > 0).astype(np.uint8), header)\n"
        "io.read_labels(sys.argv[2]); io.check_file(sys.argv[1])\n"
        "heavy = {'SimpleITK', 'torch', 'monai', 'PIL', 'tifffile', 'skimage'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(save(plain)), str(tmp_path / "out.nii.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("kind", ["u1", "i2", "f4", "f8"])
def test_images_can_be_written(
    kind: str, suffix: str, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    values = (np.abs(voxels).T % 200).astype(kind)
    matrix = affine_of(rotation(30), (0.7, 1.3, 3.1))[:, [2, 1, 0, 3]]
    geometry = Geometry.from_matrix(values.shape, matrix)
    io.write_image(tmp_path / f"out{suffix}", values, geometry)
    volume, _ = io.read_image(tmp_path / f"out{suffix}")
    assert np.array_equal(volume.array[0], values)
    assert volume.geometry.same_grid_as(geometry)
    with pytest.raises(GeometryError):
        io.write_image(tmp_path / "x.nii", values[1:], geometry)


def test_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"scan\.xyz: unknown file ending"):
        io.read_image(tmp_path / "scan.xyz")
    assert io.suffix_of("A.NII.GZ") == ".nii.gz"


def test_other_format_can_be_written(
    plain: bytes, save: Callable[..., Path], tmp_path: Path
) -> None:
    volume, header = io.read_image(save(plain))
    labels = (volume.array[0] > 200).astype(np.uint8)
    io.write_labels(tmp_path / "out.nrrd", labels, header)
    back, other = io.read_labels(tmp_path / "out.nrrd")
    assert np.array_equal(back.array[0], labels)
    assert back.geometry.same_grid_as(volume.geometry, tolerance_voxels=1e-5)
    io.write_labels(tmp_path / "out.nii.gz", labels, other)
    again, _ = io.read_labels(tmp_path / "out.nii.gz")
    assert again.geometry.same_grid_as(volume.geometry, tolerance_voxels=1e-5)
    assert replace(other, itk=None).format == "itk"


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_spoiled_headers_are_refused_or_read_never_crash(
    data: st.DataObject, plain: bytes, tmp_path: Path
) -> None:
    raw = bytearray(plain)
    for _ in range(data.draw(st.integers(1, 4))):
        offset, layout, values = data.draw(
            st.sampled_from(
                [
                    (0, "i", st.integers(-(2**31), 2**31 - 1)),
                    (344, "i", st.integers(-(2**31), 2**31 - 1)),
                ]
                + [(40 + 2 * i, "h", st.integers(-(2**15), 2**15 - 1)) for i in range(8)]
                + [
                    (at, "h", st.integers(-(2**15), 2**15 - 1) | st.integers(0, 5))
                    for at in (70, 72, 252, 254)
                ]
                + [
                    (at, "f", st.floats(width=32))
                    for at in (*range(76, 120, 4), *range(256, 328, 4))
                ]
                + [(123, "b", st.integers(-128, 127))]
            )
        )
        struct.pack_into("<" + layout, raw, offset, data.draw(values))
    path = tmp_path / "fuzz.nii"
    path.write_bytes(raw)
    for finding in io.check_file(path, gate=io.Gate(max_voxels=10**6)):
        assert finding.code[:2] in ("E_", "W_", "N_")
        assert "\n" not in finding.message


@settings(
    max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_spoiled_streams_never_pass_in_silence(
    data: st.DataObject, plain: bytes, voxels: NDArray[np.int16], tmp_path: Path
) -> None:
    raw = bytearray(gzip.compress(plain, 1, mtime=0))
    how = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if how == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        raw = raw[:at]
    else:
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    path = tmp_path / "fuzz.nii.gz"
    path.write_bytes(raw)
    try:
        volume, _ = io.read_image(path, gate=io.Gate(max_voxels=10**6))
    except InputError:
        return
    # Only bytes that carry no voxels (name, time, flags of the gzip header) may have changed.
    assert np.array_equal(volume.array[0], voxels.T)
