"""Patch and batch size for one spacing: as large as the memory allows, in the data's proportions.

Plain and residual U-Nets are sized by nnU-Net's count of convolution outputs, so that their plans
are nnU-Net's. Any other network is sized by what training it keeps in memory, since that count
knows nothing of scans (for one 8 GB plan U-Mamba-Enc needs 24.9 GB).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from medmamba.errors import PlanError
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.budget import GIB, NetworkRules, PriceList
from medmamba.plans.topology import (
    Topology,
    derive_topology,
    plain_unet_cost,
    residual_unet_cost,
    round_up,
)

SMALLEST_BATCH = 2
"""Instance statistics and batch Dice need more than one sample; nnU-Net's floor."""

FIRST_PATCH_EDGE = {2: 2048, 3: 256}
"""The search starts at the volume of this cube (square), in the proportions of the spacing."""

DEVICE_RESERVE = 0.5
"""GiB of a graphics card that the driver's context takes before the first tensor; an allowance."""
DEVICE_RESERVE_SHARE = 1 / 16
"""At most this part, for budgets that no card has."""

REFERENCE_BATCH = {2: 12, 3: 2}
"""Batch that nnU-Net's reference costs were measured for."""

CPU_PATCH_VOXELS = {2: 512**2, 3: 80**3}
"""Largest patch for training on a CPU, where a step, not memory, is what costs."""

RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)
"""Encoder blocks per stage of nnU-Net's residual-encoder U-Net."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """One of nnU-Net's planners as numbers.

    Args:
        residual: prices a residual-encoder U-Net instead of a plain one.
        plans_name: what nnU-Net calls the plans of this planner.
        memory_gb: the memory its reference costs stand for.
        reference: dimension -> cost of a network that fills that memory.
        dataset_fraction: a batch holds at most this part of the dataset's voxels.
    """

    residual: bool
    plans_name: str
    memory_gb: float
    reference: dict[int, float]
    dataset_fraction: float


NNUNET_PLANNERS: dict[str, CostModel] = {
    "ExperimentPlanner": CostModel(
        residual=False,
        plans_name="nnUNetPlans",
        memory_gb=8,
        reference={2: 85e6, 3: 560e6},
        dataset_fraction=0.05,
    ),
    "ResEncUNetPlanner": CostModel(
        residual=True,
        plans_name="nnUNetResEncUNetPlans",
        memory_gb=8,
        reference={2: 135e6, 3: 680e6},
        dataset_fraction=0.05,
    ),
    "nnUNetPlannerResEncM": CostModel(
        residual=True,
        plans_name="nnUNetResEncUNetMPlans",
        memory_gb=8,
        reference={2: 135e6, 3: 680e6},
        dataset_fraction=1,
    ),
    "nnUNetPlannerResEncL": CostModel(
        residual=True,
        plans_name="nnUNetResEncUNetLPlans",
        memory_gb=24,
        reference={2: 380e6, 3: 2.1e9},
        dataset_fraction=1,
    ),
    "nnUNetPlannerResEncXL": CostModel(
        residual=True,
        plans_name="nnUNetResEncUNetXLPlans",
        memory_gb=40,
        reference={2: 560e6, 3: 3.6e9},
        dataset_fraction=1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be sized.

    Args:
        spacing_mm: of the working grid; two or three values.
        median_shape: median case at that spacing.
        dataset_voxels: voxels of all training cases at that spacing.
        spec: the network's name, channels, mixer and options; sizes are filled in here.
        voxel_limit: largest patch, or None.
    """

    spacing_mm: tuple[float, ...]
    median_shape: tuple[int | float, ...]
    dataset_voxels: float
    spec: NetworkSpec
    voxel_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Patch, batch and network that fit.

    Args:
        fill: estimated cost of the batch as a fraction of the budget.
        memory_bytes: estimated training memory; None under nnU-Net's cost model.
        shrunk: steps taken down from the first patch.
        capped: the batch would have been larger but for the size of the dataset.
    """

    spec: NetworkSpec
    batch_size: int
    fill: float
    memory_bytes: int | None
    shrunk: int
    capped: bool


@dataclass(frozen=True, kw_only=True)
class _Layout:
    patch_size: tuple[int, ...]
    divisor: tuple[int, ...]
    spec: NetworkSpec
    topology: Topology


def size_by_cost(request: Request, model: CostModel, *, memory_gb: float, classes: int) -> Sizes:
    """Size a plain or residual U-Net by nnU-Net's cost model.

    Args:
        request: what is to be sized.
        model: the planner's numbers.
        memory_gb: memory to plan for.
        classes: entries of the dataset's ``labels``, which is what nnU-Net counts.
    """
    dimension = len(request.spacing_mm)
    reference = model.reference[dimension] * (memory_gb / model.memory_gb)
    batch = REFERENCE_BATCH[dimension]

    def cost(layout: _Layout) -> int:
        if model.residual:
            return residual_unet_cost(layout.topology, classes=classes, blocks=RESIDUAL_BLOCKS)
        return plain_unet_cost(layout.topology, classes=classes)

    def layout_of(patch: tuple[float, ...]) -> _Layout:
        topology = derive_topology(request.spacing_mm, patch)
        return _Layout(
            patch_size=topology.patch_size,
            divisor=topology.divisor,
            spec=_fill(request.spec, topology),
            topology=topology,
        )

    for steps, layout in enumerate(_shrinking(request, layout_of)):  # noqa: B007
        estimate = cost(layout)
        # The residual planners compare the cost itself; the plain one lets 2D batches shrink first.
        weighed = estimate if model.residual else estimate / batch * SMALLEST_BATCH
        if weighed <= reference and _is_within(layout, request.voxel_limit):
            break
    batch_size, capped = _batch(
        round(reference / estimate * batch), request, layout, model.dataset_fraction
    )
    return Sizes(
        spec=layout.spec,
        batch_size=batch_size,
        fill=estimate / batch * batch_size / reference,
        memory_bytes=None,
        shrunk=steps,
        capped=capped,
    )


def size_by_memory(
    request: Request,
    rules: NetworkRules,
    prices: PriceList,
    *,
    memory_gb: float,
    dataset_fraction: float,
    confirm: bool,
) -> Sizes:
    """Size any network by the memory that training it needs.

    Args:
        request: what is to be sized.
        rules: constraints of the network.
        prices: of the network; shared by all calls for one plan.
        memory_gb: memory to plan for.
        dataset_fraction: a batch holds at most this part of the dataset's voxels.
        confirm: price what was found exactly, and go on shrinking where the estimate was too low.

    Raises:
        PlanError: no patch fits the memory.
    """
    layouts = _buildable(
        list(_shrinking(request, lambda patch: _arranged(request, rules, patch))), request, rules
    )
    budget = memory_gb * GIB
    if request.voxel_limit is None:
        budget -= min(DEVICE_RESERVE, memory_gb * DEVICE_RESERVE_SHARE) * GIB

    def fits(index: int) -> bool:
        return prices.estimate(layouts[index].spec).of(SMALLEST_BATCH) <= budget

    chosen = _first_that_fits(_first_below_limit(layouts, request.voxel_limit), len(layouts), fits)
    price = prices.exact if confirm else prices.estimate
    while chosen < len(layouts) and price(layouts[chosen].spec).of(SMALLEST_BATCH) > budget:
        chosen += 1
    if chosen == len(layouts):
        least = prices.exact(layouts[-1].spec).of(SMALLEST_BATCH) / GIB
        raise PlanError(
            f"network '{request.spec.name}': its smallest patch "
            f"{list(layouts[-1].patch_size)} needs {least:.1f} GB, the budget is {memory_gb:g} GB. "
            "Give more memory with --gpu-memory or choose a smaller network.",
            code="E_PLAN_MEMORY",
        )
    cost = price(layouts[chosen].spec)
    wanted = int((budget - cost.fixed_bytes) // cost.bytes_per_sample)
    batch_size, capped = _batch(wanted, request, layouts[chosen], dataset_fraction)
    if confirm:
        batch_size, memory = _confirmed(prices, layouts[chosen].spec, batch_size, budget)
    else:
        memory = cost.of(batch_size)
    return Sizes(
        spec=layouts[chosen].spec,
        batch_size=batch_size,
        fill=memory / budget,
        memory_bytes=memory,
        shrunk=chosen,
        capped=capped,
    )


def _confirmed(
    prices: PriceList, spec: NetworkSpec, batch_size: int, budget: float
) -> tuple[int, int]:
    """Return the largest batch up to one that was extrapolated which fits, and its memory."""
    memory = prices.memory(spec, batch_size)
    while memory > budget and batch_size > SMALLEST_BATCH:
        smaller = min(batch_size - 1, int(batch_size * budget / memory))
        batch_size = max(SMALLEST_BATCH, smaller)
        memory = prices.memory(spec, batch_size)
    return batch_size, memory


def _buildable(layouts: list[_Layout], request: Request, rules: NetworkRules) -> list[_Layout]:
    """Return the layouts with as many resolutions as the network needs; small patches have fewer.

    Raises:
        PlanError: none has.
    """
    enough = [layout for layout in layouts if len(layout.spec.strides) >= rules.fewest_stages]
    if not enough:
        largest = layouts[0]
        raise PlanError(
            f"network '{request.spec.name}': it needs {rules.fewest_stages} resolutions, but a "
            f"patch of {list(largest.patch_size)} from a median case of "
            f"{list(request.median_shape)} has {len(largest.spec.strides)}. Choose another network "
            "or a finer --spacing."
        )
    return enough


def first_patch(
    spacing_mm: tuple[float, ...], median_shape: tuple[int | float, ...]
) -> tuple[float, ...]:
    """Return the patch the search starts from: physically cubic, no larger than the median case."""
    dimension = len(spacing_mm)
    density = 1 / np.array(spacing_mm)
    volume = FIRST_PATCH_EDGE[dimension] ** dimension
    edges = density * (volume / np.prod(density)) ** (1 / dimension)
    return tuple(
        min(round(float(edge)), size) for edge, size in zip(edges, median_shape, strict=True)
    )


def _shrinking(
    request: Request, layout_of: Callable[[tuple[float, ...]], _Layout]
) -> Iterator[_Layout]:
    """Yield ever smaller layouts: the axis largest in relation to the median case gives way."""
    layout = layout_of(first_patch(request.spacing_mm, request.median_shape))
    seen: set[tuple[int, ...]] = set()
    # A patch comes back when padding to the divisor undoes a step; nothing smaller exists then.
    while layout.patch_size not in seen:
        seen.add(layout.patch_size)
        yield layout
        patch = list(layout.patch_size)
        ratios = [edge / size for edge, size in zip(patch, request.median_shape, strict=True)]
        axis = next(
            (int(a) for a in np.argsort(ratios)[::-1] if patch[a] > layout.divisor[a]), None
        )
        if axis is None:
            return
        # One step is the divisor of the patch one step down: 256 goes to 224 and not to 192.
        trial = list(patch)
        trial[axis] -= layout.divisor[axis]
        patch[axis] -= layout_of(tuple(trial)).divisor[axis]
        layout = layout_of(tuple(patch))


def _arranged(request: Request, rules: NetworkRules, patch: tuple[float, ...]) -> _Layout:
    """Fit topology and patch to each other: the network's divisor may pad the patch further."""
    topology = derive_topology(request.spacing_mm, patch)
    for _ in range(topology.stages + 1):
        spec = rules.arrange(_fill(request.spec, topology))
        divisor = rules.divisor(spec)
        rounded = round_up(patch, divisor)
        spec = replace(spec, patch_size=rounded)
        again = derive_topology(request.spacing_mm, rounded)
        if again.strides == topology.strides:
            break
        topology = again
    return _Layout(patch_size=rounded, divisor=divisor, spec=spec, topology=topology)


def _fill(spec: NetworkSpec, topology: Topology) -> NetworkSpec:
    stages = topology.stages
    residual = spec.name == "resenc_unet"
    return replace(
        spec,
        patch_size=topology.patch_size,
        features=topology.features,
        strides=topology.strides,
        kernel_sizes=topology.kernel_sizes,
        encoder_blocks=RESIDUAL_BLOCKS[:stages] if residual else (2,) * stages,
        decoder_blocks=(1 if residual else 2,) * (stages - 1),
    )


def _batch(
    wanted: int, request: Request, layout: _Layout, dataset_fraction: float
) -> tuple[int, bool]:
    patch_voxels = np.prod(layout.patch_size, dtype=np.float64)
    cap = round(float(request.dataset_voxels * dataset_fraction / patch_voxels))
    return max(min(wanted, cap), SMALLEST_BATCH), cap < wanted


def _first_below_limit(layouts: list[_Layout], limit: int | None) -> int:
    small = (i for i, layout in enumerate(layouts) if _is_within(layout, limit))
    return next(small, len(layouts) - 1)


def _is_within(layout: _Layout, limit: int | None) -> bool:
    return limit is None or prod(layout.patch_size) <= limit


def _first_that_fits(start: int, stop: int, fits: Callable[[int], bool]) -> int:
    """Bisect, since memory falls along the way; ``stop`` where nothing fits."""
    low, high = start, stop
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return low
