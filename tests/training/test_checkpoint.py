"""Checkpoints hold everything, are whole or absent, and refuse what they are not."""

import os
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from medmamba.errors import CheckpointError, EnvironmentFault
from medmamba.training import run_files
from medmamba.training.checkpoint import (
    load_checkpoint,
    prediction_weights,
    restore_average,
    restore_network,
    restore_optimizer,
    save_checkpoint,
)
from medmamba.training.optimization import WeightAverage, make_optimizer
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.run_files import RunState, load_state

STATE = RunState(identity={"network": "n"}, epoch=3, iteration=12, losses=(0.5, 0.25), ema_dice=0.7)


def network_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 1))


def trained(optimizer: str, seed: int = 0):
    network = network_of(seed).to(memory_format=torch.channels_last_3d)
    recipe = TrainingRecipe(batch_size=1, optimizer=optimizer)
    rule = make_optimizer(network, recipe)
    for _ in range(2):
        rule.zero_grad()
        network(torch.randn(1, 2, 5, 5, 5)).square().sum().backward()
        rule.step()
    return network, rule


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_next_step_after_a_restore_is_the_same(tmp_path: Path, optimizer: str) -> None:
    path = tmp_path / "c.safetensors"
    network, rule = trained(optimizer)
    average = WeightAverage(network, 0.9)
    save_checkpoint(path, STATE, network=network, optimizer=rule, average=average)
    other, other_rule = trained(optimizer, seed=1)
    other_average = WeightAverage(other, 0.9)
    found = load_checkpoint(path)
    assert found.state == STATE
    restore_network(other, found, path)
    restore_optimizer(other_rule, other, found)
    restore_average(other_average, found)
    data = torch.randn(1, 2, 5, 5, 5)
    for net, opt, mean in ((network, rule, average), (other, other_rule, other_average)):
        opt.zero_grad()
        net(data).square().sum().backward()
        opt.step()
        mean.update(net, 3)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert torch.equal(average.tensors[name], other_average.tensors[name]), name


def test_prediction_takes_the_mean_of_the_weights_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    network = network_of(0)
    save_checkpoint(path, STATE, network=network, optimizer=None, average=None)
    assert torch.equal(prediction_weights(path)["0.weight"], network[0].weight)
    average = WeightAverage(network_of(1), 0.9)
    save_checkpoint(path, STATE, network=network, optimizer=None, average=average)
    assert torch.equal(prediction_weights(path)["0.weight"], average.tensors["0.weight"])


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, STATE, network=network_of(0), optimizer=None, average=None)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        save_checkpoint(path, STATE, network=network_of(1), optimizer=None, average=None)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_from_the_text_of_safetensors(tmp_path: Path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("medmamba.networks.weights.save_file", full)
    with pytest.raises(EnvironmentFault, match=r"the disk is full .* Make room") as caught:
        save_checkpoint(
            tmp_path / "c.safetensors", STATE, network=network_of(0), optimizer=None, average=None
        )
    assert caught.value.code == "E_IO_NOSPACE"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_a_disk_that_fills_up_while_writing_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "c.safetensors"
    save_checkpoint(path, STATE, network=network_of(0), optimizer=None, average=None)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match="File too large") as caught:
            save_checkpoint(path, STATE, network=network_of(1), optimizer=None, average=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "E_IO_WRITE"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        load_state(tmp_path / "missing.safetensors")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="junk"):
        load_checkpoint(junk)
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, STATE, network=network_of(0), optimizer=None, average=None)
    with pytest.raises(CheckpointError, match=r"does not fit the network"):
        restore_network(nn.Conv3d(2, 4, 3), load_checkpoint(path), path)
    monkeypatch.setattr(run_files, "CHECKPOINT_VERSION", 2)
    with pytest.raises(CheckpointError, match="version 1"):
        load_state(path)
