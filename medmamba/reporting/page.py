"""Build ``report.html`` from commit records, of a run as it ends or of a folder at any time.

Nothing is segmented again: volumes, confidence and warnings are those of the records, pictures are
drawn from the masks, over the images where those are known.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba import __version__
from medmamba.dataset import Case, find_cases
from medmamba.dataset.redaction import read_key
from medmamba.errors import UsageError
from medmamba.files import to_csv, to_plain, write_atomic
from medmamba.inference.journal import SUMMARY_COLUMNS, summary_rows
from medmamba.inference.records import CommitRecord, read_record, records_folder
from medmamba.reporting.entries import Entry, LabelLine, make_entries
from medmamba.reporting.template import PAGE, SCRIPT, STYLE
from medmamba.reporting.viewer import STARTER, VIEWER_STYLE, licences, policy_hash, require_viewer

REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.csv"
MAX_TABLE_LABELS = 12
"""More columns than this cannot be read; every case lists all of its labels."""


@dataclass(frozen=True, kw_only=True)
class ReportOutcome:
    """What was written.

    Args:
        path: the page.
        cases: records it is about.
        pictures: cases with pictures.
    """

    path: Path
    cases: int
    pictures: int


def write_report(
    folder: Path,
    *,
    images: Path | None = None,
    interactive: bool = False,
    key: Path | None = None,
    on_case: Callable[[int, int], None] | None = None,
) -> ReportOutcome:
    """Write the page and the table of everything in an output folder.

    Args:
        folder: where masks and records are.
        images: what was predicted, to show the images under the masks.
        interactive: put the viewer and small volumes into the page.
        key: file of the key that cases were renamed by, to find their images.
        on_case: called after each case with (done, total).

    Raises:
        UsageError: the folder holds no record, or the key cannot be read.
        EnvironmentFault: the folder cannot be written, or the viewer is not installed.
        SecurityError: the viewer's file is not the pinned one.
    """
    folder = records_folder(folder)
    records = [
        record
        for path in sorted(folder.glob("*.json"))
        if (record := read_record(path)) is not None
    ]
    if not records:
        raise UsageError(f"{folder}: holds no record of a predicted case. Give the output folder.")
    write_atomic(folder / SUMMARY_FILE, to_csv(SUMMARY_COLUMNS, summary_rows(records)))
    return write_page(
        folder / REPORT_FILE, records, folder, _cases_of(images, records, key),
        interactive=interactive, on_case=on_case,
    )  # fmt: skip


def write_page(
    path: Path,
    records: Sequence[CommitRecord],
    folder: Path,
    cases: Mapping[str, Case],
    *,
    title: str = "",
    interactive: bool = False,
    on_case: Callable[[int, int], None] | None = None,
) -> ReportOutcome:
    """Write a page about these records.

    Args:
        path: of the page.
        records: what became of the cases.
        folder: where the masks are.
        cases: images by case, as far as they are known.
        title: name of the run, if the page is about one.
        interactive: put the viewer and small volumes into the page.
        on_case: called after each case with (done, total).

    Raises:
        EnvironmentFault: the page cannot be written, or the viewer is not installed.
        SecurityError: the viewer's file is not the pinned one.
    """
    scripts = [SCRIPT, *((require_viewer(), STARTER) if interactive else ())]
    entries = make_entries(records, folder, cases, on_case, interactive=interactive)
    write_atomic(path, _render(records, entries, title, scripts))
    pictured = sum(bool(entry.views) for entry in entries)
    return ReportOutcome(path=path, cases=len(records), pictures=pictured)


def _render(
    records: Sequence[CommitRecord], entries: list[Entry], title: str, scripts: list[str]
) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    counts = Counter(record.status for record in records)
    names = list(dict.fromkeys(line.measured.name for entry in entries for line in entry.labels))
    columns = names[:MAX_TABLE_LABELS]
    return environment.from_string(PAGE).render(
        entries=entries,
        columns=columns,
        cells=[_cells(entry, columns) for entry in entries],
        total=len(records),
        counts=sorted(counts.items()),
        flagged=sum(bool(entry.flags) for entry in entries if entry.error is None),
        shows_confidence=any(entry.confidence is not None for entry in entries),
        models=sorted({record.model.name for record in records if record.model}),
        more_labels=len(names) - len(columns),
        title=title,
        scripts=scripts,
        script_hashes=[policy_hash(script) for script in scripts],
        style=STYLE + VIEWER_STYLE if len(scripts) > 1 else STYLE,
        licences=licences() if len(scripts) > 1 else "",
        version=__version__,
        anchor=_anchor,
        plain=to_plain,
    )


def _anchor(name: str) -> str:
    """An identifier for any name, the same in every page."""
    return "case-" + hashlib.sha256(name.encode()).hexdigest()[:12]


def _cells(entry: Entry, columns: list[str]) -> list[LabelLine | None]:
    found = {line.measured.name: line for line in entry.labels}
    return [found.get(name) for name in columns]


def _cases_of(
    images: Path | None, records: Sequence[CommitRecord], key: Path | None
) -> Mapping[str, Case]:
    if images is None:
        return {}
    channels = max((len(record.inputs) for record in records), default=1) or 1
    listing = find_cases(images, channels=channels)
    if key is not None:
        listing = read_key(key).listing(listing)
    return {case.id: case for case in listing.cases}
