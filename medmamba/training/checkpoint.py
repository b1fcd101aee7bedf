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
from medmamba.files import RECORD_CONFIG, from_plain, to_plain
from medmamba.networks.weights import load_metadata, load_weights, save_weights
from medmamba.training.optimization import WeightAverage

CHECKPOINT_VERSION = 1
LATEST = "checkpoint_latest.safetensors"
BEST = "checkpoint_best.safetensors"

_NETWORK, _OPTIMIZER, _AVERAGE = "network.", "optimizer.", "average."
_STATE_KEY = "state"


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run is, but for its tensors.

    Args:
        identity: name and hashes of what the run is about; all must match on resuming.
        epoch, steps: finished epochs, and steps of the one that was begun.
        iteration: optimiser steps asked for since the start; the number of the next batch.
        losses: of the steps of the begun epoch.
        elapsed_s: time of training in all processes so far.
        ema_dice, best_dice: smoothed validation Dice, now and at its best; None before the first.
        validation_batches: settled number of validation batches; None before the first epoch.
        log_bytes: length of log.jsonl that belongs to this state.
        scaler: state of the fp16 gradient scaler.
        bad_steps: consecutive steps that were skipped.
        length: the schedule's length in words, for comparing and for people.
        finished: the schedule ended.
    """

    __pydantic_config__ = RECORD_CONFIG

    version: int = CHECKPOINT_VERSION
    identity: dict[str, str]
    epoch: int = 0
    steps: int = 0
    iteration: int = 0
    losses: tuple[float, ...] = ()
    elapsed_s: float = 0.0
    dice: float | None = None
    ema_dice: float | None = None
    best_dice: float | None = None
    validation_batches: int | None = None
    log_bytes: int = 0
    scaler: dict[str, float] | None = None
    bad_steps: int = 0
    length: str = ""
    finished: bool = False


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
    save_weights(path, tensors, {_STATE_KEY: record})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    state = load_state(path)
    return Checkpoint(state=state, tensors=_read(path))


def load_state(path: Path) -> RunState:
    """Read where the run was, without its tensors.

    Raises:
        CheckpointError: it is missing, damaged, or of another version.
    """
    try:
        metadata = load_metadata(path)
        values = json.loads(metadata[_STATE_KEY])
    except BundleError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({error}). Start the run again, or copy it again."
        ) from error
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} holds no state of a run ({error!r}). It is not a checkpoint of "
            "medmamba train."
        ) from error
    found = values.get("version") if isinstance(values, dict) else None
    if found != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {found}; this medmamba reads {CHECKPOINT_VERSION}. "
            "Finish the run with the version that began it."
        )
    return from_plain(RunState, values, what=f"checkpoint {path}", error=CheckpointError)


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
