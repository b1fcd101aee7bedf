"""What a run writes besides its checkpoints: settings, log and curves, on the rank that leads."""

from typing import Any

import torch

from medmamba.training import board
from medmamba.training.progress import Log, RunLog, SilentLog, write_run_record
from medmamba.training.run_files import CURVES, LOG, RUN_RECORD, RunState, read_log
from medmamba.training.setup import TrainingSetup

CURVES_EVERY_S = 300.0
"""Drawing costs about a second, so curves are redrawn this often, and at the end."""


class RunDiary:
    """The files of a run that people read.

    Args:
        setup: of the run.
        leads: whether this process writes at all.
        state: where the run begins; the log is cut back to it.
        now: seconds of the run so far.
    """

    def __init__(self, setup: TrainingSetup, *, leads: bool, state: RunState, now: float) -> None:
        self._setup = setup
        self._leads = leads
        self._curves_at = now
        self.log: Log = self._open_log(state) if leads else SilentLog()

    def _open_log(self, state: RunState) -> Log:
        folder = self._setup.run_folder
        log = RunLog(folder / LOG, keep_bytes=state.log_bytes)
        if not self._setup.tensorboard:
            return log
        return board.BoardLog(log, folder / board.FOLDER, first=state.iteration)

    def record_start(self, device: torch.device, settings: dict[str, Any]) -> None:
        """Write ``run.json``."""
        if self._leads:
            path, identity = self._setup.run_folder / RUN_RECORD, self._setup.identity
            write_run_record(path, device=device, identity=identity, settings=settings)

    def draw_curves(self, now: float, *, force: bool = False) -> None:
        """Draw ``curves.png`` anew if the last drawing is some time ago, or by ``force``."""
        if not self._leads or not (force or now - self._curves_at >= CURVES_EVERY_S):
            return
        from medmamba.evaluation.curves import plot_curves

        self._curves_at = now
        self.log.sync()
        folder = self._setup.run_folder
        title = f"{self._setup.network.name}, {'/'.join(folder.parts[-2:])}"
        plot_curves(read_log(folder / LOG), folder / CURVES, title=title)
