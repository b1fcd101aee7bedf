"""Probabilities on disk: an array (K, D, H, W) written box by box, as labels are restored.

Of a blosc2 array, compressed planes are written one by one, so that neither the file in the making
nor memory holds more of a case than the file in the end. A NumPy archive, as nnU-Net writes it, is
an uncompressed file until it is finished.
"""

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import blosc2  # noqa: TID251
import numpy as np
from numpy.typing import NDArray

from medmamba.volume import Geometry

ProbabilityKind = Literal["none", "float16", "uint8", "npz"]
PROBABILITY_KINDS: tuple[ProbabilityKind, ...] = get_args(ProbabilityKind)


PACKED_AT_ONCE = 1 << 20

FULL_SCALE = 255
"""What a probability of 1 is in uint8."""


class ProbabilityFile:
    """Probabilities of one case in the making.

    Args:
        path: where to write; a name that nobody takes for a finished file.
        names: of the classes or regions, in order.
        geometry: grid of the image as networks were given it.
        kind: ``float16``, or ``uint8`` for multiples of 1/255.
        along: axis (D, H, W) along which boxes arrive.
        background_first: whether voxels that no box covers are background, channel 0.
    """

    def __init__(
        self,
        path: Path,
        *,
        names: Sequence[str],
        geometry: Geometry,
        kind: ProbabilityKind,
        along: int,
        background_first: bool,
    ) -> None:
        self.path = path
        self._kind = np.dtype(kind)
        shape = geometry.shape
        plane = tuple(1 if axis == along else size for axis, size in enumerate(shape))
        self._array = blosc2.zeros(
            (len(names), *shape),
            dtype=self._kind,
            urlpath=str(path),
            mode="w",
            chunks=(1, *plane),
            # One thread, or the order of blocks, and so the bytes, would change between runs.
            cparams=blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1),
        )
        if background_first:
            one = FULL_SCALE if kind == "uint8" else 1
            for index in range(shape[along]):
                self._array[_at(0, index, along)] = np.full(plane, one, self._kind)
        meta: dict[str, Any] = {
            "labels": list(names),
            "affine": [list(row) for row in geometry.affine],
            "scale": 1 / FULL_SCALE if kind == "uint8" else 1.0,
        }
        for key, value in meta.items():
            self._array.schunk.vlmeta[key] = value

    def write(self, box: tuple[slice, ...], probabilities: NDArray[np.float32]) -> None:
        """Store the probabilities (K, ...) in a box of the grid."""
        if self._kind == np.uint8:
            stored = np.rint(probabilities * FULL_SCALE).astype(np.uint8)
        else:
            stored = probabilities.astype(self._kind)
        self._array[(slice(None), *box)] = stored

    def finish(self) -> None:
        """Do nothing: every box is in its place."""


class ProbabilityArchive:
    """Probabilities of one case as nnU-Net keeps them: float32, ``probabilities`` in an archive.

    Args:
        path: where to write; a name that nobody takes for a finished file.
        shape: classes or regions, then voxels (D, H, W).
        background_first: whether voxels that no box covers are background, channel 0.
    """

    def __init__(self, path: Path, *, shape: tuple[int, ...], background_first: bool) -> None:
        self.path = path
        self._array: np.memmap[Any, np.dtype[np.float32]] | None = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.float32, shape=shape
        )
        if background_first:
            self._array[0] = 1

    def write(self, box: tuple[slice, ...], probabilities: NDArray[np.float32]) -> None:
        """Store the probabilities (K, ...) in a box of the grid."""
        assert self._array is not None
        self._array[(slice(None), *box)] = probabilities

    def finish(self) -> None:
        """Pack the array; the same probabilities give the same bytes."""
        self._array = None
        packed = self.path.with_name(f"{self.path.name}-packed")
        try:
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                entry = zipfile.ZipInfo("probabilities.npy")
                entry.compress_type = zipfile.ZIP_DEFLATED
                with self.path.open("rb") as raw, archive.open(entry, "w", force_zip64=True) as to:
                    shutil.copyfileobj(raw, to, PACKED_AT_ONCE)
            packed.replace(self.path)
        finally:
            packed.unlink(missing_ok=True)


def _at(channel: int, index: int, along: int) -> tuple[Any, ...]:
    place: list[Any] = [slice(None)] * 3
    place[along] = slice(index, index + 1)
    return (channel, *place)
