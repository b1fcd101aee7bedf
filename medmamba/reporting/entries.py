"""What a page says of each case: numbers and flags of its record, and pictures of its mask."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medmamba.dataset import Case
from medmamba.errors import MedMambaError
from medmamba.evaluation.palette import label_colors
from medmamba.inference.records import CaseError, CommitRecord, LabelStatistics, still_holds
from medmamba.io import TRAINING_GATE, read_image, read_labels, turn
from medmamba.reporting.pictures import VIEW_CODE, View, draw_case
from medmamba.reporting.volumes import PackedVolume, pack

logger = logging.getLogger(__name__)

MAX_ENTRIES = 2000
"""A page of more cases is slow to open; the rest is in the table beside it."""
MAX_PICTURED = 200
"""More pictures make a file that cannot be sent."""
MAX_PACKED = 40
"""Likewise, of cases that can be turned: with images of half a megabyte, some 30 MB."""
DRAWN_AT_ONCE = 2
"""Cases whose voxels are in memory together."""


@dataclass(frozen=True, kw_only=True)
class LabelLine:
    """A label of a case as the page shows it.

    Args:
        measured: what the record says.
        color: ``#rrggbb``.
        remarks: flags in words.
    """

    measured: LabelStatistics
    color: str
    remarks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A case as the page shows it.

    Args:
        flags: number of warnings and remarks; what is looked at first has most.
        without_pictures: why there are none, where there could be.
        volume: for the interactive viewer.
    """

    name: str
    status: str
    error: CaseError | None
    warnings: tuple[str, ...]
    labels: tuple[LabelLine, ...]
    flags: int
    views: tuple[View, ...] = ()
    without_pictures: str = ""
    volume: PackedVolume | None = None

    @property
    def confidence(self) -> float | None:
        """Of the label that the networks were least sure of; None where nothing is known."""
        known = [line.measured.confidence for line in self.labels]
        return min((item.mean_probability for item in known if item), default=None)


def make_entries(
    records: Sequence[CommitRecord],
    folder: Path,
    cases: Mapping[str, Case],
    on_case: Callable[[int, int], None] | None = None,
    *,
    interactive: bool = False,
) -> list[Entry]:
    """Describe and draw cases, in order of their names.

    Of very many cases those are shown, and of many those are drawn or packed for the viewer, that
    need looking at most.

    Args:
        records: what became of the cases.
        folder: where the masks are.
        cases: images by case, as far as they are known.
        on_case: called after each case with (done, total).
        interactive: also pack small volumes for the viewer.
    """
    described = {record.case_id: _described(record) for record in records}
    urgent = sorted(records, key=lambda record: _urgency(described[record.case_id]))
    shown = sorted(urgent[:MAX_ENTRIES], key=lambda record: record.case_id)
    drawable = [record.case_id for record in urgent if record.succeeded]
    pictured = set(drawable[:MAX_PICTURED])
    packed = set(drawable[:MAX_PACKED] if interactive else ())

    def finish(record: CommitRecord) -> Entry:
        entry = described[record.case_id]
        if not record.succeeded:
            return entry
        if record.case_id not in pictured:
            return replace(entry, without_pictures="not among the cases that are drawn")
        name = record.case_id
        return _pictured(entry, record, folder, cases.get(name), packs=name in packed)

    entries = []
    for done, entry in enumerate(_mapped(finish, shown), 1):
        entries.append(entry)
        if on_case is not None:
            on_case(done, len(shown))
    return entries


def _mapped(
    work: Callable[[CommitRecord], Entry], records: Sequence[CommitRecord]
) -> Iterator[Entry]:
    """Results in order, never more than a few cases ahead."""
    with ThreadPoolExecutor(DRAWN_AT_ONCE, "report") as pool:
        waiting: list[Future[Entry]] = []
        for record in records:
            waiting.append(pool.submit(work, record))
            if len(waiting) > DRAWN_AT_ONCE:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _described(record: CommitRecord) -> Entry:
    colors = label_colors([item.name for item in record.labels])
    labels = tuple(
        LabelLine(measured=item, color=colors[item.name], remarks=tuple(_remarks(item)))
        for item in record.labels
    )
    remarks = sum(len(line.remarks) for line in labels)
    return Entry(
        name=record.case_id,
        status=record.status,
        error=record.error,
        warnings=record.warnings,
        labels=labels,
        flags=len(record.warnings) + remarks,
    )


def _remarks(item: LabelStatistics) -> Iterator[str]:
    if not item.voxels:
        yield "not found"
    if item.touches_border:
        yield "touches the border of the image: at least this much"
    if item.volume_flag and item.usual:
        amount = "less" if item.volume_flag == "low" else "more"
        yield f"{amount} than in 98 % of training cases"


def _urgency(entry: Entry) -> tuple[bool, int, float, str]:
    """Smallest for what should be looked at first."""
    confidence = 1.0 if entry.confidence is None else entry.confidence
    return entry.error is None, -entry.flags, confidence, entry.name


def _pictured(
    entry: Entry, record: CommitRecord, folder: Path, case: Case | None, *, packs: bool
) -> Entry:
    if record.output is None or not still_holds(record, folder):
        text = "W_MASK_CHANGED: the mask is missing or was edited after prediction"
        return replace(entry, warnings=(*entry.warnings, text), flags=entry.flags + 1)
    try:
        views, volume = _draw(record, folder / record.output.name, case, packs=packs)
    except MedMambaError as problem:
        logger.warning("case %s: no pictures (%s)", record.case_id, problem.code)
        return replace(entry, without_pictures=f"{problem.code}: the files could not be read again")
    return replace(entry, views=views, volume=volume)


def _draw(
    record: CommitRecord, mask: Path, case: Case | None, *, packs: bool
) -> tuple[tuple[View, ...], PackedVolume | None]:
    labels, header = read_labels(mask, gate=TRAINING_GATE)
    turned, _ = turn(labels, header, VIEW_CODE)
    values = np.asarray(turned.array[0])
    colors = label_colors([item.name for item in record.labels])
    shown = {value: (item.name, colors[item.name]) for item in record.labels
             for value in item.values}  # fmt: skip
    by_value = {value: color for value, (_, color) in shown.items()}
    under = None
    if case is not None:
        # On the file's own grid, as the mask is.
        image, source = read_image(case.images[0], gate=case.gate(TRAINING_GATE))
        over = turn(image, source, VIEW_CODE)[0].array[0]
        under = np.asarray(over, np.float32) if over.shape == values.shape else None
    views = draw_case(under, values, turned.geometry.spacing_mm, by_value)
    return views, pack(under, values, turned.geometry, shown) if packs else None
