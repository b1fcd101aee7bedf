"""How many stages a U-shaped network gets, where it pools, and nnU-Net's price of it.

Rules of Isensee et al. 2021 (nnU-Net), supplementary note 2, as its version 2 applies them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod

SMALLEST_FEATURE_EDGE = 4
"""No axis of a feature map is pooled below this."""

SIMILAR_SPACING = 2.0
"""Axes whose spacings differ by less are pooled together and share 3-wide kernels."""

BASE_FEATURES = 32
LARGEST_FEATURES = {2: 512, 3: 320}

Axes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Stages of a U-shaped network for one patch.

    Args:
        strides: per stage, per axis; all ones first.
        kernel_sizes: per stage, per axis.
        patch_size: the patch, rounded up to what the strides divide.
        divisor: multiple of the patch per axis.
    """

    strides: tuple[Axes, ...]
    kernel_sizes: tuple[Axes, ...]
    patch_size: Axes
    divisor: Axes

    @property
    def stages(self) -> int:
        """Number of resolutions."""
        return len(self.strides)

    @property
    def features(self) -> tuple[int, ...]:
        """Channels per stage: doubled at each pooling, up to a limit per dimension."""
        largest = LARGEST_FEATURES[len(self.patch_size)]
        return tuple(min(largest, BASE_FEATURES * 2**stage) for stage in range(self.stages))


def derive_topology(spacing_mm: tuple[float, ...], patch_size: tuple[float, ...]) -> Topology:
    """Pool every axis as long as it is long enough and not much coarser than the others."""
    spacing, size = list(spacing_mm), list(patch_size)
    axes = range(len(spacing))
    kernel = [1] * len(spacing)
    divisor = [1] * len(spacing)
    strides: list[Axes] = [(1,) * len(spacing)]
    kernels: list[Axes] = []
    while pooled := _poolable(spacing, size):
        for axis in axes:
            if spacing[axis] / min(spacing) < SIMILAR_SPACING:
                kernel[axis] = 3
        # The kernels of a stage are chosen before its pooling changes the spacing.
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in pooled else 1 for axis in axes))
        for axis in pooled:
            divisor[axis] *= 2
            spacing[axis] *= 2
            size[axis] = ceil(size[axis] / 2)
    kernels.append((3,) * len(spacing))
    return Topology(
        strides=tuple(strides),
        kernel_sizes=tuple(kernels),
        patch_size=round_up(patch_size, tuple(divisor)),
        divisor=tuple(divisor),
    )


def round_up(patch_size: tuple[float, ...], divisor: Axes) -> Axes:
    """Return the smallest multiple of ``divisor`` that holds the patch, per axis."""
    return tuple(
        int(ceil(edge / multiple) * multiple)
        for edge, multiple in zip(patch_size, divisor, strict=True)
    )


def plain_unet_cost(topology: Topology, *, classes: int, convolutions: int = 2) -> int:
    """Count the elements that the convolutions of a plain U-Net write for one sample."""
    features, voxels = topology.features, list(_stage_voxels(topology))
    cost = sum(convolutions * width * size for width, size in zip(features, voxels, strict=True))
    decoder = zip(features[:-1], voxels[:-1], strict=True)
    cost += sum((convolutions + 1) * width * size for width, size in decoder)
    return cost + classes * voxels[0]


def residual_unet_cost(topology: Topology, *, classes: int, blocks: tuple[int, ...]) -> int:
    """Count the elements that a residual-encoder U-Net writes for one sample.

    Args:
        topology: the stages.
        classes: segmentation channels of the highest resolution, the only one counted.
        blocks: residual blocks per encoder stage; decoder steps have one convolution.
    """
    features, voxels = topology.features, list(_stage_voxels(topology))
    cost = features[0] * voxels[0]
    before = features[0]
    for stage, (width, size) in enumerate(zip(features, voxels, strict=True)):
        projected = before != width or prod(topology.strides[stage]) > 1
        cost += (2 * blocks[stage] + projected) * width * size
        before = width
    cost += sum(2 * width * size for width, size in zip(features[:-1], voxels[:-1], strict=True))
    return cost + classes * voxels[0]


def _poolable(spacing: list[float], size: list[float]) -> list[int]:
    long_enough = [axis for axis, edge in enumerate(size) if edge >= 2 * SMALLEST_FEATURE_EDGE]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    chosen = [axis for axis in long_enough if spacing[axis] / finest < SIMILAR_SPACING]
    if len(chosen) == 1 and size[chosen[0]] < 3 * SMALLEST_FEATURE_EDGE:
        return []
    return chosen


def _stage_voxels(topology: Topology) -> Iterator[int]:
    size = topology.patch_size
    for stride in topology.strides:
        size = tuple(edge // step for edge, step in zip(size, stride, strict=True))
        yield prod(size)
