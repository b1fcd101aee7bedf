"""Build ``report.html`` and ``summary.csv`` of an output folder from its commit records.

Nothing is segmented again: volumes and warnings are those of the records, pictures are drawn from
the masks, over the images where those are given.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmamba import __version__
from medmamba.dataset import Case, find_cases
from medmamba.errors import MedMambaError, UsageError
from medmamba.evaluation.palette import label_colors
from medmamba.files import to_csv, write_atomic
from medmamba.inference.journal import SUMMARY_COLUMNS, summary_rows
from medmamba.inference.records import CommitRecord, read_record, still_holds
from medmamba.io import TRAINING_GATE, read_image, read_labels, turn
from medmamba.reporting.pictures import VIEW_CODE, View, draw_case
from medmamba.reporting.template import PAGE, SCRIPT, SCRIPT_HASH, STYLE

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.csv"
MAX_TABLE_LABELS = 12
"""More columns than this cannot be read; every case lists all of its labels."""


@dataclass(frozen=True, kw_only=True)
class ReportOutcome:
    """What was written.

    Args:
        path: the page.
        cases: records shown.
        pictures: cases with pictures.
    """

    path: Path
    cases: int
    pictures: int


def write_report(
    folder: Path, *, images: Path | None = None, on_case: Callable[[int, int], None] | None = None
) -> ReportOutcome:
    """Write the page and the table of an output folder.

    Args:
        folder: where masks and records are.
        images: what was predicted, to show the images under the masks.
        on_case: called after each case with (done, total).

    Raises:
        UsageError: the folder holds no record.
        EnvironmentFault: the folder cannot be written.
    """
    records = [
        record
        for path in sorted(folder.glob("[!.]*.json"))
        if (record := read_record(path)) is not None
    ]
    if not records:
        raise UsageError(f"{folder}: holds no record of a predicted case. Give the output folder.")
    known = _cases_of(images, records)
    entries = []
    for done, record in enumerate(records, 1):
        entries.append(_entry(record, folder, known.get(record.case_id)))
        if on_case is not None:
            on_case(done, len(records))
    names = list(dict.fromkeys(item.name for record in records for item in record.labels))
    for entry in entries:
        entry["volumes"] = _volumes(entry["labels"], names[:MAX_TABLE_LABELS])
    page = _render(records, entries, names[:MAX_TABLE_LABELS])
    write_atomic(folder / SUMMARY_FILE, to_csv(SUMMARY_COLUMNS, summary_rows(records)))
    write_atomic(folder / REPORT_FILE, page)
    pictured = sum(bool(entry["views"]) for entry in entries)
    return ReportOutcome(path=folder / REPORT_FILE, cases=len(records), pictures=pictured)


def _render(records: list[CommitRecord], entries: list[dict[str, Any]], names: list[str]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    counts = Counter(record.status for record in records)
    return environment.from_string(PAGE).render(
        cases=entries,
        counts=sorted(counts.items()),
        label_names=names,
        models=sorted({record.model.name for record in records if record.model}),
        script=SCRIPT,
        script_hash=SCRIPT_HASH,
        style=STYLE,
        version=__version__,
    )


def _cases_of(images: Path | None, records: list[CommitRecord]) -> Mapping[str, Case]:
    if images is None:
        return {}
    channels = max((len(record.inputs) for record in records), default=1) or 1
    return {case.id: case for case in find_cases(images, channels=channels).cases}


def _entry(record: CommitRecord, folder: Path, case: Case | None) -> dict[str, Any]:
    colors = label_colors([item.name for item in record.labels])
    labels = [
        {
            "name": item.name,
            "color": colors[item.name],
            "voxels": item.voxels,
            "volume_ml": item.volume_ml,
            "n_components": item.n_components,
            "touches_border": item.touches_border,
        }
        for item in record.labels
    ]
    views: tuple[View, ...] = ()
    warnings = list(record.warnings)
    if record.succeeded and record.output is not None:
        if still_holds(record, folder):
            views = _draw(record, folder / record.output.name, case, colors)
        else:
            warnings.append("W_MASK_CHANGED: the mask is missing or was edited after prediction")
    return {
        "name": record.case_id,
        "status": record.status,
        "error": record.error,
        "warnings": warnings,
        "labels": labels,
        "views": views,
    }


def _draw(
    record: CommitRecord, mask: Path, case: Case | None, colors: dict[str, str]
) -> tuple[View, ...]:
    try:
        labels, header = read_labels(mask, gate=TRAINING_GATE)
        turned, _ = turn(labels, header, VIEW_CODE)
        values = np.asarray(turned.array[0])
        by_value = {value: colors[item.name] for item in record.labels for value in item.values}
        under = None
        if case is not None:
            # On the file's own grid, as the mask is.
            image, source = read_image(case.images[0], gate=TRAINING_GATE)
            shown = turn(image, source, VIEW_CODE)[0].array[0]
            under = np.asarray(shown, np.float32) if shown.shape == values.shape else None
        return draw_case(under, values.astype(np.int64), turned.geometry.spacing_mm, by_value)
    except MedMambaError as problem:
        logger.warning("case %s: no pictures (%s)", record.case_id, problem.message)
        return ()


def _volumes(labels: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any] | None]:
    found = {item["name"]: item for item in labels}
    return [
        {"ml": found[name]["volume_ml"], "cut": found[name]["touches_border"]}
        if name in found
        else None
        for name in names
    ]
