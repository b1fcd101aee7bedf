"""A results folder of nnU-Net becomes a model of all its folds, by the folder's own plans."""

from pathlib import Path

import pytest
import torch
from nnunet_results import write_results

from medmamba.bundle import load_networks
from medmamba.errors import BundleError
from medmamba.interop.nnunet_results import find_results, import_results


def test_all_folds_become_one_model(tmp_path: Path) -> None:
    write_results(tmp_path, (0, 1))
    bundle = import_results(find_results(tmp_path), tmp_path / "model")
    assert bundle.folds == ("0", "1")
    assert bundle.plan.plans_name == "nnUNetPlans"
    assert bundle.configuration.training.mirror_axes == (0, 1)
    assert bundle.manifest.scores == {"validation_dice": {"0": 0.5, "1": 0.5}}
    first, second = load_networks(bundle)
    weights = [next(network.parameters()) for network in (first, second)]
    assert not torch.equal(*weights)


def test_a_fold_or_chosen_folds_are_taken(tmp_path: Path) -> None:
    folder = write_results(tmp_path, (0, 1, "all"))
    assert find_results(folder).folds == ("0", "1")
    assert find_results(folder / "fold_1").folds == ("1",)
    assert find_results(folder, folds=["all"]).folds == ("all",)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_results(tmp_path, (0,))
    with pytest.raises(BundleError, match=r"fold 3 .*there for: 0"):
        find_results(folder, folds=["0", "3"])
    with pytest.raises(BundleError, match=r"checkpoint_best\.pth"):
        find_results(folder, checkpoint="checkpoint_best.pth")
    with pytest.raises(BundleError, match="configuration '2d'"):
        find_results(tmp_path, configuration="2d")
    with pytest.raises(BundleError, match="holds no model"):
        find_results(tmp_path / "Dataset007_Block" / folder.name / "fold_0" / "validation")


def test_several_models_are_listed(tmp_path: Path) -> None:
    folder = write_results(tmp_path, (0,))
    write_results(tmp_path / "more", (0,)).rename(
        folder.with_name("nnUNetTrainer__nnUNetPlans__2d")
    )
    with pytest.raises(BundleError, match=r"2 models .*__2d.*__3d_fullres"):
        find_results(folder.parent)
    assert find_results(folder.parent, configuration="3d_fullres").folder == folder
