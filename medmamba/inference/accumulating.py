"""Weighted sums of overlapping tiles of logits, as deep as one tile, whatever the image's length.

Shapes: K network outputs, (d, h, w) the working grid, (h', w') or (d', h', w') the patch.
"""

import torch
from torch import Tensor

from medmamba.inference.tiling import importance_map


class Accumulator:
    """Weighted sums of overlapping tiles, as deep as one tile.

    Tiles come with ascending first index, so planes before the current one are final.
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
        self._weights = torch.zeros((self._slab[0], *shape[1:]), dtype=dtype, device=device)
        self._logits: Tensor | None = None

    def add(self, origin: tuple[int, ...], tile: Tensor) -> None:
        """Add one tile of logits (K, *patch) that begins at the first plane that is not final."""
        if self._logits is None:
            self._logits = self._weights.new_zeros((tile.shape[0], *self._weights.shape))
        tile = tile.to(self._weights.device).reshape(-1, *self._slab)
        region = (slice(None), *_region(origin, self._slab)[1:])
        # The product is rounded only when it is added, also in compat mode, as nnU-Net does.
        self._logits[(slice(None), *region)] += tile * self._importance
        self._weights[region] += self._importance

    @property
    def plane_bytes(self) -> int:
        """Memory of one plane of logits."""
        assert self._logits is not None
        return self._logits[:, 0].nbytes

    def mean(self, first: int, last: int) -> Tensor:
        """Return planes, counted from the first that is kept."""
        assert self._logits is not None
        return self._logits[:, first:last] / self._weights[first:last]

    def forget(self, count: int) -> None:
        """Let the first ``count`` planes go; what follows moves to their place."""
        assert self._logits is not None
        for sums, axis in ((self._logits, 1), (self._weights, 0)):
            size = sums.shape[axis]
            # Plane by plane, since source and target overlap.
            for plane in range(count, size):
                sums.select(axis, plane - count).copy_(sums.select(axis, plane))
            sums.narrow(axis, size - count, count).zero_()


def _region(origin: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Index of a tile: whole numbers for the slice axis of a 2D network, slices for the rest."""
    extra = len(origin) - len(patch_size)
    spans = zip(origin[extra:], patch_size, strict=True)
    return (*origin[:extra], *(slice(start, start + size) for start, size in spans))
