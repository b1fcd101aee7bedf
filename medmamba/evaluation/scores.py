"""Scores as values: of a label in a case, of a case, of a folder, and their means.

Names of metrics are nnU-Net's where it has them. No files.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from medmamba.evaluation.overlap import Overlap
from medmamba.evaluation.surface import SurfaceScores
from medmamba.labels import LabelMap

DEFAULT_TOLERANCE_MM = 1.0
"""About the distance at which two observers disagree on a sharp border (Nikolov et al. 2021)."""

OVERLAP_METRICS = ("Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref")
"""The metrics of nnU-Net's summary.json, under its names."""

EXTRA_METRICS = ("HD95_mm", "NSD", "volume_ref_ml", "volume_pred_ml", "volume_error_ml")

METRICS = OVERLAP_METRICS + EXTRA_METRICS


@dataclass(frozen=True, kw_only=True)
class LabelScores:
    """All scores of one label in one case."""

    overlap: Overlap
    surface: SurfaceScores
    voxel_volume_ml: float

    def metrics(self) -> dict[str, float]:
        """Return every metric under the name that the summary gives it."""
        overlap, surface = self.overlap, self.surface
        return {
            "Dice": overlap.dice,
            "FN": overlap.fn,
            "FP": overlap.fp,
            "IoU": overlap.iou,
            "TN": overlap.tn,
            "TP": overlap.tp,
            "n_pred": overlap.n_pred,
            "n_ref": overlap.n_ref,
            "HD95_mm": surface.hd95_mm,
            "NSD": surface.nsd,
            "volume_ref_ml": overlap.n_ref * self.voxel_volume_ml,
            "volume_pred_ml": overlap.n_pred * self.voxel_volume_ml,
            "volume_error_ml": (overlap.n_pred - overlap.n_ref) * self.voxel_volume_ml,
        }


@dataclass(frozen=True, kw_only=True)
class CaseScores:
    """All scores of one case, by label name."""

    case_id: str
    reference_file: str
    prediction_file: str
    labels: dict[str, LabelScores]

    @property
    def dice(self) -> float:
        """Mean over the labels; see ``mean_dice``."""
        return mean_dice(scores.overlap.dice for scores in self.labels.values())


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """One line of the table for people: a label over all cases where it has a value.

    Args:
        label: name of the label or region.
        cases: cases in which reference or prediction contains it.
        dice_std: standard deviation over those cases.
        dice_min: of the worst case.
        volume_ml: mean predicted volume.
        reference_volume_ml: mean volume in the reference.
    """

    label: str
    cases: int
    dice: float
    dice_std: float
    dice_min: float
    iou: float
    hd95_mm: float
    nsd: float
    volume_ml: float
    reference_volume_ml: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a folder.

    Args:
        label_map: names of the labels and regions that were scored.
        cases: scored cases in order of their id.
        missing: cases of the reference without a prediction.
        unknown: predictions without a reference.
        tolerance_mm: tolerance of the NSD.
    """

    label_map: LabelMap
    cases: tuple[CaseScores, ...]
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    tolerance_mm: float = DEFAULT_TOLERANCE_MM

    @property
    def foreground_dice(self) -> float:
        """Mean over labels of the mean Dice over cases, without labels that no case has."""
        return _mean([self.mean(name)["Dice"] for name in self.label_map.foreground])

    def mean(self, label: str) -> dict[str, float]:
        """Return the mean of each metric over the cases in which it is defined.

        An infinite HD95 (one mask empty) enters no mean: it shows in Dice and NSD, which are 0.
        """
        rows = [case.labels[label].metrics() for case in self.cases]
        return {name: _mean([row[name] for row in rows]) for name in METRICS}

    def summary(self, *, extra: bool = True) -> dict[str, object]:
        """Return nnU-Net's summary; without ``extra`` exactly its entries."""
        names = METRICS if extra else OVERLAP_METRICS
        keys = {name: label_key(values) for name, values in self.label_map.foreground.items()}
        means = {keys[name]: _chosen(self.mean(name), names) for name in keys}
        # A label that occurs in no case makes the mean over labels NaN, as in nnU-Net.
        foreground = {name: fmean([row[name] for row in means.values()]) for name in names}
        summary: dict[str, object] = {
            "foreground_mean": foreground,
            "mean": means,
            "metric_per_case": [
                {
                    "metrics": {
                        keys[name]: _chosen(scores.metrics(), names)
                        for name, scores in case.labels.items()
                    },
                    "prediction_file": case.prediction_file,
                    "reference_file": case.reference_file,
                }
                for case in self.cases
            ],
        }
        return summary | self._context(keys) if extra else summary

    def _context(self, keys: dict[str, str]) -> dict[str, object]:
        return {
            "labels": {key: name for name, key in keys.items()},
            "nsd_tolerance_mm": self.tolerance_mm,
            "missing_predictions": list(self.missing),
            "predictions_without_reference": list(self.unknown),
        }

    def rows(self) -> tuple[LabelRow, ...]:
        """Return one line per label for a table."""
        return tuple(self._row(name) for name in self.label_map.foreground)

    def _row(self, name: str) -> LabelRow:
        dice = [case.labels[name].overlap.dice for case in self.cases]
        defined = [value for value in dice if value == value]
        mean = self.mean(name)
        return LabelRow(
            label=name,
            cases=len(defined),
            dice=mean["Dice"],
            dice_std=stdev(defined) if len(defined) > 1 else float("nan"),
            dice_min=min(defined, default=float("nan")),
            iou=mean["IoU"],
            hd95_mm=mean["HD95_mm"],
            nsd=mean["NSD"],
            volume_ml=mean["volume_pred_ml"],
            reference_volume_ml=mean["volume_ref_ml"],
        )


def mean_dice(values: Iterable[float | None]) -> float:
    """Return the mean Dice over the labels of a case.

    A label that is in neither mask (None or NaN) does not count; where none is in any, it is 1.
    """
    known = [value for value in values if value is not None and value == value]
    return fmean(known) if known else 1.0


def label_key(values: Sequence[int]) -> str:
    """Return nnU-Net's JSON key of a label or region: ``1`` or ``(1, 2)``."""
    return str(values[0]) if len(values) == 1 else str(tuple(values))


def _chosen(metrics: dict[str, float], names: tuple[str, ...]) -> dict[str, float]:
    return {name: metrics[name] for name in names}


def _mean(values: list[float]) -> float:
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")
