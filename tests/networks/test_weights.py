"""Weights on disk: round trip, equal bytes, and errors that name tensors."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from medmamba.errors import BundleError
from medmamba.networks.tensor_file import load_metadata
from medmamba.networks.weights import load_exactly, load_weights, save_weights


def test_round_trip_keeps_values_types_and_metadata(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = {"a": shared, "b": shared, "c": torch.ones(2, dtype=torch.bfloat16), "d": shared.t()}
    save_weights(tmp_path / "w.safetensors", state, {"plan": "é", "fold": "0"})
    loaded = load_weights(tmp_path / "w.safetensors")
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in state.items())
    assert load_metadata(tmp_path / "w.safetensors") == {"plan": "é", "fold": "0"}


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    state = {f"t{i}": torch.full((i + 1,), float(i)) for i in range(8)}
    metadata = {f"key{i}": str(i) for i in range(8)}
    save_weights(tmp_path / "first", state, metadata)
    save_weights(tmp_path / "second", dict(reversed(state.items())), metadata)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere\.safetensors"):
        load_weights(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a tensor file at all", b"\x80\x04\x95pickle"])
def test_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(BundleError, match="cannot be read"):
        load_weights(tmp_path / "w")


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"a": torch.zeros(1000)})
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:-100])
    with pytest.raises(BundleError, match="cannot be read"):
        load_weights(tmp_path / "w")


def test_load_exactly_names_every_kind_of_mismatch() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = module[1].weight.detach().clone()
    state = {
        "0.weight": torch.zeros(3, 2),
        "0.bias": torch.zeros(4),
        "1.weight": torch.zeros(1, 3),
        "ghost": torch.zeros(1),
    }
    with pytest.raises(BundleError) as caught:
        load_exactly(module, state)
    message = str(caught.value)
    assert "1 missing (1.bias)" in message
    assert "1 unexpected (ghost)" in message
    assert "0.bias [4] instead of [3]" in message
    assert torch.equal(module[1].weight, before)


def test_load_exactly_copies_values() -> None:
    module = nn.Linear(2, 3)
    state = {"weight": torch.full((3, 2), 2.0), "bias": torch.ones(3)}
    load_exactly(module, state)
    assert torch.equal(module.weight, state["weight"])
    assert torch.equal(module.bias, state["bias"])


def test_others_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    earlier = os.umask(0o022)
    try:
        save_weights(tmp_path / "w.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(earlier)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == 0o644
