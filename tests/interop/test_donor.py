"""Trained weights found in whatever a user has: our folders, nnU-Net's, files."""

from pathlib import Path

import pytest
import torch
from foreign_checkpoints import DATASET, write_checkpoint, write_content
from nnunet_results import write_results
from safetensors.torch import save_file

from medmamba.errors import BundleError, SecurityError
from medmamba.interop.checkpoint import import_checkpoints
from medmamba.interop.donor import Donor, read_donor, under_own_names


def read(path: Path, **changes: str) -> Donor:
    wanted = {"network": "plain_unet", "configuration": "3d_fullres", "fold": "0", **changes}
    return read_donor(path, **wanted)


def test_bundle_file_and_results_folder_give_the_same_weights(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint_final.pth"
    official = write_checkpoint(file, "plain_unet")
    bundle = import_checkpoints([file], tmp_path / "run" / "model")
    sources = {"bundle": bundle.folder, "run folder": tmp_path / "run", "file": file}
    for path in sources.values():
        donor = read(path)
        assert donor.spec is not None and donor.spec.name == "plain_unet"
        assert donor.fold == "2"
        assert donor.channels == ("MRI",)
        assert donor.label_map is not None
        assert list(donor.label_map.values) == list(DATASET["labels"])
        own = official.state_dict()
        assert donor.state.keys() == own.keys()
        assert all(torch.equal(donor.state[name], own[name]) for name in own)
    assert len({read(path).sha256 for path in (file, bundle.folder)}) == 2


def test_the_fold_of_the_run_is_taken_where_there_is_one(tmp_path: Path) -> None:
    model = write_results(tmp_path, (0, 1))
    assert read(model, fold="1").fold == "1"
    assert read(model, fold="7").fold == "0"
    assert read(model / "fold_1", fold="0").fold == "1", "a fold's folder means that fold"
    assert not torch.equal(*(next(iter(read(model, fold=k).state.values())) for k in "01"))


def test_bare_tensors_say_nothing_of_labels(tmp_path: Path) -> None:
    network = write_checkpoint(tmp_path / "c.pth", "plain_unet")
    own = network.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in own.items()}}, tmp_path / "bare.pth")
    save_file(own, tmp_path / "bare.safetensors")
    for name in ("bare.pth", "bare.safetensors"):
        donor = read(tmp_path / name)
        assert donor.spec is None and donor.label_map is None
        assert under_own_names(donor.state, own).keys() == own.keys()


class Program:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    write_content(tmp_path / "c.pth", {}, program=Program())
    with pytest.raises(SecurityError, match="print"):
        read(tmp_path / "c.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="holds no model"):
        read(tmp_path / "empty")
    with pytest.raises(BundleError, match="does not exist"):
        read(tmp_path / "none.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(BundleError, match="no tensors by name"):
        read(tmp_path / "list.pth")
