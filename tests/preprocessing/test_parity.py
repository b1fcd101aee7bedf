"""Preprocessing and its undoing against the golden arrays of nnU-Net."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medmamba.dataset import Case, load_case, make_splits
from medmamba.plans.nnunet_schema import plan_from_nnunet
from medmamba.plans.plan import ConfigurationPlan, Plan
from medmamba.preprocessing.pipeline import PreprocessedCase, preprocess_case
from medmamba.preprocessing.resample import resampled_shape, separate_axis
from medmamba.preprocessing.restore import (
    labels_from_probabilities,
    restore_labels,
    restore_probabilities,
)

DATA_TOLERANCE = 1e-4
PROBABILITY_TOLERANCE = 2e-3
LABEL_TIES = 1e-4


@dataclass
class Golden:
    folder: Path
    plan: Plan
    configuration: ConfigurationPlan
    case: Case
    properties: dict[str, Any]

    def preprocess(self) -> PreprocessedCase:
        image, labels, _ = load_case(self.case)
        return preprocess_case(
            image,
            labels,
            grid=self.configuration.grid,
            recipe=self.configuration.preprocessing,
            label_map=self.plan.label_map,
        )


def golden_cases(root: Path) -> list[Golden]:
    found = []
    for folder in sorted(root.glob("*__*__*")):
        case_id, _, configuration = folder.name.split("__")
        plan = plan_from_nnunet(
            json.loads((folder / "plans.json").read_text()),
            json.loads((folder / "dataset.json").read_text()),
        )
        raw = root / "raw" / plan.dataset_name
        ending = plan.file_ending
        case = Case(
            id=case_id,
            images=tuple(sorted(raw.glob(f"{case_id}_[0-9][0-9][0-9][0-9]{ending}"))),
            labels=raw / f"label_{case_id}{ending}",
        )
        properties = json.loads((folder / "properties.json").read_text())
        chosen = plan.configurations[configuration]
        found.append(Golden(folder, plan, chosen, case, properties))
    if not found:
        pytest.skip(f"no golden cases under {root}")
    return found


def test_preprocessed_arrays_equal_the_golden_ones(fixtures_dir: Path) -> None:
    for golden in golden_cases(fixtures_dir / "preprocess"):
        made = golden.preprocess()
        assert made.labels is not None
        with np.load(golden.folder / "preprocessed.npz") as expected:
            assert made.data.shape == expected["data"].shape, golden.folder.name
            assert made.data.dtype == np.float32
            worst = np.abs(made.data - expected["data"]).max()
            assert worst <= DATA_TOLERANCE, golden.folder.name
            np.testing.assert_array_equal(made.labels, expected["seg"], golden.folder.name)


def test_the_record_and_the_class_locations_equal_the_golden_ones(fixtures_dir: Path) -> None:
    for golden in golden_cases(fixtures_dir / "preprocess"):
        made, expected = golden.preprocess(), golden.properties
        record = made.record
        assert list(record.shape) == expected["shape_before_cropping"]
        assert [list(side) for side in record.crop_box] == expected["bbox_used_for_cropping"]
        after = expected["shape_after_cropping_and_before_resampling"]
        assert list(record.shape_after_crop) == after
        turned = [expected["spacing"][axis] for axis in record.transpose_forward]
        assert list(record.spacing_mm) == turned
        counts = {
            str(key[0] if len(key) == 1 else key): len(where)
            for key, where in made.class_locations.items()
        }
        assert counts == expected["class_locations_counts"], golden.folder.name
        for key, where in made.class_locations.items():
            values = made.labels[0][tuple(where.T)]
            assert set(np.unique(values)) <= set(key)
            assert len(np.unique(where, axis=0)) == len(where)


def test_restored_labels_equal_the_golden_ones(fixtures_dir: Path) -> None:
    for golden in golden_cases(fixtures_dir / "preprocess"):
        record, plan = golden.preprocess().record, golden.plan
        recipe = golden.configuration.preprocessing
        with np.load(golden.folder / "export.npz") as expected:
            logits = expected["logits"].astype(np.float32)
            labels = restore_labels(logits, record, recipe, plan.label_map)
            wrong = np.count_nonzero(labels != expected["segmentation_fast_path"])
            assert wrong <= LABEL_TIES * labels.size, golden.folder.name
            assert labels.dtype == expected["segmentation"].dtype
            probabilities = restore_probabilities(logits, record, recipe, plan.label_map)
            exact = expected["probabilities"].astype(np.float32)
            assert np.abs(probabilities - exact).max() <= PROBABILITY_TOLERANCE
            decided = labels_from_probabilities(probabilities, plan.label_map)
            wrong = np.count_nonzero(decided != expected["segmentation"])
            assert wrong <= LABEL_TIES * labels.size, golden.folder.name


def test_shapes_separate_axes_and_splits_equal_the_golden_ones(fixtures_dir: Path) -> None:
    rules = fixtures_dir / "preprocess" / "rules" / "geometry.json"
    if not rules.is_file():
        pytest.skip(f"no {rules}")
    golden = json.loads(rules.read_text())
    for row in golden["new_shape_and_separate_axis"]:
        old, new = tuple(row["old_spacing"]), tuple(row["new_spacing"])
        assert list(resampled_shape(tuple(row["old_shape"]), old, new)) == row["new_shape"]
        assert separate_axis(old, new) == row["separate_axis"]
    expected = golden["splits_5fold_seed12345"]
    cases = expected[0]["train"] + expected[0]["val"]
    found = [
        {"train": list(split.train), "val": list(split.validation)} for split in make_splits(cases)
    ]
    assert found == expected
