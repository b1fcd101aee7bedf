"""An acceptance test that travels with a model: a synthetic case and what it must become.

Made where the model was trained, repeated where it is used: the same labels, or nearly so on
another kind of processor, show that the installation computes what was validated.
"""

import base64
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import BundleError
from medmamba.files import RECORD_CONFIG
from medmamba.inference.probe import Expected, Probes, pack, unpack
from medmamba.labels import LabelMap
from medmamba.plans.plan import ConfigurationPlan
from medmamba.preprocessing.recipe import ChannelStatistics
from medmamba.preprocessing.restore import restore_labels
from medmamba.volume import Geometry, Volume

if TYPE_CHECKING:
    from torch import nn

    from medmamba.inference.predictor import Predictor

    Stage = tuple[Sequence[nn.Module], ConfigurationPlan]

PATTERN_VERSION = 1
"""Raised when the synthetic image changes; cases of another version cannot be repeated."""

COARSENING = 1.25
"""The image is this much coarser than the working grid, so that resampling takes part."""

SLICES_2D = 2
QUANTUM = 1 / 64
"""Intensities are whole multiples of this, so that no mathematical library shows in them."""

MOST_PROBED = 2**24
"""Voxels of all passes with flips, up to which they are computed when a model is written."""

EQUIVALENT_AGREEMENT = 0.999
"""Share of equal voxels that another kind of processor must reach."""

EQUIVALENT_LOGITS = 0.02
"""Largest difference of mean logits, in standard deviations, that it may show."""


@dataclass(frozen=True, kw_only=True)
class ReferenceCase:
    """What the synthetic image became where the model was made.

    Args:
        shape: voxels (D, H, W) of the image.
        mask_sha256: of the label values as little-endian uint16.
        mask: those bytes, deflated, as base64 text.
        logits_mean: per output, on the working grid.
        logits_std: per output.
    """

    __pydantic_config__ = RECORD_CONFIG

    shape: tuple[int, int, int]
    mask_sha256: str
    mask: str
    logits_mean: tuple[float, ...]
    logits_std: tuple[float, ...]
    pattern_version: int = PATTERN_VERSION


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Outcome of repeating the reference case.

    Args:
        outcome: ``identical`` labels, ``equivalent`` ones, or ``different``.
        agreement: share of equal voxels.
        logits_difference: largest difference of mean logits, in standard deviations.
    """

    __pydantic_config__ = RECORD_CONFIG

    outcome: Literal["identical", "equivalent", "different"]
    agreement: float
    logits_difference: float

    @property
    def passed(self) -> bool:
        """Whether the model can be used here."""
        return self.outcome != "different"


def make_reference_case(
    networks: "Sequence[nn.Module]",
    configuration: ConfigurationPlan,
    label_map: LabelMap,
    intensities: Sequence[ChannelStatistics] = (),
    previous: "Stage | None" = None,
) -> ReferenceCase:
    """Predict the synthetic image on the CPU in float32, and describe the result.

    Args:
        networks: of all folds.
        configuration: they belong to.
        label_map: of the plan.
        intensities: of the dataset.
        previous: networks and configuration of a cascade's first stage.
    """
    image = synthetic_image(configuration, intensities)
    labels, logits = _predict(networks, configuration, label_map, image, previous)
    stored = np.ascontiguousarray(labels, dtype="<u2").tobytes()
    return ReferenceCase(
        shape=image.geometry.shape,
        mask_sha256=hashlib.sha256(stored).hexdigest(),
        mask=base64.b64encode(zlib.compress(stored, 9)).decode(),
        logits_mean=tuple(float(value) for value in logits.mean(axis=(1, 2, 3))),
        logits_std=tuple(float(value) for value in logits.std(axis=(1, 2, 3))),
    )


def repeat_reference_case(
    case: ReferenceCase,
    networks: "Sequence[nn.Module]",
    configuration: ConfigurationPlan,
    label_map: LabelMap,
    intensities: Sequence[ChannelStatistics] = (),
    previous: "Stage | None" = None,
) -> Acceptance:
    """Predict the synthetic image again, here, and compare.

    Raises:
        BundleError: the case was made by another version, or is damaged.
    """
    if case.pattern_version != PATTERN_VERSION:
        raise BundleError(
            f"reference case: key 'pattern_version' is {case.pattern_version}, this version of "
            f"medmamba makes {PATTERN_VERSION}. Use the version the model was made with."
        )
    found = make_reference_case(networks, configuration, label_map, intensities, previous)
    expected, labels = _stored_labels(case), _stored_labels(found)
    if expected.shape != labels.shape:
        raise BundleError(
            f"reference case: key 'shape' is {case.shape}, the plan makes {found.shape}."
        )
    scale = np.maximum(np.array(case.logits_std), 1e-6)
    distance = np.abs(np.array(case.logits_mean) - np.array(found.logits_mean)) / scale
    agreement = float((expected == labels).mean())
    difference = float(distance.max())
    outcome: Literal["identical", "equivalent", "different"] = "different"
    if difference <= EQUIVALENT_LOGITS and agreement >= EQUIVALENT_AGREEMENT:
        outcome = "identical" if case.mask_sha256 == found.mask_sha256 else "equivalent"
    return Acceptance(outcome=outcome, agreement=agreement, logits_difference=difference)


def make_probes(
    networks: "Sequence[nn.Module]",
    configuration: ConfigurationPlan,
    label_map: LabelMap,
    intensities: Sequence[ChannelStatistics] = (),
    previous: "Stage | None" = None,
) -> Probes:
    """Predict the synthetic image on the CPU in float32, plain and with flips, for parity gates.

    Arguments are those of `make_reference_case`. Flips of large models are left out: gates compute
    them where they are needed.
    """
    image = synthetic_image(configuration, intensities)
    axes = configuration.training.mirror_axes
    inputs = prod(configuration.grid.patch_size) * len(networks)
    probes = []
    for mirror in (False, True) if axes and inputs * 2 ** len(axes) <= MOST_PROBED else (False,):
        predictor = _predictor(networks, configuration, label_map, previous, mirror=mirror)
        logits = predictor.logits(predictor.prepare(image)).numpy()
        probe = pack(
            logits, label_map, pattern_version=PATTERN_VERSION,
            mirror_axes=axes if mirror else (), folds=len(networks),
        )  # fmt: skip
        probes.append(probe)
    return Probes(probes=tuple(probes))


def expected_of(
    probes: Probes, *, mirror_axes: tuple[int, ...], folds: int, label_map: LabelMap
) -> Expected | None:
    """Find what float32 says with these flips and folds; None where nobody has computed it.

    Raises:
        BundleError: it is damaged.
    """
    wanted = (PATTERN_VERSION, mirror_axes, folds)
    for probe in probes.probes:
        if (probe.pattern_version, probe.mirror_axes, probe.folds) == wanted:
            return unpack(probe, label_map)
    return None


def synthetic_image(
    configuration: ConfigurationPlan, intensities: Sequence[ChannelStatistics] = ()
) -> Volume:
    """Return waves and a bright ellipsoid within a margin of zeros; no random numbers.

    It fills one patch of the working grid once resampled.
    """
    recipe, grid = configuration.preprocessing, configuration.grid
    sizes = tuple(max(4, round(size / COARSENING)) for size in grid.patch_size)
    spacing = tuple(value * COARSENING for value in grid.spacing_mm)
    if grid.dimension == 2:
        sizes, spacing = (SLICES_2D, *sizes), (spacing[0], *spacing)
    order = recipe.transpose_backward
    shape = tuple(sizes[axis] for axis in order)
    channels = [
        _pattern(shape, index, intensities[index] if index < len(intensities) else None)
        for index in range(len(recipe.channels))
    ]
    geometry = Geometry.from_spacing(shape, tuple(spacing[axis] for axis in order))
    return Volume(array=np.stack(channels), geometry=geometry)


def _pattern(
    shape: tuple[int, ...], channel: int, statistics: ChannelStatistics | None
) -> NDArray[np.float32]:
    axes = [np.linspace(-1, 1, size) if size > 2 else np.zeros(size) for size in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    waves = np.cos(5 * z + channel) * np.cos(7 * y) + np.cos(9 * x + 4 * y)
    ellipsoid = (z**2 + 2 * y**2 + 3 * (x - 0.2) ** 2) < 0.5
    mean, std = (100.0, 20.0) if statistics is None else (statistics.mean, statistics.std)
    values = mean + std * (0.5 * waves + 1.5 * ellipsoid - 0.5)
    values = np.round(values / (std * QUANTUM)) * (std * QUANTUM)
    values[values == 0] = std * QUANTUM
    for axis in (axis for axis, size in enumerate(shape) if size > SLICES_2D):
        np.moveaxis(values, axis, 0)[[0, -1]] = 0
    return values.astype(np.float32)


def _predict(
    networks: "Sequence[nn.Module]",
    configuration: ConfigurationPlan,
    label_map: LabelMap,
    image: Volume,
    previous: "Stage | None",
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    predictor = _predictor(networks, configuration, label_map, previous)
    prepared = predictor.prepare(image)
    logits = predictor.logits(prepared).numpy()
    labels = restore_labels(logits, prepared.record, predictor.recipe, label_map)
    return labels, logits.astype(np.float64)


def _predictor(
    networks: "Sequence[nn.Module]",
    configuration: ConfigurationPlan,
    label_map: LabelMap,
    previous: "Stage | None",
    *,
    mirror: bool = False,
) -> "Predictor":
    from medmamba.inference.predictor import PredictionSettings, Predictor

    return Predictor(
        networks,
        grid=configuration.grid,
        preprocessing=configuration.preprocessing,
        label_map=label_map,
        settings=PredictionSettings(
            features=configuration.network.features[0],
            mirror_axes=configuration.training.mirror_axes if mirror else (),
        ),
        previous=(
            None if previous is None else _predictor(*previous, label_map, None, mirror=mirror)
        ),
    )


def _stored_labels(case: ReferenceCase) -> NDArray[np.uint16]:
    limit = int(np.prod(case.shape)) * 2
    try:
        stored = zlib.decompressobj().decompress(base64.b64decode(case.mask), limit + 1)
    except (ValueError, zlib.error) as error:
        raise BundleError(f"reference case: key 'mask' is damaged ({error}).") from error
    if len(stored) != limit or hashlib.sha256(stored).hexdigest() != case.mask_sha256:
        raise BundleError("reference case: key 'mask' does not match 'mask_sha256'.")
    return np.frombuffer(stored, dtype="<u2").reshape(case.shape)
