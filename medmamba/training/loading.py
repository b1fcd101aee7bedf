"""Work ahead: one thread makes the next batches while the network computes.

Batches are pure functions of their number, so working ahead never changes what is trained. A
batch that cannot be made is tried once more and then ends the run with the case's name and the
loader's own traceback; the consumer never waits for a dead thread.
"""

import logging
import queue
import threading
import time
from types import TracebackType

import torch

from medmamba.errors import EnvironmentFault, TrainingError
from medmamba.training.sampling import Batch, PatchSampler
from medmamba.training.step_graph import recording

logger = logging.getLogger(__name__)

AHEAD = 3
"""Batches made ahead: enough to hide the spread between cheap and rotated ones."""

POLL_S = 0.5
SLOW_S = 30.0
"""After this long without a batch, say which case is being read."""

STALLED_S = 900.0
"""After this long the read is given up: a run that waits for a dead disk helps nobody."""

CLOSE_S = 10.0
"""A thread that is stuck in a read is left behind after this long; it ends with the process."""

LOADER_THREADS = 1


class BatchLoader:
    """Hands out batches ``first``, ``first + 1``, ... in order; a context manager.

    Args:
        sampler: makes a batch from its number.
        first, stop: numbers of the first batch and of the one after the last.
        samples: places of the batch this rank makes; all when None.
        ahead: batches kept ready.
    """

    def __init__(
        self,
        sampler: PatchSampler,
        *,
        first: int,
        stop: int | None = None,
        samples: tuple[int, ...] | None = None,
        ahead: int = AHEAD,
    ) -> None:
        self._sampler = sampler
        self._first = first
        self._stop = stop
        self._samples = samples
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="medmamba-loader", daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> "BatchLoader":
        threads = torch.get_num_threads()
        self._thread.start()
        # The loader's setting of its own thread count also becomes the default of threads born
        # later, so the caller's is set again after it.
        self._started.wait()
        torch.set_num_threads(threads)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        deadline = time.monotonic() + CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._drain()
            self._thread.join(timeout=POLL_S / 10)
        if self._thread.is_alive():
            logger.warning("case %s is still being read; left behind", self._sampler.current_case)

    def next(self) -> Batch:
        """Return the next batch.

        Raises:
            TrainingError: it could not be made; the cause is chained, the case named.
        """
        waited = 0.0
        while True:
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                waited += POLL_S
                self._check_alive(waited)
                continue
            if isinstance(item, BaseException):
                raise self._failure(item) from item
            return item

    def _check_alive(self, waited: float) -> None:
        if not self._thread.is_alive() and self._queue.empty():
            raise TrainingError(
                f"case {self._sampler.current_case}: the loader ended without a batch. "
                "Resume from the latest checkpoint.",
                code="E_TRAIN_LOADER",
            )
        if waited >= STALLED_S:
            raise TrainingError(
                f"case {self._sampler.current_case}: no batch for {waited:.0f} s, its read "
                "hangs. Check the disk of the preprocessed data, then go on with --resume.",
                code="E_TRAIN_LOADER",
            )
        if waited % SLOW_S < POLL_S and waited >= SLOW_S:
            logger.warning("waiting for case %s for %.0f s", self._sampler.current_case, waited)

    def _failure(self, error: BaseException) -> Exception:
        case = self._sampler.current_case
        if isinstance(error, MemoryError):
            return EnvironmentFault(
                f"case {case}: not enough memory to make a batch. Use a smaller batch.",
                code="E_MEM_HOST",
            )
        return TrainingError(
            f"case {case}: its patch could not be read or augmented "
            f"({type(error).__name__}: {error}). Preprocess this case again or remove it.",
            code="E_TRAIN_LOADER",
        )

    def _work(self) -> None:
        torch.set_num_threads(LOADER_THREADS)
        self._started.set()
        number = self._first
        while not self._closing.is_set() and (self._stop is None or number < self._stop):
            try:
                item: Batch | BaseException = self._make(number)
            except BaseException as error:
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return
            number += 1

    def _make(self, number: int) -> Batch:
        try:
            with recording:
                return self._sampler.batch(number, self._samples)
        except Exception as error:
            logger.warning(
                "case %s: making batch %d failed (%s: %s); trying once more",
                self._sampler.current_case, number, type(error).__name__, error,
            )  # fmt: skip
            with recording:
                return self._sampler.batch(number, self._samples)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue
            return

    def _drain(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return
