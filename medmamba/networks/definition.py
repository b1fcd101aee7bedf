"""What the registry says about a network, and the checks every network shares. No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medmamba.errors import PlanError
from medmamba.networks.spec import NetworkSpec, OptionValue

if TYPE_CHECKING:
    from torch import nn


def keep(spec: NetworkSpec) -> NetworkSpec:
    """Take the plan's topology as it is."""
    return spec


def total_stride(spec: NetworkSpec) -> tuple[int, ...]:
    """Multiple a patch must have when every stage halves exactly: the product of strides."""
    return spec.total_stride


@dataclass(frozen=True, kw_only=True)
class NetworkDefinition:
    """One row of ``NETWORKS``.

    Args:
        build: makes the module, with fresh weights, from a spec.
        dimensions: 2 and 3, as far as the network exists there.
        source: paper or code the network comes from.
        summary: one line for people.
        arrange: from a spec that holds the plan's topology (features, strides, kernels, blocks) to
            the one this network builds.
        divisor: required multiple of the patch size per axis.
        fewest_stages: resolutions it needs at least.
        has_twins: whether it has Mamba layers that a twin does without.
    """

    build: Callable[[NetworkSpec], "nn.Module"]
    dimensions: frozenset[int]
    source: str
    summary: str
    arrange: Callable[[NetworkSpec], NetworkSpec] = keep
    divisor: Callable[[NetworkSpec], tuple[int, ...]] = total_stride
    fewest_stages: int = 2
    has_twins: bool = True


def read_options(spec: NetworkSpec, defaults: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """Return ``defaults`` overlaid with the spec's own options.

    Raises:
        PlanError: the spec holds an option this network does not have.
    """
    unknown = sorted(set(spec.options) - set(defaults))
    if unknown:
        known = ", ".join(sorted(defaults)) or "none"
        raise PlanError(
            f"network {spec.name}: it has no option {unknown[0]!r} "
            f"(found {spec.options[unknown[0]]!r}). Its options: {known}."
        )
    return {**defaults, **spec.options}


def require(condition: bool, spec: NetworkSpec, problem: str) -> None:
    """Refuse a spec that a network cannot be built from.

    Args:
        condition: what must hold.
        spec: the spec that is checked.
        problem: the value found and what to do, appended to the network's name.

    Raises:
        PlanError: ``condition`` is false.
    """
    if not condition:
        raise PlanError(f"network {spec.name}: {problem}")


def check_spec(spec: NetworkSpec) -> None:
    """Check that the lists of a spec belong together.

    Raises:
        PlanError: naming the list, its length and the length needed.
    """
    lengths = {
        "strides": (len(spec.strides), spec.stages),
        "kernel_sizes": (len(spec.kernel_sizes), spec.stages),
        "encoder_blocks": (len(spec.encoder_blocks), spec.stages),
        "decoder_blocks": (len(spec.decoder_blocks), spec.stages - 1),
    }
    for name, (found, needed) in lengths.items():
        require(
            found == needed, spec, f"{name} has {found} entries, {needed} needed. Plan it again."
        )
    for name, rows in (("strides", spec.strides), ("kernel_sizes", spec.kernel_sizes)):
        for row in rows:
            require(
                len(row) == spec.dimension and min(row) >= 1,
                spec,
                f"{name} holds {list(row)}, {spec.dimension} positive numbers needed.",
            )
