"""Names of tensors in official state dicts: aliases removed on the way in, emitted on the way out.

nnU-Net's blocks register each layer twice (``conv`` and ``all_modules.0``), and its decoders
hold the encoder (``decoder.encoder``), so official files carry a tensor up to four times. Our
own state dicts carry it once, under the first official name.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from medmamba.errors import BundleError

WRAPPER = "module."
"""Put before every name by torch's data-parallel wrappers."""

COMPILED = "_orig_mod."
"""Put into names by ``torch.compile``, wherever a compiled module stands."""

BLOCK = r"(?:convs\.\d+|conv1|conv2|skip\.\d+|transconv)"
"""Places of nnU-Net's convolution block, the one that registers its layers twice."""

OWN_NAME = re.compile(rf"(?P<block>(?:^|.*\.){BLOCK})\.(?P<layer>conv|norm)\.(?P<tensor>\w+)$")
ALIAS = re.compile(rf"(?P<block>(?:^|.*\.){BLOCK})\.all_modules\.(?P<index>[01])\.(?P<tensor>\w+)$")
LAYERS = ("conv", "norm")
"""What ``all_modules`` lists, as long as there is no dropout between."""


def has_aliases(names: Iterable[str]) -> bool:
    """Tell whether a network is of nnU-Net's family, whose tensors have several names."""
    kinds = {name.split(".")[0] + "." for name in names}
    return {"encoder.", "decoder."} <= kinds


def own_name(name: str) -> str:
    """Return the one name that our state dict has for an official name of nnU-Net's family."""
    if name.startswith("decoder.encoder."):
        name = name.removeprefix("decoder.")
    found = ALIAS.match(name)
    if found:
        name = f"{found['block']}.{LAYERS[int(found['index'])]}.{found['tensor']}"
    return name


def official_names(name: str) -> list[str]:
    """Return every official name of a tensor of nnU-Net's family, our own one first."""
    names = [name]
    found = OWN_NAME.match(name)
    if found:
        index = LAYERS.index(found["layer"])
        names.append(f"{found['block']}.all_modules.{index}.{found['tensor']}")
    if name.startswith("encoder."):
        names += [f"decoder.{alias}" for alias in names]
    return names


def without_wrappers(name: str) -> str:
    """Return a name without what data-parallel wrappers and ``torch.compile`` put into it."""
    while name.startswith((WRAPPER, COMPILED)):
        name = name.removeprefix(WRAPPER).removeprefix(COMPILED)
    return name.replace(f".{COMPILED}", ".")


def merge_aliases(state: Mapping[str, Tensor], *, aliased: bool) -> dict[str, Tensor]:
    """Return every tensor once, under our own name.

    Args:
        state: an official state dict.
        aliased: the network is of nnU-Net's family.

    Raises:
        BundleError: two names of one tensor hold different values.
    """
    merged: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for official, tensor in state.items():
        name = without_wrappers(official)
        name = own_name(name) if aliased else name
        if name in merged and not _same(merged[name], tensor):
            raise BundleError(
                f"state dict: {official} and {origin[name]} are names of one tensor but hold "
                "different values. The file is damaged or was edited; export it again.",
                code="E_MODEL_WEIGHTS",
            )
        merged[name] = tensor
        origin[name] = official
    return merged


def _same(first: Tensor, second: Tensor) -> bool:
    # Equal NaNs count as equal: an alias of a diverged network is still an alias.
    return first.shape == second.shape and torch.allclose(
        first, second.to(first), rtol=0.0, atol=0.0, equal_nan=True
    )
