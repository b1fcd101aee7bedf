"""What a plan may cost: the memory it is made for, and how the price of a network is found."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from medmamba.files import RECORD_CONFIG, hash_values
from medmamba.networks.spec import NetworkSpec

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the user asks of the planner.

    Args:
        memory_gb: memory of the device to train on; the planner's reference when None.
        spacing_mm: target spacing (z, y, x) of the raw images instead of the dataset's median.
        device: ``cpu`` bounds the patch by time too, since there memory is not what is scarce.
        planner: nnU-Net planner whose rules apply instead of the preset's.
    """

    __pydantic_config__ = RECORD_CONFIG

    memory_gb: float | None = None
    spacing_mm: tuple[float, ...] | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    planner: str | None = None


@dataclass(frozen=True, kw_only=True)
class Price:
    """Memory to train a network: weights and optimiser, and what each sample of a batch adds."""

    fixed_bytes: int
    bytes_per_sample: int

    def of(self, batch_size: int) -> int:
        """Return the bytes of a batch."""
        return self.fixed_bytes + batch_size * self.bytes_per_sample


@dataclass(frozen=True, kw_only=True)
class NetworkRules:
    """What the planner must know of a network that is no plain U-Net.

    Args:
        dimensions: 2 and 3, as far as the network exists there.
        arrange: from a spec with the plan's topology to the network's own.
        divisor: required multiple of the patch per axis.
        price: memory needed to train a spec.
        fewest_stages: resolutions the network needs at least.
    """

    dimensions: frozenset[int]
    arrange: Callable[[NetworkSpec], NetworkSpec]
    divisor: Callable[[NetworkSpec], tuple[int, ...]]
    price: Callable[[NetworkSpec], Price]
    fewest_stages: int = 2


class PriceList:
    """Prices asked for once each; a patch of a known architecture is estimated by its voxels.

    What a network keeps grows with the voxels of its patch as long as its stages stay the same, so
    a search needs one price per architecture, and a second one to confirm what it found.
    """

    def __init__(self, rules: NetworkRules) -> None:
        self._price = rules.price
        self._exact: dict[str, Price] = {}
        self._known: dict[str, tuple[int, Price]] = {}

    def exact(self, spec: NetworkSpec) -> Price:
        """Return the price of exactly this spec."""
        key = hash_values(spec)
        if key not in self._exact:
            self._exact[key] = self._price(spec)
        return self._exact[key]

    def estimate(self, spec: NetworkSpec) -> Price:
        """Return the price, scaled from another patch of the same architecture where known."""
        voxels = prod(spec.patch_size)
        architecture = hash_values(replace(spec, patch_size=(0,) * spec.dimension))
        if architecture not in self._known:
            self._known[architecture] = (voxels, self.exact(spec))
        known_voxels, price = self._known[architecture]
        per_sample = round(price.bytes_per_sample * voxels / known_voxels)
        return replace(price, bytes_per_sample=per_sample)


def registered_rules(network: str, *, bf16: bool, optimizer_states: int) -> NetworkRules:
    """Take the rules of a network from the registry, priced by what autograd would keep.

    Args:
        network: key of the registry.
        bf16: price training under bfloat16 autocast.
        optimizer_states: values the optimiser keeps per parameter.

    Raises:
        PlanError: there is no network of that name.
    """
    # Torch is needed to price, and only to price.
    from medmamba.networks.memory import training_cost
    from medmamba.networks.registry import find_network

    definition = find_network(network)

    def price(spec: NetworkSpec) -> Price:
        cost = training_cost(spec, 1, bf16=bf16)
        # Whatever a sample keeps, a batch keeps that many times.
        per_sample = cost.activations + cost.workspace
        fixed = cost.total(optimizer_states) - per_sample
        return Price(fixed_bytes=fixed, bytes_per_sample=per_sample)

    return NetworkRules(
        dimensions=definition.dimensions,
        arrange=definition.arrange,
        divisor=definition.divisor,
        price=price,
        fewest_stages=definition.fewest_stages,
    )
