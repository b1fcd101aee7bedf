"""ImageNet start: from a file of VMamba-T weights to what a run begins with."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.errors import BundleError, UsageError
from medmamba.files import hash_file, to_plain
from medmamba.training.start import Start

if TYPE_CHECKING:
    from torch import Tensor, nn

MODES = ("exact", "corrected")

TOP_KEYS = ("model", "state_dict", "network_weights")
"""Where trainers put a state dict in their files; VMamba's under the first."""

SAFETENSORS = ".safetensors"
NAMES_SHOWN = 4


def pretrained_start(
    path: Path,
    *,
    mode: str = "exact",
    frozen_epochs: int | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Start:
    """Return the start that VMamba-T weights give a Swin-UMamba.

    Args:
        path: ``.pth`` file as released, or the same tensors as ``.safetensors``.
        mode: ``exact`` loads what the official loader loads; ``corrected`` leaves out the norm
            bias that it loads, through a typo, without the norm's weight.
        frozen_epochs: epochs for which the encoder stays fixed; None is a hundredth of the run, at
            most 10, as in the official schedule.
        on_message: called with what became of the file's tensors.

    Raises:
        UsageError: there is no such mode.
        SecurityError: the file holds more than data; nothing of it was run.
        BundleError: the file is missing, damaged or holds no tensors.
    """
    from medmamba.networks.pretrained import frozen_parameters

    if mode not in MODES:
        raise UsageError(f"pretrained mode '{mode}': choose one of {', '.join(MODES)}.")
    state = read_tensors(path)

    def fill(network: "nn.Module") -> dict[str, Any]:
        return _fill(network, state, mode, path, on_message)

    return Start(
        source=path.name,
        identity=(hash_file(path), mode),
        fill=fill,
        frozen=frozen_parameters,
        frozen_epochs=frozen_epochs,
    )


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a state dict from a foreign ``.pth`` or a ``.safetensors`` file.

    Raises:
        SecurityError: the file holds more than data; nothing of it was run.
        BundleError: the file is missing, damaged or holds no tensors.
    """
    from torch import Tensor

    from medmamba.interop.pickle_reader import read_foreign_pickle
    from medmamba.networks.weights import load_weights

    if path.suffix.lower() == SAFETENSORS:
        return load_weights(path)
    content = read_foreign_pickle(path)
    for key in TOP_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = content.items() if isinstance(content, Mapping) else ()
    wrong = [name for name, value in tensors if not isinstance(value, Tensor)]
    if not tensors or wrong:
        found = f"{wrong[0]!r}, which is no tensor" if wrong else "no tensors by name"
        raise BundleError(
            f"pretrained weights {path}: holds {found}. Give VMamba-T's released file "
            "(vssmtiny_dp01_ckpt_epoch_292.pth), or its tensors as safetensors."
        )
    return {str(name): value for name, value in tensors}


def _fill(
    network: "nn.Module",
    state: "Mapping[str, Tensor]",
    mode: str,
    path: Path,
    say: Callable[[str], None] | None,
) -> dict[str, Any]:
    from medmamba.networks.pretrained import start_from_vmamba

    report = start_from_vmamba(network, state, mode=mode)  # type: ignore[arg-type]
    if say is not None:
        say(f"pretrained {path.name}: {report.summary}")
        for reason, names in report.skipped_by_reason.items():
            more = ", ..." if len(names) > NAMES_SHOWN else ""
            say(f"  {len(names)} skipped, {reason}: {', '.join(names[:NAMES_SHOWN])}{more}")
    return {"file": path.name, **to_plain(report)}
