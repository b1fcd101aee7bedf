"""What a model says of its synthetic image in float32, small enough to travel with it. No torch."""

import base64
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import BundleError
from medmamba.files import RECORD_CONFIG
from medmamba.labels import LabelMap

SAMPLED_VOXELS = 4096
"""Whose logits are kept, evenly spread: their error is known to about a hundredth of itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Expected:
    """What reduced precision is compared with.

    Args:
        decided: per region (K, d, h, w) whether it is there, or per voxel (d, h, w) the output
            that won.
        std: of all logits.
        logits: (K, n) of every `stride`-th voxel.
        stride: 1 where all are there.
    """

    decided: NDArray[np.uint16]
    std: float
    logits: NDArray[np.float32]
    stride: int = 1


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The same as JSON values; the outputs of all folds together.

    Args:
        pattern_version: of the synthetic image.
        mirror_axes: whose flips are averaged.
        folds: whose networks are averaged.
        shape: of the logits, (K, d, h, w).
        decided: little-endian uint16, deflated, as base64 text.
        std: of all logits.
        logits: little-endian float32 of `SAMPLED_VOXELS` or a few more voxels, as base64 text.
    """

    __pydantic_config__ = RECORD_CONFIG

    pattern_version: int
    mirror_axes: tuple[int, ...]
    folds: int
    shape: tuple[int, int, int, int]
    decided: str
    std: float
    logits: str


@dataclass(frozen=True, kw_only=True)
class Probes:
    """A file of them."""

    __pydantic_config__ = RECORD_CONFIG

    probes: tuple[Probe, ...]


def expect(logits: NDArray[np.float32], label_map: LabelMap, stride: int = 1) -> Expected:
    """Describe logits (K, d, h, w)."""
    return Expected(
        decided=decide(logits, label_map),
        std=float(logits.std()),
        logits=sampled(logits, stride),
        stride=stride,
    )


def decide(logits: NDArray[np.float32], label_map: LabelMap) -> NDArray[np.uint16]:
    """Per region whether it is there, or per voxel which output wins."""
    found = logits > 0 if label_map.has_regions else logits.argmax(axis=0)
    return found.astype(np.uint16)


def sampled(logits: NDArray[np.float32], stride: int) -> NDArray[np.float32]:
    """Every ``stride``-th voxel, (K, n)."""
    return logits.reshape(logits.shape[0], -1)[:, ::stride]


def masks(
    decided: NDArray[np.uint16], label_map: LabelMap
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Per label or region its voxels."""
    for channel, name in enumerate(label_map.foreground):
        yield name, decided[channel] > 0 if label_map.has_regions else decided == channel + 1


def pack(
    logits: NDArray[np.float32],
    label_map: LabelMap,
    *,
    pattern_version: int,
    mirror_axes: tuple[int, ...],
    folds: int,
) -> Probe:
    """Describe logits as JSON values."""
    expected = expect(logits, label_map, _stride(logits.shape))
    count, depth, height, width = logits.shape
    return Probe(
        pattern_version=pattern_version,
        mirror_axes=mirror_axes,
        folds=folds,
        shape=(count, depth, height, width),
        decided=base64.b64encode(
            zlib.compress(np.ascontiguousarray(expected.decided, dtype="<u2").tobytes(), 9)
        ).decode(),
        std=expected.std,
        logits=base64.b64encode(
            np.ascontiguousarray(expected.logits, dtype="<f4").tobytes()
        ).decode(),
    )


def unpack(probe: Probe, label_map: LabelMap) -> Expected:
    """Turn JSON values back.

    Raises:
        BundleError: they are damaged.
    """
    count, *grid = probe.shape
    shape = (count, *grid) if label_map.has_regions else tuple(grid)
    stride = _stride(probe.shape)
    limit = prod(shape) * 2
    try:
        decided = zlib.decompressobj().decompress(base64.b64decode(probe.decided), limit + 1)
        logits = base64.b64decode(probe.logits)
    except (ValueError, zlib.error) as error:
        raise BundleError(f"parity probe: cannot be unpacked ({error}).") from error
    if len(decided) != limit or len(logits) != 4 * count * len(range(0, prod(grid), stride)):
        raise BundleError(f"parity probe: holds other sizes than its shape {probe.shape}.")
    return Expected(
        decided=np.frombuffer(decided, dtype="<u2").reshape(shape),
        std=probe.std,
        logits=np.frombuffer(logits, dtype="<f4").reshape(count, -1),
        stride=stride,
    )


def _stride(shape: tuple[int, ...]) -> int:
    return max(1, prod(shape[1:]) // SAMPLED_VOXELS)
