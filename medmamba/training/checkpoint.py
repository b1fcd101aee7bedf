"""The state of a run in one safetensors file: written whole or not at all, loaded without pickle.

Tensors are named ``network.<key>``, ``optimizer.<parameter>.<key>`` and ``average.<key>``; what is
not a tensor is a JSON record in the file's metadata. Random states are not stored: every random
number follows from (seed, iteration).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medmamba.errors import BundleError, CheckpointError
from medmamba.files import to_plain
from medmamba.networks.weights import load_weights, save_weights
from medmamba.training.optimization import WeightAverage
from medmamba.training.run_files import STATE_KEY, RunState, load_state

_NETWORK, _OPTIMIZER, _AVERAGE = "network.", "optimizer.", "average."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint file holds."""

    state: RunState
    tensors: Mapping[str, Tensor]


def save_checkpoint(
    path: Path,
    state: RunState,
    *,
    network: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: WeightAverage | None,
) -> None:
    """Write a checkpoint atomically.

    Args:
        path: of the file.
        state: everything but tensors.
        network: its parameters and buffers are stored.
        optimizer: left out of checkpoints that only serve prediction.
        average: mean of the weights, where the recipe keeps one.

    Raises:
        EnvironmentFault: the folder cannot be written; the previous file is kept.
    """
    tensors = {_NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    if average is not None:
        tensors |= {_AVERAGE + name: tensor for name, tensor in average.tensors.items()}
    if optimizer is not None:
        for name, parameter in network.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{name}.{key}"] = value
    record = json.dumps(to_plain(state), allow_nan=True)
    save_weights(path, tensors, {STATE_KEY: record})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    state = load_state(path)
    return Checkpoint(state=state, tensors=_read(path))


def require_identity(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Refuse a checkpoint of another network, plan, split or seed.

    Raises:
        CheckpointError: naming what differs, both values.
    """
    for key in {**found, **expected}:
        if found.get(key) != expected.get(key):
            raise CheckpointError(
                f"checkpoint {path}: its {key} is '{found.get(key)}', this run's is "
                f"'{expected.get(key)}'. "
                f"Resume with the same {key}, or train into another folder."
            )


def restore_network(network: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Fill a network.

    Raises:
        CheckpointError: a tensor is missing, superfluous, or of another shape.
    """
    try:
        network.load_state_dict(_part(checkpoint, _NETWORK))
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(
            f"checkpoint {path} does not fit the network: {first} Use the plan it was made with."
        ) from error


def restore_optimizer(
    optimizer: torch.optim.Optimizer, network: nn.Module, checkpoint: Checkpoint
) -> None:
    """Fill an optimiser's state, in the memory format of the parameters."""
    stored = _part(checkpoint, _OPTIMIZER)
    for name, parameter in network.named_parameters():
        values: dict[str, Tensor] = {}
        for full, tensor in stored.items():
            owner, _, key = full.rpartition(".")
            if owner != name:
                continue
            if tensor.shape == parameter.shape:
                values[key] = torch.empty_like(parameter).copy_(tensor)
            else:
                values[key] = tensor.to(parameter.device)
        if values:
            optimizer.state[parameter] = values


def restore_average(average: WeightAverage, checkpoint: Checkpoint) -> None:
    """Fill the mean of the weights."""
    stored = _part(checkpoint, _AVERAGE)
    for name, tensor in average.tensors.items():
        tensor.copy_(stored[name])


def prediction_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights to predict with: the mean of the weights where there is one.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """
    checkpoint = load_checkpoint(path)
    return _part(checkpoint, _AVERAGE) or _part(checkpoint, _NETWORK)


def _part(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_weights(path)
    except BundleError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error}).") from error
