"""Which patches make a batch: a pure function of (seed, stream, iteration).

Every sample has its own counter-based generator, so that resuming needs no stored state, threads
may work ahead, and ranks may share a batch. Only the voxels a patch needs are read.
Legend: B batch, C channels, P patch size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medmamba.errors import TrainingError
from medmamba.training import spatial
from medmamba.training.draws import (
    AugmentationPreset,
    IntensityDraw,
    Rotations,
    draw_intensity,
    draw_matrix,
    draw_mirror,
    rotations_of,
)
from medmamba.training.previous import augment_previous, draw_previous
from medmamba.volume import Box

ANNOTATED = -1
"""First value of the class-location key that lists every annotated voxel."""

OPEN_CASES = 256
"""Cases kept open at once; reopening costs a header and the class locations."""


class Stream(IntEnum):
    """Independent sequences of random numbers under one seed."""

    TRAINING = 0
    VALIDATION = 1
    MODEL = 2


class StoredArrays(Protocol):
    """What is needed of a stored case; arrays are read by slicing."""

    @property
    def data(self) -> Any:
        """(C, D, H, W) float32."""

    @property
    def labels(self) -> Any:
        """(1, D, H, W) int16, -1 outside."""

    @property
    def class_locations(self) -> Mapping[tuple[int, ...], NDArray[np.integer]]:
        """Voxels (n, 3) per class or region."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Patches and where they come from.

    Args:
        data: (B, C, *P) float32.
        labels: (B, 1, *P) int16, 0 outside the image.
    """

    data: Tensor
    labels: Tensor
    cases: tuple[str, ...]
    iteration: int


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What the patches of a batch are.

    Args:
        patch_size: two or three numbers; with two, patches are slices along the first axis.
        oversample_foreground: fraction of the batch that is centred on foreground.
        dummy_2d: overrides the choice of in-plane augmentation by shape.
        outside_is_zero_channels: channels set to 0 outside (masked normalisation).
        previous_values: labels of the coarse network of a cascade that become channels.
    """

    patch_size: tuple[int, ...]
    batch_size: int
    oversample_foreground: float
    preset: AugmentationPreset
    mirror_axes: tuple[int, ...] = ()
    dummy_2d: bool | None = None
    outside_is_zero_channels: tuple[int, ...] = ()
    previous_values: tuple[int, ...] = ()
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class _Patch:
    """A sample as it was read, and what will be done to it in its batch.

    Args:
        region: its second label map is that of a cascade.
        generator: for what is drawn later.
    """

    case: str
    region: spatial.Region
    draw: IntensityDraw
    flips: tuple[int, ...]
    generator: np.random.Generator

    @property
    def changes(self) -> bool:
        return bool(self.flips) or self.draw != IntensityDraw(noise_seed=self.draw.noise_seed)


def sample_generator(seed: int, stream: Stream, iteration: int, sample: int) -> np.random.Generator:
    """Return the generator of one sample: counter-based, independent of every other one."""
    sequence = np.random.SeedSequence((seed, int(stream), iteration, sample))
    return np.random.Generator(np.random.Philox(sequence))


def is_forced_foreground(sample: int, batch_size: int, fraction: float) -> bool:
    """Tell whether a sample is centred on foreground (nnU-Net: the last ones of the batch)."""
    return sample >= round(batch_size * (1 - fraction))


class PatchSampler:
    """Makes the batches of one stream.

    Args:
        open_case: opens a stored case by its id.
        case_ids: cases to draw from, uniformly and with replacement.
        open_previous: opens the labels (1, D, H, W) that the coarse network gave a case; needed
            with ``settings.previous_values``.
    """

    def __init__(
        self,
        open_case: Callable[[str], StoredArrays],
        case_ids: Sequence[str],
        settings: SamplingSettings,
        *,
        seed: int,
        stream: Stream,
        open_previous: Callable[[str], Any] | None = None,
    ) -> None:
        if not case_ids:
            raise TrainingError(
                f"{stream.name.lower()} has no cases. Check the split and the preprocessed data.",
                code="E_TRAIN_NO_CASES",
            )
        self.settings = settings
        self.case_ids = tuple(case_ids)
        self.current_case = ""
        self._open_case = open_case
        self._open_previous = open_previous
        self._opened: dict[str, tuple[StoredArrays, Any]] = {}
        self._seed = seed
        self._stream = stream
        self._rotations = rotations_for(settings)
        moving = self._rotations if settings.preset.moves_voxels else None
        self._outer = spatial.loader_patch_size(settings.patch_size, moving)

    def batch(self, iteration: int, samples: Sequence[int] | None = None) -> Batch:
        """Make the batch of an iteration, or those ``samples`` of it that a rank owns."""
        chosen = range(self.settings.batch_size) if samples is None else samples
        patches = [self._patch(iteration, sample) for sample in chosen]
        data, labels = self._augment(patches)
        if self.settings.previous_values:
            coarse = [
                self._coarse_channels(own[1:], patch.generator)
                for own, patch in zip(labels, patches, strict=True)
            ]
            data, labels = torch.cat([data, torch.stack(coarse)], 1), labels[:, :1].contiguous()
        return Batch(
            data=data,
            labels=labels,
            cases=tuple(patch.case for patch in patches),
            iteration=iteration,
        )

    def _patch(self, iteration: int, sample: int) -> _Patch:
        settings, preset = self.settings, self.settings.preset
        generator = sample_generator(self._seed, self._stream, iteration, sample)
        name = self.case_ids[int(generator.integers(len(self.case_ids)))]
        self.current_case = name
        case, previous = self._case(name)
        forced = is_forced_foreground(sample, settings.batch_size, settings.oversample_foreground)
        start, index = choose_region(case, self._outer, settings.patch_size, forced, generator)
        dimension = len(settings.patch_size)
        matrix = draw_matrix(preset, self._rotations, dimension, generator)
        draw = draw_intensity(preset, case.data.shape[0], dimension, generator)
        flips = draw_mirror(preset, settings.mirror_axes, generator)
        maps = [case.labels] if previous is None else [case.labels, previous]
        region = self._read(case.data, maps, start, index, matrix)
        return _Patch(case=name, region=region, draw=draw, flips=flips, generator=generator)

    def _coarse_channels(self, labels: Tensor, generator: np.random.Generator) -> Tensor:
        values = self.settings.previous_values
        channels = torch.cat([labels == value for value in values]).cpu().numpy()
        draw = draw_previous(self.settings.preset, len(values), generator)
        changed = augment_previous(channels, draw).astype(np.float32)
        return torch.from_numpy(changed).to(labels.device)

    def _case(self, name: str) -> tuple[StoredArrays, Any]:
        if name not in self._opened:
            if len(self._opened) >= OPEN_CASES:
                del self._opened[next(iter(self._opened))]
            previous = self._open_previous(name) if self._open_previous is not None else None
            self._opened[name] = (self._open_case(name), previous)
        return self._opened[name]

    def _read(
        self,
        stored: Any,
        maps: Sequence[Any],
        start: tuple[int, ...],
        index: int | None,
        matrix: NDArray[np.float64] | None,
    ) -> spatial.Region:
        inner = spatial.inner_box(start, self._outer, self.settings.patch_size)
        box = inner if matrix is None else spatial.source_box(inner, start, self._outer, matrix)
        read = [read_box(one, box, index, fill=spatial.OUTSIDE) for one in maps]
        return spatial.Region(
            data=torch.from_numpy(read_box(stored, box, index, fill=0)),
            labels=torch.from_numpy(np.concatenate(read)),
            box=box,
            inner=inner,
            matrix=matrix,
        )

    def _augment(self, patches: Sequence[_Patch]) -> tuple[Tensor, Tensor]:
        in_plane = self._rotations.in_plane
        data, labels = spatial.make_patches(
            [patch.region for patch in patches],
            self._outer,
            in_plane=in_plane,
            device=torch.device(self.settings.device),
        )
        if any(patch.changes for patch in patches):
            # MONAI takes seconds to import; a run without augmentation does not pay them.
            from medmamba.training.augment import augment_intensity, mirror

            draws = [patch.draw for patch in patches]
            data = augment_intensity(data, draws, in_plane=in_plane)
            data, labels = mirror(data, labels, [patch.flips for patch in patches])
        outside = labels[:, 0] == spatial.OUTSIDE
        for channel in self.settings.outside_is_zero_channels:
            data[:, channel].masked_fill_(outside, 0)
        return data, labels.clip(min=0)


def rotations_for(settings: SamplingSettings) -> Rotations:
    """Return the rotations the settings' patch allows."""
    return rotations_of(settings.patch_size, dummy_2d=settings.dummy_2d)


def choose_region(
    case: StoredArrays,
    outer: tuple[int, ...],
    patch_size: tuple[int, ...],
    forced: bool,
    generator: np.random.Generator,
) -> tuple[tuple[int, ...], int | None]:
    """Choose the start of the loader's region, and the slice of a 2D patch.

    The region may start before the image and end behind it by the loader's margin, so that
    patches are uniform over all positions (nnU-Net's rule). A forced one is centred on a voxel of
    a class drawn uniformly among those present.
    """
    shape = tuple(int(size) for size in case.data.shape[1:])
    flat = len(patch_size) == 2
    voxel = _choose_voxel(case, forced, generator)
    index = None
    if flat:
        index = int(generator.integers(shape[0])) if voxel is None else int(voxel[0])
        shape = shape[1:]
        voxel = None if voxel is None else voxel[1:]
    start = []
    for axis, (length, size, patch) in enumerate(zip(shape, outer, patch_size, strict=True)):
        margin = max(size - patch, size - length)
        low = -((margin + 1) // 2)
        high = length + margin // 2 + margin % 2 - size
        if voxel is None:
            start.append(int(generator.integers(low, high + 1)))
        else:
            start.append(max(low, int(voxel[axis]) - size // 2))
    return tuple(start), index


def _choose_voxel(
    case: StoredArrays, forced: bool, generator: np.random.Generator
) -> NDArray[np.integer] | None:
    locations = case.class_locations
    if forced:
        present = [k for k, found in locations.items() if len(found) and k[0] != ANNOTATED]
        if present:
            return _pick(locations[present[int(generator.integers(len(present)))]], generator)
    # With an ignore label, patches are centred on annotated voxels only.
    for key, found in locations.items():
        if key[0] == ANNOTATED and len(found):
            return _pick(found, generator)
    return None


def _pick(found: NDArray[np.integer], generator: np.random.Generator) -> NDArray[np.integer]:
    voxel: NDArray[np.integer] = found[int(generator.integers(len(found)))]
    return voxel


def read_box(array: Any, box: Box, index: int | None, *, fill: int) -> NDArray[Any]:
    """Read a box that may reach outside the array, filling what is outside.

    Args:
        array: (C, D, H, W), sliceable.
        box: one range per patch axis.
        index: of the slice along D when the box has two ranges.
        fill: value outside the array.
    """
    shape = array.shape[2:] if index is not None else array.shape[1:]
    inside = [
        (min(max(start, 0), size), max(min(stop, size), 0))
        for (start, stop), size in zip(box, shape, strict=True)
    ]
    result = np.full(
        (array.shape[0], *(stop - start for start, stop in box)), fill, dtype=array.dtype
    )
    if all(stop > start for start, stop in inside):
        ranges = [slice(start, stop) for start, stop in inside]
        if index is not None:
            ranges.insert(0, slice(index, index + 1))
        read = np.asarray(array[(slice(None), *ranges)])
        target = tuple(
            slice(a - start, b - start) for (a, b), (start, _) in zip(inside, box, strict=True)
        )
        result[(slice(None), *target)] = read[:, 0] if index is not None else read
    return result
