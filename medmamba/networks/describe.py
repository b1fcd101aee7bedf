"""The table of networks that people compare before they choose: sizes, costs, constraints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from medmamba.networks.memory import activation_bytes_per_voxel, count_parameters, operations
from medmamba.networks.registry import NETWORKS, find_network
from medmamba.networks.spec import NetworkSpec

OPERATIONS_FORMULA = (
    "2 per multiply-add of convolutions and matrix products, plus 9 L d N per scan direction "
    "(L tokens, d inner channels, N states); norms, activations, sums and the causal convolution, "
    "8 L d, left out"
)
"""What the operations of a row count; one forward pass over one patch."""

REFERENCE_PATCH = {2: 512, 3: 128}
"""Edge of the patch that rows are computed for: nnU-Net's usual sizes on an 8 GB budget."""

REFERENCE_STAGES = {2: 8, 3: 6}
"""Resolutions nnU-Net plans for those patches with isotropic spacing."""

WIDEST = {2: 512, 3: 320}
FIRST_FEATURES = 32
REFERENCE_CLASSES = 2


@dataclass(frozen=True, kw_only=True)
class NetworkRow:
    """A network in one dimension, for one image channel and two classes.

    Args:
        operations: per patch and forward pass; see ``OPERATIONS_FORMULA``.
        activation_bytes_per_voxel: kept for backward under bfloat16 autocast, per patch voxel.
        patch_multiple: what the patch size must be a multiple of, per axis.
    """

    name: str
    dimension: int
    parameters: int
    patch_size: tuple[int, ...]
    operations: int
    activation_bytes_per_voxel: float
    patch_multiple: tuple[int, ...]
    source: str
    summary: str


def describe_networks(names: Sequence[str] | None = None) -> tuple[NetworkRow, ...]:
    """Return one row per network and dimension, computed on the reference patch.

    Args:
        names: networks to describe; all when omitted.

    Raises:
        PlanError: a name that is not registered.
    """
    chosen = sorted(NETWORKS) if names is None else names
    return tuple(row for name in chosen for row in _rows(name))


def reference_spec(name: str, dimension: int) -> NetworkSpec:
    """Return a network as planned for the reference patch with isotropic spacing.

    Raises:
        PlanError: the name is not registered.
    """
    stages = REFERENCE_STAGES[dimension]
    planned = NetworkSpec(
        name=name,
        in_channels=1,
        out_channels=REFERENCE_CLASSES,
        patch_size=(REFERENCE_PATCH[dimension],) * dimension,
        features=tuple(min(FIRST_FEATURES * 2**s, WIDEST[dimension]) for s in range(stages)),
        strides=((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
        kernel_sizes=((3,) * dimension,) * stages,
        encoder_blocks=(2,) * stages,
        decoder_blocks=(2,) * (stages - 1),
    )
    return find_network(name).arrange(planned)


def _rows(name: str) -> Iterator[NetworkRow]:
    definition = find_network(name)
    for dimension in sorted(definition.dimensions):
        spec = reference_spec(name, dimension)
        yield NetworkRow(
            name=name,
            dimension=dimension,
            parameters=count_parameters(spec),
            patch_size=spec.patch_size,
            operations=operations(spec),
            activation_bytes_per_voxel=activation_bytes_per_voxel(spec),
            patch_multiple=definition.divisor(spec),
            source=definition.source,
            summary=definition.summary,
        )
