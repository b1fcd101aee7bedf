import json
from pathlib import Path

import nibabel
import numpy as np

from medmamba.dataset import open_dataset
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import compute_fingerprint
from medmamba.plans.planner import make_plan
from medmamba.plans.preprocess import preprocess_dataset
from medmamba.plans.presets import load_preset
from medmamba.preprocessing.store import CaseStore


def test_a_dataset_is_planned_and_preprocessed_in_each_configuration(tmp_path: Path) -> None:
    root = tmp_path / "Dataset779_Boxes"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    for index in range(3):
        voxels = np.random.default_rng(index).normal(100, 20, (30, 32, 9 + index))
        labels = np.zeros(voxels.shape, np.uint8)
        labels[5:15, 5:15, 3:7] = 1
        image = nibabel.Nifti1Image(voxels.astype(np.float32), affine)
        nibabel.save(image, root / "imagesTr" / f"c{index}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), root / "labelsTr" / f"c{index}.nii.gz")
    description = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "box": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    dataset = open_dataset(root)
    plan = make_plan(
        compute_fingerprint(dataset), dataset.description, load_preset("plain_unet"), Budget()
    )
    assert set(plan.configurations) == {"2d", "3d_fullres"}
    for name, configuration in plan.configurations.items():
        folder = tmp_path / name
        assert preprocess_dataset(dataset, plan, {name: folder}) == 3
        case = CaseStore(folder).open("c1")
        assert case.shape == case.data.shape[1:] == (10, 32, 30)
        assert len(case.class_locations[(1,)]) > 0
        assert configuration.grid.dimension == (2 if name == "2d" else 3)
