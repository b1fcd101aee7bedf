import shutil
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_phantom import enhanced, localizer, make_series, mr_tags, phantom, save, slice_dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from medmamba.errors import InputError
from medmamba.io import (
    DEFAULT_GATE,
    Gate,
    holds_dicom,
    read_header,
    read_image,
    read_labels,
    write_labels,
)


def rejection(path: Path, gate: Gate = DEFAULT_GATE) -> InputError:
    with pytest.raises(InputError) as caught:
        read_image(path, gate=gate)
    assert caught.value.message.endswith(".")
    return caught.value


def codes(path: Path) -> list[str]:
    return [code for code in read_image(path)[1].warning_codes if code.startswith("W_")]


def test_a_series_is_read_in_order_of_space_with_its_grid(tmp_path: Path) -> None:
    volume, header = read_image(save(make_series(), tmp_path / "ct"))
    np.testing.assert_array_equal(volume.array[0], phantom())
    np.testing.assert_allclose(
        volume.geometry.matrix,
        [[0, 0, -0.7, 40], [0, -0.8, 0, 30], [3, 0, 0, 10], [0, 0, 0, 1]],
        atol=1e-9,
    )
    assert header.warnings == ()
    assert read_header(tmp_path / "ct").geometry == volume.geometry


def test_oblique_planes_keep_their_directions(tmp_path: Path) -> None:
    angle = 0.4
    row, column = (np.cos(angle), np.sin(angle), 0.0), (0.0, 0.0, -1.0)
    volume, header = read_image(save(make_series(row=row, column=column), tmp_path / "ct"))
    steps = volume.geometry.matrix[:3, :3] * np.array([[-1.0], [-1.0], [1.0]])
    np.testing.assert_allclose(steps[:, 2], np.array(row) * 0.7, atol=1e-8)
    np.testing.assert_allclose(steps[:, 1], np.array(column) * 0.8, atol=1e-8)
    np.testing.assert_allclose(steps[:, 0], np.cross(row, column) * 3.0, atol=1e-6)
    assert header.warnings == ()


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_read_like_its_folder(tmp_path: Path, packing: int) -> None:
    folder = save(make_series(), tmp_path / "ct")
    (folder / "README.txt").write_text("no image")
    archive = tmp_path / "ct.zip"
    with zipfile.ZipFile(archive, "w", packing) as packed:
        for path in folder.iterdir():
            packed.write(path, f"study/{path.name}")
    assert holds_dicom(archive)
    zipped, direct = read_image(archive)[0], read_image(folder)[0]
    np.testing.assert_array_equal(zipped.array, direct.array)
    assert zipped.geometry == direct.geometry


def test_labels_of_a_series_go_out_on_its_grid(tmp_path: Path) -> None:
    volume, header = read_image(save(make_series(), tmp_path / "ct"))
    labels = (volume.array[0] > 0).astype(np.uint8)
    write_labels(tmp_path / "mask.nii.gz", labels, header)
    written, _ = read_labels(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(written.array[0], labels)
    assert written.geometry.same_grid_as(volume.geometry)


@pytest.mark.parametrize("missing", [[3], [2, 3], [2, 5]])
def test_missing_slices_are_listed(tmp_path: Path, missing: list[int]) -> None:
    series = [item for index, item in enumerate(make_series()) if index not in missing]
    error = rejection(save(series, tmp_path / "ct"))
    assert error.code == "E_DCM_GAP"
    start = 10 + 3 * (missing[0] - 1)
    assert f"{start} to" in error.message
    count = 2 if missing == [2, 3] else 1
    assert f"({count} missing)" in error.message
    assert ("2 gaps" in error.message) == (missing == [2, 5])


def test_distances_may_differ_by_rounding_only(tmp_path: Path) -> None:
    def round_position(index: int, dataset: pydicom.Dataset) -> None:
        dataset.ImagePositionPatient = [-40, -30, round(10 + 0.666 * index, 2)]

    assert codes(save(make_series(change=round_position), tmp_path / "ct")) == []

    def shift(index: int, dataset: pydicom.Dataset) -> None:
        dataset.ImagePositionPatient = [-40, -30, 10 + 3 * index + 0.1 * (index == 4)]

    assert rejection(save(make_series(change=shift), tmp_path / "uneven")).code == "E_DCM_GAP"


def test_doubled_positions_and_mixed_planes_are_refused(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "copied")
    shutil.copy(folder / "IM0003.dcm", folder / "copy.dcm")
    assert rejection(folder).code == "E_DCM_MIXED"

    second = make_series(SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2", AcquisitionNumber=2)
    first = make_series(SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2")
    error = rejection(save(first + second, tmp_path / "two"))
    assert error.code == "E_DCM_MIXED"
    assert "acquisitions 1, 2" in error.message

    def turn_one(index: int, dataset: pydicom.Dataset) -> None:
        if index == 2:
            dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]

    assert rejection(save(make_series(change=turn_one), tmp_path / "t")).code == "E_DCM_MIXED"


def test_other_objects_are_left_aside_and_listed(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "study")
    save([localizer()], folder / "scout")
    capture = make_series(
        np.zeros((1, 8, 8), np.int16), SOPClassUID=SecondaryCaptureImageStorage, Modality="OT"
    )
    save(capture, folder, prefix="SC")
    save(make_series(phantom((3, 20, 24)), SeriesNumber=9), folder, prefix="small")
    document = slice_dataset(np.zeros((2, 2)), SOPClassUID=EncapsulatedPDFStorage, Modality="DOC")
    for keyword in ("Rows", "Columns", "PixelData", "BitsAllocated"):
        delattr(document, keyword)
    document.SeriesInstanceUID = generate_uid()
    save([document], folder, prefix="PDF")
    volume, header = read_image(folder)
    np.testing.assert_array_equal(volume.array[0], phantom())
    [warning] = header.warnings
    assert warning.startswith("W_DCM_SERIES")
    for phrase in ("localizer, 1 image", "secondary capture", "encapsulated pdf",
                   "series 9: CT, 3 images"):  # fmt: skip
        assert phrase in warning


def test_two_equal_series_are_ambiguous_and_none_is_an_error(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "study")
    save(make_series(SeriesNumber=4), folder, prefix="second")
    error = rejection(folder)
    assert error.code == "E_DCM_AMBIGUOUS"
    assert "series 3" in error.message
    assert "series 4" in error.message
    assert rejection(save([localizer()], tmp_path / "scout")).code == "E_DCM_NO_IMAGE"


def test_a_tilted_gantry_is_straightened_and_labels_come_back(tmp_path: Path) -> None:
    tilt = np.tan(np.radians(12.0)) * 3.0
    volume, header = read_image(save(make_series(step=(0.0, tilt, 3.0)), tmp_path / "ct"))
    assert "W_GEOM_RESAMPLED" in header.warning_codes
    assert header.straightened == volume.geometry
    labels = np.zeros(volume.geometry.shape, np.uint8)
    labels[volume.array[0] > -400] = 1
    write_labels(tmp_path / "mask.nii.gz", labels, header)
    written, _ = read_labels(tmp_path / "mask.nii.gz", gate=DEFAULT_GATE)
    assert written.geometry.same_grid_as(header.geometry)
    agreement = (written.array[0] > 0) == (phantom() > -400)
    assert agreement.mean() > 0.97
    assert rejection(tmp_path / "ct", Gate(strict=True)).code == "E_GEOM_SHEAR"


def test_rescaling_is_applied_slice_by_slice(tmp_path: Path) -> None:
    def scale(index: int, dataset: pydicom.Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5 + index, -index

    volume, _ = read_image(save(make_series(change=scale), tmp_path / "pet"))
    stored = phantom().astype(np.float64) + 1024
    expected = [plane * (0.5 + index) - index for index, plane in enumerate(stored)]
    np.testing.assert_array_equal(volume.array[0], np.array(expected, np.float32))

    def drop(index: int, dataset: pydicom.Dataset) -> None:
        del dataset.RescaleSlope, dataset.RescaleIntercept

    assert codes(save(make_series(change=drop), tmp_path / "ct")) == ["W_DCM_RESCALE"]
    assert codes(save(make_series(change=drop, **mr_tags()), tmp_path / "mr")) == []


def test_signed_and_narrow_values(tmp_path: Path) -> None:
    def sign(index: int, dataset: pydicom.Dataset) -> None:
        dataset.PixelRepresentation, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = phantom()[index].astype("<i2").tobytes()

    volume, _ = read_image(save(make_series(change=sign), tmp_path / "signed"))
    np.testing.assert_array_equal(volume.array[0], phantom())

    def narrow(index: int, dataset: pydicom.Dataset) -> None:
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.RescaleIntercept = 0
        dataset.PixelData = (phantom()[index] > 0).astype(np.uint8).tobytes()

    volume, _ = read_image(save(make_series(change=narrow), tmp_path / "narrow"))
    np.testing.assert_array_equal(volume.array[0], phantom() > 0)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_compressed_pixels_equal_the_stored_ones(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    def pack(index: int, dataset: pydicom.Dataset) -> None:
        dataset.compress(syntax, generate_instance_uid=False)

    values = phantom((3, 48, 64))
    folder = save(make_series(values, change=pack), tmp_path / "ct")
    np.testing.assert_array_equal(read_image(folder)[0].array[0], values)
    # Cut inside the last slice's stream, with the marks around it intact.
    path = sorted(folder.iterdir())[2]
    dataset = pydicom.dcmread(path)
    stream = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = pydicom.encaps.encapsulate([stream[: len(stream) // 2]])
    dataset.save_as(path)
    assert rejection(folder).code in ("E_IO_TRUNCATED", "E_IO_CORRUPT")


def test_deflated_files_are_read_and_cut_ones_refused(tmp_path: Path) -> None:
    series = make_series()
    for dataset in series:
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    folder = save(series, tmp_path / "ct")
    np.testing.assert_array_equal(read_image(folder)[0].array[0], phantom())
    path = folder / "IM0002.dcm"
    path.write_bytes(path.read_bytes()[:-40])
    assert rejection(folder).code in ("E_IO_TRUNCATED", "E_IO_CORRUPT")


def test_an_unknown_syntax_is_named(tmp_path: Path) -> None:
    def pack(index: int, dataset: pydicom.Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.10008.1.2.4.100")
        dataset.PixelData = pydicom.encaps.encapsulate([b"not a picture"])
        dataset["PixelData"].is_undefined_length = True

    assert rejection(save(make_series(change=pack), tmp_path / "ct")).code == "E_DCM_SYNTAX"


@pytest.mark.parametrize("kept", [0.2, 0.6, 0.99])
def test_a_cut_slice_rejects_the_series(tmp_path: Path, kept: float) -> None:
    folder = save(make_series(), tmp_path / "ct")
    path = folder / "IM0004.dcm"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert rejection(folder).code == "E_IO_TRUNCATED"


@pytest.mark.parametrize("bit", range(0, 24, 3))
def test_a_flipped_length_rejects_the_series(tmp_path: Path, bit: int) -> None:
    folder = save(make_series(), tmp_path / "ct")
    path = folder / "IM0001.dcm"
    content = bytearray(path.read_bytes())
    at = content.index(b"\xe0\x7f\x10\x00OW") + 8
    content[at + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    assert rejection(folder).code == "E_IO_TRUNCATED"


def test_files_that_are_no_dicom(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    (folder / "notes.txt").write_text("hello")
    assert codes(folder) == []
    (folder / "broken.dcm").write_bytes(b"")
    assert rejection(folder).code == "E_IO_EMPTY"
    (folder / "broken.dcm").write_bytes(b"<html>not found</html>" * 20)
    assert rejection(folder).code in ("E_IO_FORMAT", "E_IO_CORRUPT")


def test_enhanced_multi_frame(tmp_path: Path) -> None:
    save([enhanced(phantom())], tmp_path / "ct")
    single, folder = read_image(tmp_path / "ct" / "IM0000.dcm"), read_image(tmp_path / "ct")
    plain, _ = read_image(save(make_series(), tmp_path / "plain"))
    for volume, _ in (single, folder):
        np.testing.assert_array_equal(volume.array, plain.array)
        assert volume.geometry.same_grid_as(plain.geometry)


def test_files_without_preamble_or_series_number(tmp_path: Path) -> None:
    folder = save(make_series(), tmp_path / "ct")
    for path in folder.iterdir():
        # As written before the file format had a header: the bare data set.
        content = path.read_bytes()
        length = int.from_bytes(content[140:144], "little")
        path.write_bytes(content[144 + length :])
    np.testing.assert_array_equal(read_image(folder)[0].array[0], phantom())


@pytest.mark.parametrize("name", ["../out.dcm", "/abs.dcm", "a\\..\\..\\b.dcm", "C:x.dcm"])
def test_archives_with_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    folder = save(make_series(), tmp_path / "ct")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.write(folder / "IM0000.dcm", "fine.dcm")
        packed.writestr(name, b"x")
    assert rejection(tmp_path / "x.zip").code == "E_PATH_UNSAFE"


def test_archives_that_are_bombs_links_or_damaged_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for index in range(20):
            packed.writestr(f"{index}.dcm", bytes(16 * 2**20))
    assert rejection(tmp_path / "bomb.zip").code == "E_LIMIT_ZIP"
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as packed:
        link = zipfile.ZipInfo("passwd.dcm")
        link.external_attr = 0o120777 << 16
        packed.writestr(link, "/etc/passwd")
    assert rejection(tmp_path / "link.zip").code == "E_PATH_UNSAFE"
    content = (tmp_path / "bomb.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    assert rejection(tmp_path / "cut.zip").code == "E_IO_TRUNCATED"


def test_real_series_match_the_labels_beside_them(data_dir: Path) -> None:
    folder = data_dir / "dicom"
    if not folder.is_dir():
        pytest.skip("no real DICOM series")
    volume, header = read_image(folder / "ct_body")
    labels, _ = read_labels(folder / "ct_body_label.nii.gz")
    # The label file runs the other way along rows: carry it over by physical position.
    to_label = np.linalg.solve(labels.geometry.matrix, volume.geometry.matrix)
    assert np.allclose(np.abs(to_label[:3, :3]), np.eye(3), atol=1e-6)
    indices = np.indices(volume.geometry.shape).reshape(3, -1)
    there = np.rint(to_label[:3, :3] @ indices + to_label[:3, 3:]).astype(int)
    carried = labels.array[0][tuple(there)].reshape(volume.geometry.shape)
    hu = volume.array[0]
    liver, aorta, vertebra = (hu[carried == value] for value in (5, 52, 32))
    assert 40 < np.median(liver) < 160
    assert 80 < np.median(aorta) < 300
    assert np.median(vertebra) > 120
    assert header.warnings == ()
    volume, _ = read_image(folder / "hippocrop_study1")
    assert volume.geometry.shape == (32, 51, 35)
