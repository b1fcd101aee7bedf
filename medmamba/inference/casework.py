"""One case in three stages, each of which ends well or in a record that says why not.

``read`` (resume check, load, preprocess), ``infer`` (networks), ``export`` (restore, measure,
write, commit) run in different threads; a job passes from one to the next and is never shared.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from medmamba.dataset import Case, load_case
from medmamba.errors import EnvironmentFault, GeometryError, InputError, MedMambaError
from medmamba.failpoints import failpoint
from medmamba.files import replace_atomic, temporary_path
from medmamba.inference.draining import CaseAbandonedError, DrainRequest
from medmamba.inference.job import CasePredictor, Job, Segmented
from medmamba.inference.ledger import PROBABILITIES_SUFFIXES, SEGMENTATION_SUFFIX, Ledger
from medmamba.inference.records import (
    CaseError,
    CommitRecord,
    OutputFile,
    Status,
    describe_file,
    describe_labels,
    identify,
    work_key,
)
from medmamba.io import (
    DEFAULT_GATE,
    Gate,
    SourceHeader,
    box_turned_back,
    labels_on_file_grid,
    read_header,
    write_labels,
)
from medmamba.io.dicom_seg import SegmentLabel, write_segmentation
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.restore import OnProbabilities

logger = logging.getLogger(__name__)

BYTES_PER_VOXEL_READ = 8
"""A float32 image and its preprocessed copy; resampling to a finer grid takes more."""


MOSTLY_PADDING = 0.5
"""Images smaller than this share of the patch along an axis are warned of; cases a little smaller
than the patch are the rule, since planners round patches up."""


HOST_ALLOCATOR = "DefaultCPUAllocator"
"""Stands in the RuntimeError by which torch says that the host has too little memory."""

OnTiles = Callable[[str, int, int], None]
"""Called within a case with (case id, tiles done, tiles in all)."""


class CaseWork:
    """The stages of a case, for one model and one output folder.

    Args:
        ledger: the records of the output folder.
        predictor: the networks, with preprocessing and restoring.
        gate: limits and permissions of reading.
        segments: what DICOM outputs hold; by label names when empty.
        on_tiles: called within a case.
        channel_names: what the model calls its channels.
        orientation: where axes must point for the networks; as stored when empty.
        budget_bytes: memory that a case may take; None for no limit.
    """

    def __init__(
        self,
        ledger: Ledger,
        predictor: CasePredictor,
        *,
        gate: Gate = DEFAULT_GATE,
        segments: Sequence[SegmentLabel] = (),
        on_tiles: OnTiles | None = None,
        channel_names: Sequence[str] = (),
        orientation: str = "",
        budget_bytes: int | None = None,
    ) -> None:
        self._channel_names = tuple(channel_names)
        self._orientation = orientation or None
        self._budget_bytes = budget_bytes
        self._ledger = ledger
        self._predictor = predictor
        self._gate = gate
        self._segments = tuple(segments) or tuple(
            SegmentLabel(name=name, values=values)
            for name, values in predictor.label_map.foreground.items()
        )
        self._on_tiles = on_tiles

    def read(self, case: Case) -> Job:
        """Decide whether there is work to do, and bring the case to the working grid."""
        job = Job(case=case)
        with _Guard(self, job, "read"):
            failpoint("before_case", case.id)
            before = _states(case.images)
            job.inputs = identify(case.images)
            job.key = work_key(job.inputs, self._ledger.model, self._ledger.parameters)
            job.record = self._ledger.kept(case, job.key)
            if job.record is None:
                self._require_room(case)
                with job.watch.time("read"):
                    image, _, job.header = load_case(
                        case,
                        channels=self._predictor.channels,
                        dimension=len(self._predictor.patch_size),
                        gate=self._gate,
                        channel_names=self._channel_names,
                        orientation=self._orientation,
                    )
                if _states(case.images) != before:
                    raise InputError(
                        f"case {case.id}: a file changed between being hashed and being read. "
                        "Wait until it is complete.",
                        code="E_IO_CHANGED",
                    )
                with job.watch.time("preprocess"):
                    job.prepared = self._predictor.prepare(image)
                shape = job.prepared.data.shape[1:]
                job.header = _note_padding(job.header, shape, self._predictor.patch_size)
        return job

    def expected_bytes(self, case: Case) -> int:
        """Return the memory that reading a case will take, as far as its headers say."""
        try:
            headers = [read_header(path, gate=case.gate(self._gate)) for path in case.images]
        except (MedMambaError, OSError):
            return 0  # reading it will say what is wrong
        voxels = sum(prod(header.geometry.shape) * header.channels for header in headers)
        return voxels * BYTES_PER_VOXEL_READ

    def _require_room(self, case: Case) -> None:
        """Refuse a case that would exceed the memory there is, before anything is allocated."""
        if self._budget_bytes is None:
            return
        needed = self.expected_bytes(case)
        if needed > self._budget_bytes:
            raise InputError(
                f"case {case.id}: takes at least {needed / 2**30:.1f} GiB of memory, "
                f"{self._budget_bytes / 2**30:.1f} GiB are there or allowed (--max-ram). Crop the "
                "image or use a larger machine.",
                code="E_LIMIT_RAM",
            )

    def infer(self, job: Job, drain: DrainRequest) -> Job:
        """Run the networks, unless a signal asks to stop and the case would take too long."""
        if job.over:
            return job
        with _Guard(self, job, "infer"), job.watch.time("infer"):
            assert job.prepared is not None
            failpoint("before_infer", job.case.id)
            job.inferred = self._predictor.infer(
                job.prepared,
                on_tiles=self._watch(job.case.id, drain),
                **self._keep_probabilities(job, job.prepared.record),
            )
        job.prepared = None
        return job

    def _keep_probabilities(self, job: Job, record: UndoRecord) -> dict[str, OnProbabilities]:
        """Open a file for the probabilities where they are asked for."""
        kind = self._ledger.parameters.get("probabilities", "none")
        if kind == "none":
            return {}
        # Loads a library that few need.
        from medmamba.preprocessing.probability_file import ProbabilityArchive, ProbabilityFile

        label_map = self._predictor.label_map
        foreground = list(label_map.foreground)
        names = foreground if label_map.has_regions else ["background", *foreground]
        path = temporary_path(self._probabilities_path(job.case))
        if kind == "npz":
            header, shape = job.header, record.geometry.shape
            assert header is not None
            stored = tuple(shape[header.axis_order.index(axis)] for axis in range(3))
            job.probabilities = archive = ProbabilityArchive(
                path,
                shape=(len(names), *stored),
                background_first=not label_map.has_regions,
            )
            return {
                "on_probabilities": lambda box, values: archive.write(
                    *box_turned_back(box, values, shape, header)
                )
            }
        job.probabilities = ProbabilityFile(
            path,
            names=names,
            geometry=record.geometry,
            kind=kind,
            along=record.transpose_forward[0],
            background_first=not label_map.has_regions,
        )
        return {"on_probabilities": job.probabilities.write}

    def _probabilities_path(self, case: Case) -> Path:
        plain, archive = PROBABILITIES_SUFFIXES
        kind = self._ledger.parameters.get("probabilities")
        return self._ledger.folder / f"{case.id}{archive if kind == 'npz' else plain}"

    def _watch(self, case_id: str, drain: DrainRequest) -> Callable[[int, int], None]:
        start = time.monotonic()

        def after_tiles(done: int, total: int) -> None:
            if self._on_tiles is not None:
                self._on_tiles(case_id, done, total)
            drain.check(done=done, total=total, elapsed_s=time.monotonic() - start)

        return after_tiles

    def export(self, job: Job) -> Job:
        """Write mask and record."""
        if job.over:
            return job
        with _Guard(self, job, "export"):
            failpoint("before_export", job.case.id)
            assert job.inferred is not None
            assert job.header is not None
            with job.watch.time("restore"):
                job.segmented = self._predictor.restore(job.inferred)
            job.inferred = None
            self._commit(job, job.segmented, job.header)
        job.segmented = None
        return job

    def fail(self, job: Job, status: Status, error: CaseError) -> CommitRecord:
        """Record a case that has no mask."""
        return self._ledger.end(job, status, error)

    def _commit(self, job: Job, found: Segmented, header: SourceHeader) -> None:
        label_map = self._predictor.label_map
        stored = labels_on_file_grid(found.labels, header)
        statistics = describe_labels(
            stored, header.geometry, label_map, found.confidence, found.usual
        )
        path = self._ledger.folder / f"{job.case.id}{mask_suffix(header)}"
        with self._ledger.lock():
            self._ledger.clear(job.case.id, keep=path.name)
            with job.watch.time("write"):
                probabilities = self._commit_probabilities(job)
                segmentation = self._write_segmentation(job.case, stored, header)
                write_labels(path, found.labels, header, label_names=dict(label_map.foreground))
            output = _describe_written(path)
            job.record = self._ledger.record(
                job,
                output=output,
                segmentation=segmentation,
                probabilities=probabilities,
                labels=statistics,
            )
            self._ledger.store(job.record)

    def _commit_probabilities(self, job: Job) -> OutputFile | None:
        if job.probabilities is None:
            return None
        job.probabilities.finish()
        written, path = job.probabilities.path, self._probabilities_path(job.case)
        replace_atomic(path, lambda temporary: written.replace(temporary))
        job.probabilities = None
        return _describe_written(path)

    def _write_segmentation(
        self, case: Case, stored: NDArray[Any], header: SourceHeader
    ) -> OutputFile | None:
        """Write the mask as a DICOM object too where the image was one."""
        if header.format != "dicom":
            return None
        path = self._ledger.folder / f"{case.id}{SEGMENTATION_SUFFIX}"
        write_segmentation(
            path,
            stored,
            case.images[0],
            self._segments,
            algorithm=self._ledger.model.name,
            gate=case.gate(self._gate),
        )
        return _describe_written(path)


def _describe_written(path: Path) -> OutputFile:
    """Describe a file just written.

    Raises:
        EnvironmentFault: another run took it away, which happens where folders have no locks.
    """
    try:
        return describe_file(path)
    except FileNotFoundError as error:
        raise EnvironmentFault(
            f"{path.name}: vanished after it was written; another run works on the same case in "
            "the same folder. Run again when it has ended.",
            code="E_OUT_SHARED",
        ) from error


def _states(paths: Sequence[Path]) -> list[tuple[int, int, int]]:
    """Size, time of change and number of every file, of a folder those in it; none of one gone."""
    files = chain.from_iterable(
        sorted(path.iterdir()) if path.is_dir() else [path] for path in paths
    )
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            state = file.stat()
            found.append((state.st_size, state.st_mtime_ns, state.st_ino))
    return found


def _note_padding(
    header: SourceHeader, shape: tuple[int, ...], patch_size: tuple[int, ...]
) -> SourceHeader:
    """Warn of an image so small that most of what the network sees is padding."""
    seen = shape[-len(patch_size) :]
    if all(size >= MOSTLY_PADDING * patch for size, patch in zip(seen, patch_size, strict=True)):
        return header
    sizes, patch = ("x".join(map(str, values)) for values in (seen, patch_size))
    text = f"W_SHAPE_SMALL: {sizes} voxels on the model's grid, its patch is {patch}: padded"
    return replace(header, warnings=(*header.warnings, text))


class _Guard(AbstractContextManager[None]):
    """Turns whatever goes wrong in a stage into the record of its case."""

    def __init__(self, work: CaseWork, job: Job, stage: str) -> None:
        self._work = work
        self._job = job
        self._stage = stage

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Swallow what is the case's fault or ours; let go what ends the process."""
        if problem is None or not isinstance(problem, Exception):
            return False
        self._job.prepared = None
        self._job.inferred = None
        self._job.segmented = None
        if self._job.probabilities is not None:
            self._job.probabilities.path.unlink(missing_ok=True)
            self._job.probabilities = None
        if isinstance(problem, CaseAbandonedError):
            self._job.abandoned = True
            return True
        status, code, message = self._judge(problem)
        error = CaseError(code=code, stage=self._stage, message=message)
        self._job.record = self._work.fail(self._job, status, error)
        return True

    def _judge(self, problem: Exception) -> tuple[Status, str, str]:
        if isinstance(problem, InputError | GeometryError):
            return "rejected", problem.code, problem.message
        if isinstance(problem, MedMambaError):
            return "failed", problem.code, problem.message
        if isinstance(problem, MemoryError) or HOST_ALLOCATOR in str(problem):
            self._job.short_of_memory = True
            return (
                "failed",
                "E_MEM_HOST",
                f"case {self._job.case.id}: host memory ran out during {self._stage}. "
                "Use a machine with more memory.",
            )
        if _is_device_loss(problem):
            self._job.device_lost = True
            text = f"case {self._job.case.id}: the device failed during {self._stage} ({problem})."
            return (
                "failed",
                "E_DEVICE_LOST",
                f"{text} Run again; see the system's log if it recurs.",
            )
        logger.exception("case %s: unexpected error during %s", self._job.case.id, self._stage)
        text = f"case {self._job.case.id}: {type(problem).__name__} during {self._stage}: {problem}"
        return "failed", "E_INTERNAL", text


def _is_device_loss(problem: Exception) -> bool:
    """Tell whether a GPU's context is beyond use: no later call of this process will succeed."""
    return type(problem).__name__ == "AcceleratorError" or str(problem).startswith("CUDA error")


def mask_suffix(header: SourceHeader) -> str:
    """Return the file ending of a mask: NIfTI is compressed, others keep theirs."""
    return ".nii.gz" if header.format in ("nifti", "dicom") else header.suffix
