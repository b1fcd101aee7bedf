"""A network over an image larger than its patch: tiles, flips, weighted mean of logits.

Owns the arithmetic and its memory; which device, precision and batch to use is the caller's choice
(``predictor``). Where tiles lie is decided in ``tiling``.

Shapes: C image channels, K network outputs, (d, h, w) the working grid, P flips, T tiles, (h', w')
or (d', h', w') the patch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.inference.tiling import flip_sets, importance_map, padding_to, tile_origins

TileProgress = Callable[[int, int], None]
"""Called after every batch with (tiles done, tiles in all); may raise to abandon the image."""

CPU_BATCH_VOXELS = 2**16
"""Voxels a CPU processes at once: activations of larger batches leave its caches. Measured with
plain_unet and lightm_unet_s on 3D patches of 90 000 voxels, plain_unet on slices of 3 000."""

CUDA_LIVE_FEATURE_MAPS = 12
"""Copies of the widest feature map that a forward pass holds at once, workspace included."""

CUDA_MEMORY_SHARE = 0.5
"""Share of the device's memory that tile batches may fill; the rest holds the accumulators."""

MAX_TILE_BATCH = 64


def tile_batch_size(
    patch_size: Sequence[int],
    *,
    features: int,
    device_class: str,
    memory_bytes: int | None = None,
) -> int:
    """Return how many inputs to run at once, from the model and the device alone.

    The same model on the same class of device always gets the same answer, so that results do not
    depend on what else the machine is doing.

    Args:
        patch_size: voxels per axis of one input.
        features: channels at the highest resolution.
        device_class: ``cpu`` or ``cuda``.
        memory_bytes: memory of the device; needed for ``cuda``.
    """
    voxels = prod(patch_size)
    if device_class == "cpu" or memory_bytes is None:
        return max(1, min(MAX_TILE_BATCH, CPU_BATCH_VOXELS // voxels))
    per_input = voxels * features * torch.float32.itemsize * CUDA_LIVE_FEATURE_MAPS
    return max(1, min(MAX_TILE_BATCH, int(memory_bytes * CUDA_MEMORY_SHARE) // per_input))


def predict_logits(
    network: nn.Module,
    image: Tensor,
    *,
    patch_size: tuple[int, ...],
    mirror_axes: tuple[int, ...] = (),
    step: float = 0.5,
    tile_batch: int = 1,
    compat: bool = False,
    autocast: torch.dtype | None = None,
    device: torch.device | None = None,
    accumulate_on: torch.device | None = None,
    on_tiles: TileProgress | None = None,
) -> Tensor:
    """Return the logits of a whole image, (K, d, h, w), float32 (fp16 in compat mode).

    Args:
        network: in evaluation mode, on ``device``.
        image: (C, d, h, w) float32.
        patch_size: two sizes for a network that sees slices, else three.
        mirror_axes: axes of the patch whose flips are averaged.
        step: largest distance of neighbouring tiles, in patches.
        tile_batch: inputs (tiles times flips) per forward pass.
        compat: accumulate in fp16 in nnU-Net's order of operations, to the same labels.
        autocast: reduced precision of the forward passes; accumulation stays float32.
        device: where the network is; that of the image when omitted.
        accumulate_on: where the result is summed; the device when omitted.
        on_tiles: progress.
    """
    device = device or image.device
    padding = padding_to(tuple(image.shape[1:]), patch_size)
    edges = [edge for pair in reversed(padding) for edge in pair]
    padded = functional.pad(image, edges) if any(edges) else image
    shape = tuple(padded.shape[1:])
    origins = tile_origins(shape, patch_size, step)
    flips = flip_sets(mirror_axes)
    per_pass = max(1, tile_batch // len(flips))
    dtype = torch.float16 if compat else torch.float32
    sums = _Accumulator(shape, patch_size, dtype=dtype, device=accumulate_on or device)
    with torch.inference_mode(), _precision(device, autocast):
        for first in range(0, len(origins), per_pass):
            chosen = origins[first : first + per_pass]
            tiles = torch.stack([_cut(padded, at, patch_size) for at in chosen])
            logits = _mirrored(network, tiles.to(device), flips, batch=tile_batch, half=compat)
            for origin, tile in zip(chosen, logits, strict=True):
                sums.add(origin, tile)
            if on_tiles is not None:
                on_tiles(first + len(chosen), len(origins))
        result = sums.mean()
    starts = [before for before, _ in padding]
    inner = [slice(low, low + size) for low, size in zip(starts, image.shape[1:], strict=True)]
    return result[(slice(None), *inner)]


class _Accumulator:
    """Weighted sums of overlapping tiles, divided as soon as no later tile can reach a slab.

    Tiles come with ascending first index, so weights are needed for as many planes as one tile
    has, however long the image is.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        patch_size: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        importance = torch.from_numpy(importance_map(patch_size).copy())
        # A tile of a 2D network is a slab of one plane.
        self._slab = (1,) * (len(shape) - len(patch_size)) + patch_size
        self._importance = importance.to(device=device, dtype=dtype).view(self._slab)
        self._shape = shape
        self._start = 0
        self._weights = torch.zeros((self._slab[0], *shape[1:]), dtype=dtype, device=device)
        self._logits: Tensor | None = None

    def add(self, origin: tuple[int, ...], tile: Tensor) -> None:
        """Add one tile of logits (K, *patch)."""
        if self._logits is None:
            self._logits = self._weights.new_zeros((tile.shape[0], *self._shape))
        self._finish(origin[0])
        tile = tile.to(self._weights.device).reshape(-1, *self._slab)
        region = _region(origin, self._slab)
        # The product is rounded only when it is added, also in compat mode, as nnU-Net does.
        self._logits[(slice(None), *region)] += tile * self._importance
        self._weights[(slice(None), *region[1:])] += self._importance

    def mean(self) -> Tensor:
        """Return the weighted mean, in place of the sums."""
        assert self._logits is not None
        self._finish(self._shape[0])
        return self._logits

    def _finish(self, until: int) -> None:
        """Divide the planes before ``until``, and move the weights on to it."""
        count = until - self._start
        if count == 0:
            return
        assert self._logits is not None
        self._logits[:, self._start : until] /= self._weights[:count]
        self._weights = torch.cat([self._weights[count:], torch.zeros_like(self._weights[:count])])
        self._start = until


def _mirrored(
    network: nn.Module,
    tiles: Tensor,
    flips: tuple[tuple[int, ...], ...],
    *,
    batch: int,
    half: bool,
) -> Tensor:
    """Mean logits over flips, (T, K, *patch); several flips share a pass where ``batch`` allows.

    They are summed in float32, or with ``half`` in whatever autocast gives, as nnU-Net does.
    """
    count = tiles.shape[0]
    flips_per_pass = max(1, batch // count)
    total: Tensor | None = None
    for first in range(0, len(flips), flips_per_pass):
        chosen = [_spatial(axes) for axes in flips[first : first + flips_per_pass]]
        inputs = torch.cat([tiles.flip(axes) if axes else tiles for axes in chosen])
        outputs = _highest_resolution(network(inputs))
        parts = torch.split(outputs if half else outputs.float(), count)
        for axes, output in zip(chosen, parts, strict=True):
            straight = output.flip(axes) if axes else output
            total = straight if total is None else total.add_(straight)
    assert total is not None
    return total.div_(len(flips)) if len(flips) > 1 else total


def _highest_resolution(output: Tensor | Sequence[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _spatial(axes: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a patch as axes of a batch of inputs (T, C, *patch)."""
    return tuple(axis + 2 for axis in axes)


def _region(origin: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Index of a tile: whole numbers for the slice axis of a 2D network, slices for the rest."""
    extra = len(origin) - len(patch_size)
    spans = zip(origin[extra:], patch_size, strict=True)
    return (*origin[:extra], *(slice(start, start + size) for start, size in spans))


def _cut(image: Tensor, origin: tuple[int, ...], patch_size: tuple[int, ...]) -> Tensor:
    return image[(slice(None), *_region(origin, patch_size))]


def _precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    if dtype is None or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
