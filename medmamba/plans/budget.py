"""What a plan may cost: the memory it is made for, and how the price of a network is found."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from medmamba.files import RECORD_CONFIG, hash_values
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.training.recipe import TrainingRecipe

GIB = 1024**3

PRICED_BATCHES = (2, 4)
"""A batch has 2 samples at least; from these two sizes larger ones are extrapolated."""


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
        memory: bytes needed to train a spec with a batch of some size.
        fewest_stages: resolutions the network needs at least.
    """

    dimensions: frozenset[int]
    arrange: Callable[[NetworkSpec], NetworkSpec]
    divisor: Callable[[NetworkSpec], tuple[int, ...]]
    memory: Callable[[NetworkSpec, int], int]
    fewest_stages: int = 2


class PriceList:
    """Prices asked for once each; a patch of a known architecture is estimated by its voxels.

    What a network keeps grows with the voxels of its patch as long as its stages stay the same, so
    a search needs one price per architecture, and a second one to confirm what it found.
    """

    def __init__(self, rules: NetworkRules) -> None:
        self.memory = rules.memory
        self._exact: dict[str, Price] = {}
        self._known: dict[str, tuple[int, Price]] = {}

    def exact(self, spec: NetworkSpec) -> Price:
        """Return the price of exactly this spec, from the memory of two batches."""
        key = hash_values(spec)
        if key not in self._exact:
            least, more = (self.memory(spec, batch) for batch in PRICED_BATCHES)
            per_sample = max(1, (more - least) // (PRICED_BATCHES[1] - PRICED_BATCHES[0]))
            fixed = least - PRICED_BATCHES[0] * per_sample
            self._exact[key] = Price(fixed_bytes=fixed, bytes_per_sample=per_sample)
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


def registered_rules(
    network: str, recipe: TrainingRecipe, label_map: LabelMap, *, on_gpu: bool
) -> NetworkRules:
    """Take the rules of a network from the registry, priced by what a training step holds.

    Args:
        network: key of the registry.
        recipe: how it is trained.
        label_map: what it is trained on.
        on_gpu: price training on a GPU under bfloat16 autocast, else on a CPU in float32.

    Raises:
        PlanError: there is no network of that name.
    """
    # Torch is needed to price, and only to price.
    from medmamba.networks.registry import find_network
    from medmamba.training.step_memory import StepConditions, step_memory

    definition = find_network(network)
    conditions = StepConditions(recipe=recipe, label_map=label_map, on_gpu=on_gpu)
    return NetworkRules(
        dimensions=definition.dimensions,
        arrange=definition.arrange,
        divisor=definition.divisor,
        memory=lambda spec, batch_size: step_memory(spec, batch_size, conditions),
        fewest_stages=definition.fewest_stages,
    )
