"""The table's DICOM part (rows E): series a scanner, an archive or a disc may hand over."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from dicom_phantom import enhanced, localizer, make_series, mr_tags, phantom, save
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from .phantom import Row

STUDY = {"StudyInstanceUID": "1.2.826.0.1.3680043.8.498.1", "FrameOfReferenceUID": "1.2.826.0.1.9"}
SERIES = {**STUDY, "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.2"}

WIDE = (6, 48, 64)

Make = Callable[[Path, str], None]


def series(datasets: Callable[[], list[FileDataset]]) -> Make:
    """A folder of these files."""
    return lambda folder, case: _void(save(datasets(), folder / case))


def changed(change: Callable[[int, Dataset], None], **tags: object) -> Make:
    """A series whose slices are edited one by one."""
    return series(lambda: make_series(change=change, **tags))


def without(*missing: int) -> Make:
    """A series that lacks slices."""
    return series(lambda: [item for at, item in enumerate(make_series()) if at not in missing])


def compressed(syntax: str) -> Make:
    """Planes large enough for every codec."""

    def change(_: int, dataset: Dataset) -> None:
        dataset.compress(syntax, generate_instance_uid=False)

    return series(lambda: make_series(phantom(WIDE), change=change))


def encoded(syntax: str) -> Make:
    """Another encoding of uncompressed pixels."""

    def change(_: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            swapped = np.frombuffer(dataset.PixelData, "<u2").astype(">u2")
            dataset.PixelData = swapped.tobytes()

    def make(folder: Path, case: str) -> None:
        (folder / case).mkdir()
        for index, dataset in enumerate(make_series(change=change)):
            implicit = syntax == ImplicitVRLittleEndian
            little = syntax != ExplicitVRBigEndian
            pydicom.dcmwrite(
                folder / case / f"{index}.dcm",
                dataset,
                enforce_file_format=True,
                implicit_vr=implicit,
                little_endian=little,
            )

    return make


def spoiled(change: Callable[[bytes], bytes], at: int = 3) -> Make:
    """A series one of whose files is damaged."""

    def make(folder: Path, case: str) -> None:
        save(make_series(), folder / case)
        path = folder / case / f"IM{at:04d}.dcm"
        path.write_bytes(change(path.read_bytes()))

    return make


def zipped(fill: Callable[[zipfile.ZipFile, Path], None]) -> Make:
    """An archive; ``fill`` gets a folder with the files of a good series."""

    def make(folder: Path, case: str) -> None:
        files = save(make_series(), folder / f"{case}-files")
        with zipfile.ZipFile(folder / f"{case}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            fill(archive, files)
        shutil.rmtree(files)

    return make


def pack(archive: zipfile.ZipFile, files: Path, *names: str) -> None:
    for path in sorted(files.iterdir()):
        archive.write(path, f"study/{path.name}")
    for name in names:
        archive.writestr(name, b"x" * 200)


def _void(_: object) -> None:
    return None


def _double(folder: Path, case: str) -> None:
    save(make_series(), folder / case)
    shutil.copy(folder / case / "IM0003.dcm", folder / case / "copy.dcm")


def _acquisitions() -> list[FileDataset]:
    second = phantom()[::-1]
    return [
        *make_series(AcquisitionNumber=1, **SERIES),
        *make_series(second, AcquisitionNumber=2, **SERIES),
    ]


def _echoes() -> list[FileDataset]:
    return [item for echo in (1, 2) for item in make_series(EchoNumbers=echo, **SERIES)]


def _one_broken_acquisition() -> list[FileDataset]:
    whole = make_series(AcquisitionNumber=1, **SERIES)
    return whole + make_series(AcquisitionNumber=2, **SERIES)[:3] + make_series(
        AcquisitionNumber=2, **SERIES
    )[5:]  # fmt: skip


def _turn_one(index: int, dataset: Dataset) -> None:
    if index == 2:
        dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]


def _study(folder: Path, case: str) -> None:
    """Everything a study folder holds besides the series that is meant."""
    save(make_series(), folder / case / "CT")
    save([localizer()], folder / case / "scout")
    short = make_series(phantom((3, 20, 24)), SeriesNumber=7)
    save(short, folder / case / "short")
    capture = make_series(
        np.zeros((1, 8, 8), np.int16), SOPClassUID=SecondaryCaptureImageStorage, Modality="OT"
    )
    save(capture, folder / case / "capture")
    report = make_series()[0]
    report.SOPClassUID, report.Modality = "1.2.840.10008.5.1.4.1.1.88.11", "SR"
    pdf = make_series()[0]
    pdf.SOPClassUID, pdf.EncapsulatedDocument = EncapsulatedPDFStorage, b"%PDF"
    for document in (report, pdf):
        document.SeriesInstanceUID = document.SOPInstanceUID = generate_uid()
        document.file_meta.MediaStorageSOPClassUID = document.SOPClassUID
        document.file_meta.MediaStorageSOPInstanceUID = document.SOPInstanceUID
        del document.PixelData, document.Rows, document.Columns
    save([report, pdf], folder / case / "documents")
    (folder / case / "readme.txt").write_text("not DICOM")


def _two_alike(folder: Path, case: str) -> None:
    for number in (3, 4):
        save(make_series(SeriesNumber=number), folder / case, prefix=f"s{number}")


def _no_rescale(_: int, dataset: Dataset) -> None:
    del dataset.RescaleSlope, dataset.RescaleIntercept


def _own_slope(index: int, dataset: Dataset) -> None:
    dataset.RescaleSlope, dataset.RescaleIntercept = 1.0 + 0.25 * index, -1024


def _unknown_syntax(_: int, dataset: Dataset) -> None:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID("1.2.840.10008.1.2.4.100")
    dataset.PixelData = pydicom.encaps.encapsulate([b"not a picture"])
    dataset["PixelData"].is_undefined_length = True


def _enhanced_mr() -> list[FileDataset]:
    dataset = enhanced(phantom())
    dataset.SOPClassUID, dataset.Modality = EnhancedMRImageStorage, "MR"
    dataset.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    return [dataset]


def _flipped_length(content: bytes) -> bytes:
    data = bytearray(content)
    data[data.index(b"\xe0\x7f\x10\x00OW") + 9] ^= 1 << 4
    return bytes(data)


def _bomb(archive: zipfile.ZipFile, files: Path) -> None:
    for index in range(20):
        archive.writestr(f"{index}.dcm", bytes(16 * 2**20))


def _link(archive: zipfile.ZipFile, files: Path) -> None:
    pack(archive, files)
    link = zipfile.ZipInfo("passwd.dcm")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, "/etc/passwd")


def _escape(folder: Path, case: str) -> None:
    save(make_series(), folder / case)
    outside = folder.parent / "outside.dcm"
    shutil.copy(folder / case / "IM0000.dcm", outside)
    (folder / case / "link.dcm").symlink_to(outside)


def _cut_zip(folder: Path, case: str) -> None:
    zipped(pack)(folder, case)
    path = folder / f"{case}.zip"
    path.write_bytes(path.read_bytes()[:-40])


TILT = float(np.tan(np.radians(12.0)) * 3.0)
OBLIQUE = {"row": (0.8, 0.6, 0.0), "column": (0.0, 0.0, -1.0)}
OK, WARN = "ok", "ok_with_warnings"

DICOM_ROWS = [
    Row("E00", series(make_series), OK),
    Row("E00b", series(lambda: make_series(**OBLIQUE)), OK),
    Row("E00c", series(lambda: make_series(**mr_tags())), OK),
    Row("E00d", series(lambda: make_series(phantom(WIDE))), OK),
    Row("E01", without(4), code="E_DCM_GAP"),
    Row("E01b", without(1, 2, 6), code="E_DCM_GAP"),
    Row("E01c", without(1, 3, 5), code="E_DCM_GAP"),
    Row("E02", _double, code="E_DCM_MIXED"),
    Row("E02b", series(_acquisitions), code="E_DCM_MIXED"),
    Row("E02c", series(_echoes), code="E_DCM_MIXED"),
    Row("E02d", changed(_turn_one), code="E_DCM_MIXED"),
    Row("E02e", series(_one_broken_acquisition), code="E_DCM_MIXED"),
    Row("E03", _study, WARN, "W_DCM_SERIES"),
    Row("E03b", _two_alike, code="E_DCM_AMBIGUOUS"),
    Row("E03c", series(lambda: [localizer()]), code="E_DCM_NO_IMAGE"),
    Row("E04", series(lambda: make_series(step=(0.0, TILT, 3.0))), WARN, "W_GEOM_RESAMPLED"),
    Row("E04b", series(lambda: make_series(step=(0.0, 3.0, 3.0))), code="E_GEOM_SHEAR"),
    Row("E05", changed(_no_rescale), WARN, "W_DCM_RESCALE"),
    Row("E05b", changed(_own_slope), OK),
    Row("E06", compressed(JPEGLSLossless), OK),
    Row("E06b", compressed(JPEG2000Lossless), OK),
    Row("E06c", compressed(RLELossless), OK),
    Row("E06d", encoded(DeflatedExplicitVRLittleEndian), OK),
    Row("E06e", encoded(ImplicitVRLittleEndian), OK),
    Row("E06f", encoded(ExplicitVRBigEndian), OK),
    Row("E06g", changed(_unknown_syntax), code="E_DCM_SYNTAX"),
    Row("E07", spoiled(lambda content: content[: len(content) // 2]), code="E_IO_TRUNCATED"),
    Row("E07b", spoiled(_flipped_length), code="E_IO_TRUNCATED"),
    Row("E07c", spoiled(lambda content: content[:-1]), code="E_IO_TRUNCATED"),
    Row("E07d", spoiled(lambda content: b""), code="E_IO_EMPTY"),
    Row("E08", series(lambda: [enhanced(phantom())]), OK),
    Row("E08b", series(_enhanced_mr), OK),
    Row("E10", zipped(pack), OK),
    Row("E10b", zipped(lambda zip, files: pack(zip, files, "../a.dcm")), code="E_PATH_UNSAFE"),
    Row("E10c", zipped(lambda zip, files: pack(zip, files, "/etc/a.dcm")), code="E_PATH_UNSAFE"),
    Row("E10d", zipped(_link), code="E_PATH_UNSAFE"),
    Row("E10e", zipped(_bomb), code="E_LIMIT_ZIP"),
    Row("E10f", _cut_zip, code="E_IO_TRUNCATED"),
    Row("E11", _escape, code="E_PATH_ESCAPE"),
]
"""Rows named E10 and E11 are archives and links: rows A and D as DICOM has them."""

SAME_VALUES = (
    ("E00", "E06d", "E06e", "E06f", "E08", "E10"),
    ("E00d", "E06", "E06b", "E06c"),
)
"""Groups of the same voxels, packed differently: the same mask."""

SPLIT_ROWS = {
    "E02b": {"E02b-acq1": OK, "E02b-acq2": OK},
    "E02c": {"E02c-echo1": OK, "E02c-echo2": OK},
    "E02e": {"E02e-acq1": OK, "E02e-acq2": "rejected"},
    "E01": {"E01": "rejected"},
    "E00": {"E00": OK},
}
"""Row -> what its cases become with ``--split-acquisitions``."""
