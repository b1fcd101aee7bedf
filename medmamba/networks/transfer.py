"""Weights of one trained network as the beginning of another: what fits, what is made anew.

Which tensors are heads or stems is read off the network itself: they are those whose shape
changes with the number of outputs or of image channels. No names are listed anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medmamba.errors import BundleError
from medmamba.networks.registry import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.weights import require_finite

NAMES_SHOWN = 4

UNKNOWN_TENSOR = "this network has no such tensor"


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """What became of every tensor, of the source and of the network.

    Args:
        loaded: names of tensors taken as they are.
        inflated: names of first layers whose weights were spread over another number of channels.
        remade: names of tensors of the network that start fresh, with the reason.
        skipped: names of tensors of the source that were not used, with the reason.
    """

    loaded: tuple[str, ...]
    inflated: tuple[str, ...]
    remade: Mapping[str, str]
    skipped: Mapping[str, str]

    @property
    def lines(self) -> list[str]:
        """The report for people: a summary, then one line per reason."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        parts += [f"{len(self.inflated)} inflated"] if self.inflated else []
        parts += [f"{len(self.remade)} made anew", f"{len(self.skipped)} skipped"]
        lines = [", ".join(parts)]
        for word, names in (("made anew", self.remade), ("skipped", self.skipped)):
            for reason in dict.fromkeys(names.values()):
                mine = [name for name, found in names.items() if found == reason]
                lines.append(f"  {len(mine)} {word}, {reason}: {_shorten(mine)}")
        return lines


def heads_of(spec: NetworkSpec) -> frozenset[str]:
    """Return the names of tensors whose shape depends on the number of outputs."""
    return _changing(spec, replace(spec, out_channels=spec.out_channels + 1))


def stems_of(spec: NetworkSpec) -> frozenset[str]:
    """Return the names of tensors whose shape depends on the number of image channels."""
    return _changing(spec, replace(spec, in_channels=spec.in_channels + 1))


def transfer(
    network: nn.Module,
    spec: NetworkSpec,
    state: Mapping[str, Tensor],
    *,
    new_heads: str = "",
    what: str = "weights",
) -> TransferReport:
    """Fill a network from the weights of another one of the same form.

    First layers may see another number of channels: each of theirs gets the mean of the given
    ones, scaled to the same response. Everything else must fit.

    Args:
        network: to fill; unchanged where this raises.
        spec: what it was built from.
        state: tensors under this network's names.
        new_heads: why the heads start fresh; empty to take them over.
        what: how messages name the source.

    Raises:
        BundleError: tensors are missing, of another shape, or not finite; names them.
    """
    own = network.state_dict()
    fresh = heads_of(spec) if new_heads else frozenset[str]()
    stems = stems_of(spec)
    filled: dict[str, Tensor] = {}
    inflated: list[str] = []
    problems: dict[str, list[str]] = {"missing": [], "of another shape": []}
    for name, target in own.items():
        if name in fresh:
            continue
        if name not in state:
            problems["missing"].append(name)
        elif state[name].shape == target.shape:
            filled[name] = state[name]
        elif name in stems and (axis := _channel_axis(state[name], target)) is not None:
            filled[name] = _inflate(state[name], target, axis)
            inflated.append(name)
        else:
            shapes = f"{list(state[name].shape)} instead of {list(target.shape)}"
            problems["of another shape"].append(f"{name} {shapes}")
    _refuse(problems, what)
    require_finite({name: state[name] for name in filled}, what)
    network.load_state_dict(filled, strict=False)
    return TransferReport(
        loaded=tuple(name for name in filled if name not in inflated),
        inflated=tuple(inflated),
        remade=dict.fromkeys((name for name in own if name in fresh), new_heads),
        skipped={
            name: new_heads if name in fresh else UNKNOWN_TENSOR
            for name in state
            if name not in filled
        },
    )


def _changing(spec: NetworkSpec, other: NetworkSpec) -> frozenset[str]:
    with torch.device("meta"):
        first, second = (build_network(one).state_dict() for one in (spec, other))
    return frozenset(
        name
        for name, tensor in first.items()
        if name not in second or second[name].shape != tensor.shape
    )


def _channel_axis(given: Tensor, target: Tensor) -> int | None:
    """Return the one axis in which two tensors of a first layer differ: inputs, or one a channel.

    A convolution has its inputs in axis 1; a depthwise one has a filter per channel in axis 0.
    """
    if given.dim() != target.dim():
        return None
    pairs = enumerate(zip(given.shape, target.shape, strict=True))
    axes = [axis for axis, (found, needed) in pairs if found != needed]
    return axes[0] if len(axes) == 1 and axes[0] < 2 else None


def _inflate(given: Tensor, target: Tensor, axis: int) -> Tensor:
    # Inputs are summed, so that each of more gets less; channels that are kept apart are not.
    scale = given.shape[1] / target.shape[1] if axis == 1 else 1.0
    return (given.mean(axis, keepdim=True) * scale).expand(target.shape)


def _refuse(problems: Mapping[str, list[str]], what: str) -> None:
    found = [
        f"{len(names)} {kind} ({_shorten(names)})" for kind, names in problems.items() if names
    ]
    if found:
        raise BundleError(
            f"{what}: tensors do not fit this network: {'; '.join(found)}. Nothing was loaded. "
            "Give a model of the same network and form, or train the network as that model has "
            "it with --init-form.",
            code="E_MODEL_WEIGHTS",
        )


def _shorten(names: list[str]) -> str:
    more = ", ..." if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
