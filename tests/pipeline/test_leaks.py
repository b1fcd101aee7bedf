"""A fold that validates on what it trains on is refused before it costs a night."""

import json
import shutil

import pytest

import medmamba
from medmamba.dataset import Split, read_splits, write_splits
from medmamba.errors import DatasetError

NETWORK = "plain_unet"


def test_copies_and_shared_subjects_are_refused(ellipsoids, tmp_path) -> None:
    for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(ellipsoids / part / f"case_000{ending}", ellipsoids / part / f"copy{ending}")
    description = json.loads((ellipsoids / "dataset.json").read_text())
    description["numTraining"] = 7
    (ellipsoids / "dataset.json").write_text(json.dumps(description))
    work = tmp_path / "work"
    medmamba.plan(ellipsoids, work, network=NETWORK, workers=1)
    splits = read_splits(work / "splits.json")
    rest = tuple(f"case_{number:03d}" for number in range(1, 6))
    write_splits(work / "splits.json", [Split(train=("case_000", *rest), validation=("copy",))])
    options = {"network": NETWORK, "fold": 0, "epochs": 1, "iterations": 1}
    with pytest.raises(DatasetError, match="copy = case_000") as caught:
        medmamba.train(work, **options)
    assert caught.value.code == "E_SPLIT_LEAK"
    description["subjects"] = {"case_000": "ann", "copy": "ann", "case_001": "ann"}
    (ellipsoids / "dataset.json").write_text(json.dumps(description))
    write_splits(work / "splits.json", splits)
    (work / "splits.json").unlink()
    medmamba.plan(ellipsoids, work, network=NETWORK, workers=1)
    for split in read_splits(work / "splits.json"):
        sides = {case in split.validation for case in ("case_000", "copy", "case_001")}
        assert len(sides) == 1
    write_splits(work / "splits.json", [Split(train=("copy", *rest[1:]), validation=("case_001",))])
    with pytest.raises(DatasetError, match="cases of ann both train and validate"):
        medmamba.train(work, **options)
