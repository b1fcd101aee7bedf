"""A network over an image larger than its patch: tiles, flips, weighted mean of logits.

Owns the arithmetic and its memory; which device, precision and batch to use is the caller's choice
(``predictor``). Where tiles lie is decided in ``tiling``.

Shapes: C image channels, K network outputs, (d, h, w) the working grid, P flips, T tiles, (h', w')
or (d', h', w') the patch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.inference.accumulating import Accumulator
from medmamba.inference.passes import mean_logits
from medmamba.inference.tiling import flip_sets, padding_to, tile_origins
from medmamba.inference.votes import Votes

TileProgress = Callable[[int, int], None]
"""Called after every batch with (tiles done, tiles in all); may raise to abandon the image."""

CPU_BATCH_VOXELS = 2**16
"""Voxels a CPU processes at once: activations of larger batches leave its caches. Measured with
plain_unet on slices of 2 240 voxels: the same time from 21 to 42 at once, a fifth more at 64."""

CPU_PAIR_VOXELS = 2**18
"""Up to here a CPU takes two larger inputs at once, not one: weights are brought into the layout of
the products half as often, and torch leaves single float32 inputs of few voxels to a convolution
several times slower than oneDNN's. 3D patches of 90 000 voxels, processor time of two against one:
plain_unet 0.86 (fp32), 0.93 (bf16), resenc_unet 0.77, 0.87, lightm_unet_s 0.91, 0.94."""

CUDA_LIVE_FEATURE_MAPS = 12
"""Copies of the widest feature map that a forward pass holds at once, workspace included."""

CUDA_MEMORY_SHARE = 0.5
"""Share of the device's memory that tile batches may fill; the rest holds the accumulators."""

MAX_TILE_BATCH = 64

EMITTED_BYTES = 1 << 26
"""Planes of logits handed out at once, unless a single plane is larger."""

MOST_CONSTANT_TILES = 4
"""Values, such as that of air, whose tiles are remembered; each takes the logits of one tile."""


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
        least = 2 if 2 * voxels <= CPU_PAIR_VOXELS else 1
        return max(least, min(MAX_TILE_BATCH, CPU_BATCH_VOXELS // voxels))
    per_input = voxels * features * torch.float32.itemsize * CUDA_LIVE_FEATURE_MAPS
    return max(1, min(MAX_TILE_BATCH, int(memory_bytes * CUDA_MEMORY_SHARE) // per_input))


@dataclass(frozen=True, kw_only=True, eq=False)
class TileSource:
    """The image that tiles are cut from, with labels of an earlier network as further channels.

    Labels become one channel per value in each tile alone, or they would take many times the
    memory of the image.

    Args:
        image: (C, d, h, w) float32.
        labels: (d, h, w) integers; None for no further channels.
        values: of labels that get a channel, in order.
    """

    image: Tensor
    labels: Tensor | None = None
    values: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels (d, h, w)."""
        return tuple(self.image.shape[1:])

    def cut(
        self,
        origin: tuple[int, ...],
        patch_size: tuple[int, ...],
        padding: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """Return one tile (C, *patch), zeros where it reaches over a smaller image."""
        extra = len(origin) - len(patch_size)
        at: list[int | slice] = list(origin[:extra])
        edges: list[int] = []
        for start, patch, size, (before, _) in zip(
            origin[extra:], patch_size, self.shape[extra:], padding[extra:], strict=True
        ):
            low, high = start - before, start - before + patch
            at.append(slice(max(0, low), min(size, high)))
            edges = [max(0, -low), max(0, high - size), *edges]
        tile = self.image[(slice(None), *at)]
        if self.labels is not None:
            found = self.labels[tuple(at)]
            channels = [(found == value).to(tile.dtype) for value in self.values]
            tile = torch.cat([tile, torch.stack(channels)])
        return functional.pad(tile, edges) if any(edges) else tile


def predict_logits(network: nn.Module, image: Tensor, **options: Any) -> Tensor:
    """Return the logits of a whole image, (K, d, h, w), float32 (fp16 in compat mode).

    Args:
        network: in evaluation mode, on the device.
        image: (C, d, h, w) float32.
        options: those of `PlaneStream`.
    """
    stream = PlaneStream([network], TileSource(image=image), **options)
    return torch.cat([planes for _, planes in stream], dim=1)


class PlaneStream:
    """Mean logits of an image from its first plane to its last, handed out as they become final.

    Iterating gives ascending (first plane, planes (K, n, h, w)); float32, or fp16 in compat mode.
    Memory does not grow with the length of the image: what is summed up is as deep as one tile.

    Args:
        networks: in evaluation mode, on ``device``; their logits are averaged.
        source: the image.
        patch_size: two sizes for networks that see slices, else three.
        mirror_axes: axes of the patch whose flips are averaged.
        step: largest distance of neighbouring tiles, in patches.
        tile_batch: inputs (tiles times flips) per forward pass.
        compat: accumulate in fp16 in nnU-Net's order of operations, to the same labels.
        autocast: reduced precision of the forward passes; accumulation stays float32.
        device: where the networks are; that of the image when omitted.
        accumulate_on: where the result is summed; the device when omitted.
        on_tiles: progress.
        reuse_constant: compute tiles of one single value (air, outside) once per value.
        votes: counts what flips and networks said apart from each other, on computed tiles.

    Attributes:
        tiles: how many there are.
        reused: how many of them were not computed because an equal one had been.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        source: TileSource,
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
        reuse_constant: bool = True,
        votes: Votes | None = None,
    ) -> None:
        self._source = source
        self._patch = patch_size
        self._padding = padding_to(source.shape, patch_size)
        self._shape = tuple(
            size + sum(pair) for size, pair in zip(source.shape, self._padding, strict=True)
        )
        self._device = device or source.image.device
        self._origins = tile_origins(self._shape, patch_size, step)
        flips = flip_sets(mirror_axes)
        self._per_pass = max(1, tile_batch // len(flips))
        passes = len(flips) * len(networks)
        self._run = partial(
            mean_logits, networks, flips=flips, batch=tile_batch, half=compat,
            votes=votes if passes > 1 else None,
        )  # fmt: skip
        self._autocast = autocast
        self._on_tiles = on_tiles
        self._reuse = reuse_constant
        # nnU-Net rounds each network's mean before it averages networks.
        self._sums = [
            Accumulator(
                self._shape,
                patch_size,
                dtype=torch.float16 if compat else torch.float32,
                device=accumulate_on or self._device,
            )
            for _ in range(len(networks) if compat else 1)
        ]
        self._constant: dict[bytes, list[Tensor]] = {}
        self._done = 0
        self.tiles = len(self._origins)
        self.reused = 0

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for first in range(0, self.tiles, self._per_pass):
            chosen = self._origins[first : first + self._per_pass]
            outputs = self._logits(chosen)
            for origin, tiles in zip(chosen, outputs, strict=True):
                yield from self._advance(origin[0])
                for sums, tile in zip(self._sums, tiles, strict=True):
                    sums.add(origin, tile)
            if self._on_tiles is not None:
                self._on_tiles(first + len(chosen), self.tiles)
        yield from self._advance(self._shape[0])

    # Without gradients step by step: a generator must not leave a mode behind where it pauses.
    @torch.inference_mode()
    def _logits(self, origins: Sequence[tuple[int, ...]]) -> list[list[Tensor]]:
        """Per tile the logits to add up, one per accumulator."""
        tiles = [self._source.cut(origin, self._patch, self._padding) for origin in origins]
        keys = [_constant_key(tile) if self._reuse else None for tile in tiles]
        known = [None if key is None else self._constant.get(key) for key in keys]
        fresh = [tile for tile, found in zip(tiles, known, strict=True) if found is None]
        self.reused += len(tiles) - len(fresh)
        computed: Iterator[list[Tensor]] = iter(())
        if fresh:
            with _precision(self._device, self._autocast):
                computed = iter(self._run(torch.stack(fresh).to(self._device)))
        outputs = []
        for key, found in zip(keys, known, strict=True):
            output = next(computed) if found is None else found
            if key is not None and len(self._constant) < MOST_CONSTANT_TILES:
                self._constant.setdefault(key, [part.clone() for part in output])
            outputs.append(output)
        return outputs

    def _advance(self, until: int) -> Iterator[tuple[int, Tensor]]:
        """Take the planes before ``until`` from the accumulators, a few at a time."""
        if until == self._done:
            return
        before, after = self._padding[0]
        start, stop = max(self._done, before), min(until, self._shape[0] - after)
        for first in range(start, stop, self._planes_at_once):
            last = min(first + self._planes_at_once, stop)
            yield first - before, self._mean(first - self._done, last - self._done)
        with torch.inference_mode():
            for sums in self._sums:
                sums.forget(until - self._done)
        self._done = until

    @property
    def _planes_at_once(self) -> int:
        return max(1, EMITTED_BYTES // self._sums[0].plane_bytes)

    @torch.inference_mode()
    def _mean(self, first: int, last: int) -> Tensor:
        """Mean over networks of the planes from ``first`` on that are summed up, unpadded."""
        total: Tensor | None = None
        for sums in self._sums:
            planes = sums.mean(first, last)
            total = planes if total is None else total.add_(planes)
        assert total is not None
        if len(self._sums) > 1:
            total = total.div_(len(self._sums))
        rows, columns = (
            slice(before, size - after)
            for size, (before, after) in zip(self._shape[1:], self._padding[1:], strict=True)
        )
        return total[:, :, rows, columns]


def _constant_key(tile: Tensor) -> bytes | None:
    """The values of a tile that has only one per channel; None for any other tile."""
    flat = tile.reshape(tile.shape[0], -1)
    # Three voxels tell most tiles apart without a look at the rest.
    if not torch.equal(flat[:, 0], flat[:, -1]) or flat[0, 0] != flat[0, flat.shape[1] // 2]:
        return None
    low, high = torch.aminmax(flat, dim=1)
    return low.cpu().numpy().tobytes() if torch.equal(low, high) else None


def _precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    if dtype is None or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
