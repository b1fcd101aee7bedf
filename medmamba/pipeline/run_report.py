"""The page about a run, made as it ends."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from medmamba.dataset import Case
from medmamba.inference.journal import RUNS_FOLDER
from medmamba.inference.overlap import Work
from medmamba.reporting import REPORT_FILE, write_page

if TYPE_CHECKING:
    from medmamba.inference.assignment import PredictionRun

logger = logging.getLogger(__name__)

MAX_REPORTED = 20_000
"""Cases of a run whose records may be in memory at once for a page."""


def report_run(
    run: "PredictionRun", cases: Iterable[Work], *, interactive: bool = False
) -> Path | None:
    """Write ``run/<run>/report.html``; None where there is nothing to show, or too much.

    Masks are done by then, so no trouble here may cost them: it is logged.
    """
    if run.total > MAX_REPORTED:
        logger.warning("no report of a run over %d cases; its table is summary.csv", MAX_REPORTED)
        return None
    path = run.folder / RUNS_FOLDER / run.run_id / REPORT_FILE
    try:
        known = {case.id: case for case in cases if isinstance(case, Case)}
        records = run.records
        if not records:
            return None
        return write_page(
            path, records, run.folder, known, title=run.run_id, interactive=interactive
        ).path
    except Exception as problem:
        kind = type(problem).__name__
        logger.warning("no report of the run (%s); `medmamba report` tries again", kind)
        logger.debug("%s could not be made", path, exc_info=True)
        return None
