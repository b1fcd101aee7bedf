import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from medmamba.dataset import Case
from medmamba.errors import InputError
from medmamba.files import hash_file, to_json
from medmamba.inference.records import (
    CaseError,
    CommitRecord,
    ModelIdentity,
    OutputFile,
    describe_labels,
    identify,
    read_record,
    redacted,
    still_holds,
    work_key,
)
from medmamba.labels import LabelMap
from medmamba.volume import Geometry

REGIONS = LabelMap(
    values={"background": (0,), "whole": (1, 2), "core": (2,), "rare": (3,)},
    region_order=(1, 2, 3),
)
MODEL = ModelIdentity(name="m", sha256="0" * 64)


def test_labels_are_measured_in_millilitres_and_boxes() -> None:
    labels = np.zeros((6, 8, 10), dtype=np.uint8)
    labels[2:4, 3:5, 4:6] = 1
    labels[4, 5, 6] = 2  # touches the block above by a corner
    labels[0, 7, 0] = 2  # alone in the corner of the image
    geometry = Geometry.from_spacing((6, 8, 10), (5.0, 2.0, 1.0))
    whole, core, rare = describe_labels(labels, geometry, REGIONS)
    assert (whole.voxels, whole.n_components, whole.touches_border) == (10, 2, True)
    assert whole.volume_ml == pytest.approx(0.1)
    assert whole.box == ((0, 5), (3, 8), (0, 7))
    assert (core.voxels, core.n_components) == (2, 2)
    assert (rare.voxels, rare.volume_ml, rare.box, rare.touches_border) == (0, 0.0, None, False)


def test_a_slice_has_no_border_in_its_missing_direction() -> None:
    labels = np.zeros((1, 8, 10), dtype=np.uint8)
    labels[0, 3:5, 4:6] = 1
    geometry = Geometry.from_spacing((1, 8, 10), (1.0, 1.0, 1.0))
    assert not describe_labels(labels, geometry, REGIONS)[0].touches_border
    labels[0, 0, 4] = 1
    assert describe_labels(labels, geometry, REGIONS)[0].touches_border


def record_of(folder: Path, content: bytes) -> CommitRecord:
    mask = folder / "a.nii.gz"
    mask.write_bytes(content)
    output = OutputFile(name=mask.name, size_bytes=len(content), sha256=hash_file(mask))
    return CommitRecord(case_id="a", status="ok", output=output)


def test_a_record_holds_while_its_mask_is_untouched(tmp_path: Path) -> None:
    record = record_of(tmp_path, b"mask")
    assert still_holds(record, tmp_path)
    (tmp_path / "a.nii.gz").write_bytes(b"edit")
    assert not still_holds(record, tmp_path)
    (tmp_path / "a.nii.gz").unlink()
    assert not still_holds(record, tmp_path)
    assert not still_holds(None, tmp_path)


@pytest.mark.parametrize("damage", ["{", "[]", '{"case_id": 1}', "surprise"])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.json"
    good = record_of(tmp_path, b"mask")
    path.write_text(to_json(good))
    assert read_record(path) == good
    if damage == "surprise":
        damage = json.dumps(json.loads(path.read_text()) | {"surprise": 1})
    path.write_text(damage)
    assert read_record(path) is None
    assert read_record(tmp_path / "b.json") is None


def test_keys_follow_content_and_not_names(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x")
    (tmp_path / "two").write_bytes(b"x")
    (tmp_path / "three").write_bytes(b"y")
    one, two, three = (identify((tmp_path / name,)) for name in ("one", "two", "three"))
    assert work_key(one, MODEL, {}) == work_key(two, MODEL, {})
    assert work_key(one, MODEL, {}) != work_key(three, MODEL, {})
    assert work_key(one, MODEL, {}) != work_key(one, MODEL, {"step": 0.25})
    other = dataclasses.replace(MODEL, sha256="1" * 64)
    assert work_key(one, MODEL, {}) != work_key(one, other, {})
    with pytest.raises(InputError) as caught:
        identify((tmp_path / "absent",))
    assert str(tmp_path) not in caught.value.message


def test_folders_are_cut_out_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "ZZPHI^NAME" / "scan.nii.gz"
    error = CaseError(code="E_IO", stage="read", message=f"{path}: damaged")
    record = CommitRecord(
        case_id="scan", status="rejected", error=error, warnings=(f"W_X: {path} is odd",)
    )
    text = to_json(redacted(record, Case(id="a", images=(path,))))
    assert "ZZPHI" not in text
    assert "scan.nii.gz: damaged" in text
