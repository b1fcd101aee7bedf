"""What runs in a worker of a Ray cluster: one model, loaded once, and cases one by one.

The driver is ``cluster_prediction``. No Ray here, and torch only with the model.
"""

import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medmamba import __version__
from medmamba.dataset import Case
from medmamba.errors import BundleError, SecurityError
from medmamba.files import to_plain
from medmamba.inference.casework import CaseWork
from medmamba.inference.draining import DrainRequest
from medmamba.inference.job import CasePredictor
from medmamba.inference.journal import set_aside
from medmamba.inference.ledger import Ledger
from medmamba.inference.worker import WorkerSetup

MakePredictor = Callable[[WorkerSetup], tuple[CasePredictor, dict[str, Any]]]


class Segmenter:
    """A worker's own state.

    Two cases may be in work at once, of which one is in the network.
    """

    def __init__(self) -> None:
        self._network = threading.Lock()

    def join(self, setup: WorkerSetup, make: MakePredictor, version: str) -> dict[str, Any]:
        """Load the model and say what computes.

        Raises:
            BundleError: another version of medmamba, or another model, than the driver's.
            MedMambaError: the model cannot be used here.
        """
        if version != __version__:
            raise BundleError(
                f"a worker has medmamba {__version__}, the driver {version}. Install the same "
                "version on all machines.",
                code="E_VERSION_MIXED",
            )
        try:
            predictor, about = make(setup)
        except SecurityError as error:
            raise BundleError(f"a worker: {error.message}", code="E_VERSION_MIXED") from error
        self._setup = setup
        self._predictor = predictor
        self._parameters, self._numerics = predictor.parameters(), predictor.numerics()
        return {
            "parameters": to_plain(self._parameters),
            "numerics": to_plain(self._numerics),
            "about": about,
            "pid": os.getpid(),
            "host": platform.node(),
        }

    def segment(self, case: Case) -> dict[str, Any]:
        """Take a case to its record, and return that with the events for the journal."""
        setup, events = self._setup, _Events(self._setup.run_folder)
        ledger = Ledger(
            setup.folder, run=events, model=setup.model, parameters=self._parameters,
            numerics=self._numerics, overwrite=setup.overwrite,
        )  # fmt: skip
        work = CaseWork(
            ledger, self._predictor, gate=setup.gate, segments=setup.segments,
            channel_names=setup.channel_names, orientation=setup.orientation,
            budget_bytes=setup.budget_bytes,
        )  # fmt: skip
        job = work.read(case)
        with self._network:
            job = work.infer(job, DrainRequest(setup.grace_s))
        job = work.export(job)
        return {
            "record": None if job.record is None else to_plain(job.record),
            "short_of_memory": job.short_of_memory,
            "events": events.noted,
        }


class _Events:
    """A run whose journal is written by the driver."""

    def __init__(self, folder: Path) -> None:
        self.noted: list[tuple[str, dict[str, Any]]] = []
        self._folder = folder

    def log(self, event: str, **values: Any) -> None:
        """Note one event."""
        self.noted.append((event, values))

    def set_aside(self, path: Path) -> None:
        """Keep a mask that no record vouches for as evidence."""
        set_aside(path, self._folder)
