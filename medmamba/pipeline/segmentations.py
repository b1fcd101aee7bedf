"""A mask of any origin as a DICOM object of its series: voxels (SEG) or contours (RTSTRUCT)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmamba.bundle import read_manifest
from medmamba.dataset import grid_difference
from medmamba.dataset.case import TRAINING_TOLERANCE_VOXELS
from medmamba.errors import DatasetError, InputError, UsageError
from medmamba.evaluation.palette import label_colors
from medmamba.files import read_json
from medmamba.io import TRAINING_GATE, orientation_code, read_header, read_labels, turn
from medmamba.io.dicom_rtstruct import write_structures
from medmamba.io.dicom_seg import MANUFACTURER, SegmentLabel, write_segmentation
from medmamba.labels import BACKGROUND_NAME
from medmamba.pipeline.label_forms import segments_of
from medmamba.volume import Geometry

Form = Literal["seg", "labelmap", "rtstruct"]
WRITERS: dict[Form, Callable[..., None]] = {
    "seg": write_segmentation,
    "labelmap": partial(write_segmentation, kind="LABELMAP"),
    "rtstruct": write_structures,
}


def seg_to_dicom(
    mask: Path,
    series: Path,
    output: Path,
    *,
    model: Path | None = None,
    labels: Path | None = None,
    algorithm: str | None = None,
    form: Form = "seg",
) -> tuple[SegmentLabel, ...]:
    """Write ``mask`` as segments on the planes of ``series``; return the segments.

    The mask may be stored along other axes than the series: it is turned, never resampled.

    Args:
        mask: label file on the grid of the series.
        series: folder, archive or file of the images.
        output: DICOM file to write.
        model: names, codes and colours of the labels are those of this model.
        labels: a dataset.json, or a JSON map name -> value; instead of a model.
        algorithm: what made the mask; the model's name when omitted.
        form: ``seg`` for a segmentation (BINARY), ``labelmap`` for one of the newer kind,
            ``rtstruct`` for a structure set of contours.

    Raises:
        InputError: mask or series cannot be trusted, the mask lies elsewhere, or it holds a value
            without a name.
        UsageError: both or neither of model and labels, or no DICOM series.
        BundleError, DatasetError: the model or the list of labels cannot be read.
        EnvironmentFault: the packages for DICOM are missing, or the file cannot be written.
    """
    segments, maker = _segments(model, labels)
    header = read_header(series)
    if header.format != "dicom":
        raise UsageError(f"{series.name}: is no DICOM series. Give its folder, archive or file.")
    values = _on_grid(mask, header.geometry)
    known = {value for segment in segments for value in segment.values}
    unnamed = sorted(set(np.unique(values).tolist()) - known - {0})
    if unnamed:
        raise InputError(
            f"{mask.name}: holds values without a name ({', '.join(map(str, unnamed[:10]))}). "
            "Name them, or give the model that made the mask.",
            code="E_LABEL_UNDECLARED",
        )
    WRITERS[form](output, values, series, segments, algorithm=algorithm or maker)
    return segments


def _segments(model: Path | None, labels: Path | None) -> tuple[tuple[SegmentLabel, ...], str]:
    """Segments, and the name of what makes such masks."""
    if model is not None and labels is None:
        manifest = read_manifest(model)
        return segments_of(manifest), manifest.name
    if labels is not None and model is None:
        return _listed_segments(labels), MANUFACTURER
    raise UsageError("names of the segments: give either --model or --labels.")


def _on_grid(mask: Path, geometry: Geometry) -> NDArray[np.integer[Any]]:
    """Labels (D, H, W) along the axes of ``geometry``."""
    volume, source = read_labels(mask, gate=TRAINING_GATE)
    turned, _ = turn(volume, source, orientation_code(geometry))
    different = grid_difference(
        geometry, turned.geometry, tolerance_voxels=TRAINING_TOLERANCE_VOXELS
    )
    if different:
        raise InputError(
            f"{mask.name}: lies on another grid than the series ({different}). Give the mask of "
            "this series, on its own grid.",
            code="E_LABEL_GRID",
        )
    values: NDArray[np.integer[Any]] = turned.array[0].astype(np.int32)
    return values


def _listed_segments(path: Path) -> tuple[SegmentLabel, ...]:
    content = read_json(path, what="list of labels", error=DatasetError)
    listed = content.get("labels", content) if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not all(map(_is_value, listed.values())):
        raise DatasetError(
            f"{path.name}: a map name -> value, or a dataset.json with 'labels', is needed."
        )
    groups = {
        str(name): tuple(value) if isinstance(value, list) else (value,)
        for name, value in listed.items()
        if name != BACKGROUND_NAME and value != 0
    }
    colors = label_colors(groups)
    return tuple(
        SegmentLabel(name=name, values=values, color=colors[name])
        for name, values in groups.items()
    )


def _is_value(value: Any) -> bool:
    members = value if isinstance(value, list) else [value]
    return bool(members) and all(type(member) is int and member >= 0 for member in members)
