"""Every DICOM row through the real command, between good cases; and what of a patient comes out."""

import gzip
import importlib.util
import json
import shutil
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_phantom import enhanced, make_series, phantom, save
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from typer.testing import CliRunner

from medmamba.bundle import save_bundle
from medmamba.cli.app import app
from medmamba.io import read_header

from ..test_bundle import CONFIGURATION, tiny_plan, weights
from .dicom_rows import DICOM_ROWS, SAME_VALUES, SPLIT_ROWS
from .phantom import nifti, packed, voxels

GOOD = ("00good", "zzgood")
BY_NAME = {row.name: row for row in DICOM_ROWS}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dicom") / "model"
    save_bundle(
        folder, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32",
    )  # fmt: skip
    return folder


def predict(images: Path, output: Path, model: Path, *options: str):
    result = CliRunner().invoke(
        app, ["predict", "-i", str(images), "-o", str(output), "-m", str(model), "--json", *options]
    )
    cases = json.loads(result.stdout)["cases"] if result.stdout.startswith("{") else []
    return result, {item["case_id"]: item for item in cases}


def write_good(folder: Path) -> None:
    folder.mkdir()
    save(make_series(phantom((6, 16, 16))), folder / GOOD[0])
    (folder / f"{GOOD[1]}_0000.nii.gz").write_bytes(packed(nifti(voxels(1))))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory, model) -> tuple[dict, Path, Path]:
    """The run over all rows: records, its output, and that of the good cases alone."""
    place = tmp_path_factory.mktemp("rows")
    write_good(place / "alone")
    shutil.copytree(place / "alone", place / "images")
    for row in DICOM_ROWS:
        row.make(place / "images", row.name)
    result, records = predict(place / "images", place / "out", model)
    assert result.exit_code == 4, result.output
    alone, _ = predict(place / "alone", place / "out_alone", model, "--in-process")
    assert alone.exit_code == 0
    return records, place / "out", place / "out_alone"


@pytest.mark.parametrize("row", DICOM_ROWS, ids=lambda row: row.name)
def test_row(row, outcome) -> None:
    records, out, _ = outcome
    record = records[row.name]
    found = (record["error"] or {}).get("code", "")
    assert record["status"] == row.status, (found, record["warnings"], record["error"])
    files = [out / f"{row.name}{ending}" for ending in (".nii.gz", ".seg.dcm")]
    if row.status == "rejected":
        assert found == row.code, record["error"]
        assert not any(path.exists() for path in files)
    else:
        assert all(path.is_file() for path in files)
        assert any(text.startswith(row.code) for text in record["warnings"]) or not row.code
        assert row.status != "ok" or not record["warnings"]


def test_good_cases_do_not_notice_the_bad_ones(outcome) -> None:
    _, out, alone = outcome
    for path in alone.iterdir():
        if path.is_file() and path.suffix != ".json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_nothing_partial_is_left(outcome) -> None:
    _, out, _ = outcome
    names = {path.name.split(".")[0] for path in out.iterdir()} - {"run"}
    assert names <= {*GOOD, *BY_NAME}
    # Nothing of an archive was unpacked beside it.
    beside = {path.name.split(".")[0] for path in (out.parent / "images").iterdir()}
    assert beside <= {*GOOD, f"{GOOD[1]}_0000", *BY_NAME}


def test_gaps_are_listed_where_they_are(outcome) -> None:
    message = outcome[0]["E01b"]["error"]["message"]
    assert "2 gaps" in message
    assert "10 to 19 mm (2 missing)" in message


@pytest.mark.parametrize("names", SAME_VALUES)
def test_the_packing_of_values_does_not_change_the_mask(names, outcome) -> None:
    _, out, _ = outcome
    masks = [(out / f"{name}.nii.gz").read_bytes() for name in names]
    assert all(mask == masks[0] for mask in masks)


@pytest.mark.parametrize("name", ["E00", "E04", "E08"])
def test_the_segmentation_lies_on_the_planes_of_the_series(name, outcome) -> None:
    """Read by pydicom alone: every frame is that plane of the mask that its position says."""
    _, out, _ = outcome
    segmentation = pydicom.dcmread(out / f"{name}.seg.dcm")
    geometry = read_header(out.parent / "images" / name).geometry
    mask = np.asarray(nibabel.load(out / f"{name}.nii.gz").dataobj).T
    frames = segmentation.pixel_array.reshape(-1, *mask.shape[1:])
    built = np.zeros((3, *mask.shape), bool)
    own = {
        item.ReferencedSOPInstanceUID
        for series in segmentation.ReferencedSeriesSequence
        for item in series.ReferencedInstanceSequence
    }
    known = {
        pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID
        for path in (out.parent / "images" / name).iterdir()
    }
    assert own == known
    to_index = np.linalg.inv(geometry.matrix)
    for group, frame in zip(segmentation.PerFrameFunctionalGroupsSequence, frames, strict=True):
        position = [float(v) for v in group.PlanePositionSequence[0].ImagePositionPatient]
        index = to_index @ [-position[0], -position[1], position[2], 1.0]
        np.testing.assert_allclose(index[1:3], 0, atol=1e-3)
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        built[number, round(index[0])] = frame > 0
    for label in (1, 2):
        np.testing.assert_array_equal(built[label], mask == label)


def test_acquisitions_are_split_on_request(model, tmp_path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in SPLIT_ROWS:
        BY_NAME[name].make(images, name)
    result, records = predict(
        images, tmp_path / "out", model, "--split-acquisitions", "--in-process"
    )
    assert result.exit_code == 4
    statuses = {name: item["status"].split("_")[0] for name, item in records.items()}
    assert statuses == {name: kind for parts in SPLIT_ROWS.values() for name, kind in parts.items()}
    for name in ("E02b-acq1", "E02b-acq2"):
        assert records[name]["warnings"][0].startswith("W_DCM_SPLIT: 8 of the series' 16 images")
        segmentation = pydicom.dcmread(tmp_path / "out" / f"{name}.seg.dcm")
        [series] = segmentation.ReferencedSeriesSequence
        assert len(series.ReferencedInstanceSequence) == 8
    first, second = (
        np.asarray(nibabel.load(tmp_path / "out" / f"E02b-acq{number}.nii.gz").dataobj)
        for number in (1, 2)
    )
    assert (first != second).any()
    again, records = predict(
        images, tmp_path / "out", model, "--split-acquisitions", "--in-process"
    )
    assert records["E02b-acq2"]["status"] == "skipped"
    assert again.exit_code == 4


TEXT_VRS = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
IDENTIFIES = {
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID",
}  # fmt: skip
"""What ties files together, and mask and images; identifiers of images, not of people."""
REQUIRED = {
    "PatientName", "PatientID", "PatientBirthDate", "StudyID", "StudyDate", "StudyTime",
    "AccessionNumber", "ReferringPhysicianName",
}  # fmt: skip
"""What the standard requires of an object in the same study (type 2 of patient and study)."""
READ_BY = {
    "ImageType", "Modality", "PhotometricInterpretation", "PatientSex",
}  # fmt: skip
"""Text that decides how a file is read, and codes of few values."""


def fields() -> dict[str, str]:
    """Keyword -> a sentinel of its own, for every text attribute of the data dictionary."""
    found = {}
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        in_image = 0x0008 <= tag >> 16 < 0x7FE0
        if vr in TEXT_VRS and keyword and not retired and in_image and keyword not in READ_BY:
            found[keyword] = f"ZZ{len(found):05d}"
    return found


def dates_and_identifiers() -> dict[str, str]:
    """Keyword -> a value of its own, for every date, time and identifier that no reader needs."""
    found = {}
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        in_image = 0x0008 <= tag >> 16 < 0x7FE0
        if retired or not keyword or not in_image or keyword in IDENTIFIES:
            continue
        number = len(found)
        day = f"{1901 + number // 336}{1 + number // 28 % 12:02d}{1 + number % 28:02d}"
        value = {
            "DA": day, "TM": f"010203.{number:06d}", "DT": f"{day}010203.{number:06d}",
            "UI": f"1.2.276.99.{100000 + number}",
        }.get(vr)  # fmt: skip
        if value:
            found[keyword] = value
    return found


def mark(dataset: Dataset, sentinels: dict[str, str]) -> None:
    """Fill every text attribute, nested and private ones too."""
    for keyword, text in sentinels.items():
        setattr(dataset, keyword, text)
    item = Dataset()
    item.PatientName, item.PatientComments = "ZZNESTED", "ZZNESTED"
    dataset.OtherPatientIDsSequence = Sequence([item])
    dataset.RequestAttributesSequence = Sequence([item])
    private = dataset.private_block(0x0029, "ZZCREATOR", create=True)
    private.add_new(1, "LO", "ZZPRIVATE")
    for group in dataset.get("PerFrameFunctionalGroupsSequence", ()):
        group.FrameContentSequence = Sequence([Dataset()])
        group.FrameContentSequence[0].FrameComments = "ZZNESTED"
        group.FrameContentSequence[0].FrameLabel = "ZZNESTED"
        group.PatientComments = "ZZNESTED"


@pytest.mark.parametrize("kind", ["files", "frames"])
def test_of_the_patient_only_what_is_required_comes_out(kind, model, tmp_path) -> None:
    sentinels = fields() | dates_and_identifiers()
    assert len(sentinels) > 700
    images = tmp_path / "images"
    good = make_series() if kind == "files" else [enhanced(phantom())]
    bad = make_series()
    del bad[3]
    for dataset in (*good, *bad):
        mark(dataset, sentinels)
        dataset.preamble = b"ZZPREAMBLE".ljust(128, b"\0")
    with warnings.catch_warnings():
        # pydicom complains of the character set while writing; reading it is what counts here.
        warnings.simplefilter("ignore")
        save(good, images / "good")
        save(bad, images / "bad")
    # Once with a worker, which could talk out of turn.
    options = ["--in-process"] if kind == "frames" else []
    result, records = predict(images, tmp_path / "out", model, *options)
    assert [records[name]["status"] for name in ("good", "bad")] == ["ok", "rejected"]
    written = {"screen": result.output.encode()}
    if importlib.util.find_spec("plastimatch"):
        place = str(tmp_path / "out" / "good")
        arguments = ["convert", "seg-to-rtstruct", f"{place}.nii.gz", str(images / "good"), "-o",
                     f"{place}.rtstruct.dcm", "-m", str(model)]  # fmt: skip
        drawn = CliRunner().invoke(app, arguments)
        assert drawn.exit_code == 0, drawn.output
        written["screen"] += drawn.output.encode()
    for path in (item for item in (tmp_path / "out").rglob("*") if item.is_file()):
        data = path.read_bytes()
        written[path.name] = data + (gzip.decompress(data) if path.suffix == ".gz" else b"")
    allowed = {sentinels[keyword].encode() for keyword in REQUIRED}
    forbidden = [text.encode() for text in sentinels.values()]
    forbidden += [b"ZZNESTED", b"ZZCREATOR", b"ZZPRIVATE", b"ZZPREAMBLE"]
    for name, data in written.items():
        found = {text for text in forbidden if text in data}
        assert found <= (allowed if name.endswith(".dcm") else set()), (name, found)
    kept = pydicom.dcmread(tmp_path / "out" / "good.seg.dcm")
    assert kept.PatientName == sentinels["PatientName"]
    assert kept.PatientBirthDate == sentinels["PatientBirthDate"]
