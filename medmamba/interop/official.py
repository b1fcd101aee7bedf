"""The official networks: built from their own constructor arguments, filled from their own files.

What the arguments mean is ``official_constructor.py``'s, names of tensors are
``official_keys.py``'s, reading of files is ``checkpoint.py``'s.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from medmamba.interop.official_constructor import Constructor, is_supervised, read_constructor
from medmamba.interop.official_keys import has_aliases, merge_aliases, official_names
from medmamba.networks import build_network
from medmamba.networks.weights import load_exactly


def build(network: str, constructor: Constructor) -> nn.Module:
    """Build a network as an official class would be built.

    Args:
        network: name of the official class.
        constructor: its arguments as plain values; classes by their names.

    Raises:
        BundleError: an unknown class, or an argument with a value we do not compute.
        PlanError: sizes that do not belong together.
    """
    module = build_network(read_constructor(network, constructor))
    module.deep_supervision = is_supervised(constructor)  # type: ignore[assignment]
    return module


def load_official_state(
    module: nn.Module, state: Mapping[str, Tensor], *, what: str = "official state dict"
) -> None:
    """Fill a module from an official state dict, under whichever names its tensors have.

    Accepted besides the plain names: ``all_modules`` and ``decoder.encoder`` aliases, and the
    prefixes ``module.`` and ``_orig_mod.``.

    Args:
        module: the network to fill.
        state: tensors by official names.
        what: how messages call the state dict.

    Raises:
        BundleError: naming tensors that are missing, unexpected, misshapen or contradictory.
    """
    aliased = has_aliases(module.state_dict())
    load_exactly(module, merge_aliases(state, aliased=aliased), what=what)


def official_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that the official class loads, every alias included."""
    own = module.state_dict()
    if not has_aliases(own):
        return dict(own)
    return {alias: tensor for name, tensor in own.items() for alias in official_names(name)}
