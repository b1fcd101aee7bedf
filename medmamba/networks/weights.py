"""The door to safetensors, and loading of weights that must fit exactly."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors  # noqa: TID251
from safetensors.torch import save_file  # noqa: TID251
from torch import Tensor, nn

from medmamba.errors import BundleError
from medmamba.files import replace_atomic
from medmamba.networks.tensor_file import METADATA_KEY

NAMES_SHOWN = 5
"""Tensors named per kind of mismatch; the rest are counted."""


def save_weights(
    path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically; equal tensors and metadata give equal bytes.

    Tensors that share memory are written one by one.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.untyped_storage().data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
    text = json.dumps(dict(metadata or {}), sort_keys=True, ensure_ascii=False)
    replace_atomic(path, lambda temporary: _save_file(tensors, temporary, text))


def _save_file(tensors: dict[str, Tensor], path: Path, text: str) -> None:
    # safetensors makes files that only their owner can read, whatever the umask says.
    path.touch()
    mode = path.stat().st_mode & 0o777
    try:
        save_file(tensors, path, {METADATA_KEY: text})
    except safetensors.SafetensorError as error:
        # It is the library's own kind of error, which names the system's in its text alone.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else 0, str(error)) from error
    path.chmod(mode)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file to the CPU.

    Raises:
        BundleError: the file is missing, truncated or no safetensors file.
    """
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], *, what: str = "weights") -> None:
    """Copy ``state`` into ``module``, which must have exactly its names and shapes.

    Args:
        module: the network to fill.
        state: one tensor per parameter and buffer.
        what: how the message names the source of ``state``.

    Raises:
        BundleError: naming missing, unexpected and misshapen tensors.
    """
    own = module.state_dict()
    problems = [
        _list_names("missing", [name for name in own if name not in state]),
        _list_names("unexpected", [name for name in state if name not in own]),
        _list_names(
            "of another shape",
            [
                f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
                for name, tensor in own.items()
                if name in state and state[name].shape != tensor.shape
            ],
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise BundleError(
            f"{what}: tensors do not fit the network: {'; '.join(found)}. "
            "Use the plan that these weights were trained with.",
            code="E_MODEL_WEIGHTS",
        )
    module.load_state_dict(dict(state))


def require_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights of a training that had diverged.

    Raises:
        BundleError: naming the first tensor with NaN or infinity.
    """
    bad = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if bad:
        raise BundleError(
            f"{what}: tensor '{bad[0]}' holds NaN or infinity ({len(bad)} tensors in all). "
            "Training had diverged; use an earlier checkpoint.",
            code="E_MODEL_WEIGHTS",
        )


def _list_names(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:NAMES_SHOWN])}{more})"


def _open(path: Path) -> "safetensors.safe_open":
    try:
        return safetensors.safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise BundleError(f"weights {path} do not exist.") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise BundleError(
            f"weights {path} cannot be read ({error}). Copy the file again, or train again.",
            code="E_MODEL_WEIGHTS",
        ) from error
