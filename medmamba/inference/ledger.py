"""What stands in the output folder about each case: commit records, and masks nobody vouches for.

A case without a mask is recorded here too, by whoever knows of it: the stages of the case, the
listing that turned it away, or the supervisor of a process that died over it. No torch.
"""

import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from medmamba.dataset import Case, Rejection, safe_id
from medmamba.failpoints import failpoint
from medmamba.files import to_json, write_atomic
from medmamba.inference.folder_lock import lock_folder
from medmamba.inference.job import Job
from medmamba.inference.journal import RUNS_FOLDER, RunLog
from medmamba.inference.records import (
    CaseError,
    CommitRecord,
    LabelStatistics,
    ModelIdentity,
    OutputFile,
    Status,
    TileCount,
    read_record,
    redacted,
    still_holds,
)
from medmamba.io import FORMATS

SEGMENTATION_SUFFIX = ".seg.dcm"
PROBABILITIES_SUFFIXES = ("_prob.b2nd", ".npz")
"""The second as nnU-Net names them."""
PROPERTIES_SUFFIX = ".pkl"
"""Of what nnU-Net wants beside its probabilities; nothing here ever reads it."""


class Ledger:
    """The records of an output folder, for one model.

    Args:
        folder: where masks and records are.
        run: the run that is told of every change.
        model: identity that goes into records.
        parameters: everything that decides which labels come out.
        numerics: what computes.
        overwrite: ``never``, ``stale`` or ``always``; see ``engine.predict_cases``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        run: RunLog,
        model: ModelIdentity,
        parameters: dict[str, Any],
        numerics: dict[str, Any],
        overwrite: str = "stale",
    ) -> None:
        self.folder = folder
        self.run = run
        self.model = model
        self.parameters = parameters
        self._numerics = numerics
        self._overwrite = overwrite

    def kept(self, case: Case, key: str) -> CommitRecord | None:
        """Return the record of a case that need not be done again, None where it must."""
        record = read_record(self._record_path(case.id))
        if record is None or not is_done(record, self.folder, key, self._overwrite):
            return None
        self.run.log("skipped", case=case.id)
        return replace(record, status="skipped")

    def refuse(self, rejection: Rejection) -> CommitRecord:
        """Record a case that was turned away when inputs were listed."""
        error = CaseError(code=rejection.code, stage="list", message=rejection.message)
        return self.end(Job(case=Case(id=safe_id(rejection.id), images=())), "rejected", error)

    def end(self, job: Job, status: Status, error: CaseError) -> CommitRecord:
        """Record a case that has no mask; an old one is set aside, for it belongs to nothing."""
        record = self.record(job, failure=status, error=error)
        with self.lock():
            self.clear(job.case.id)
            self.store(record)
        return record

    def lock(self) -> AbstractContextManager[None]:
        """Keep other runs from committing into the same folder at the same moment."""
        return lock_folder(self.folder / RUNS_FOLDER)

    def clear(self, case_id: str, *, keep: str = "") -> None:
        """Make the case count as not done, and set aside masks that no record vouches for.

        Args:
            case_id: the case.
            keep: name of the mask that is about to be replaced; if it is as we wrote it, it goes
                when the new one is there.
        """
        old = read_record(self._record_path(case_id))
        vouched = old.output.name if old and old.output and still_holds(old, self.folder) else ""
        self._record_path(case_id).unlink(missing_ok=True)
        if vouched:
            # Large, and of no use without the mask that it belongs to.
            for suffix in (*PROBABILITIES_SUFFIXES, PROPERTIES_SUFFIX):
                (self.folder / f"{case_id}{suffix}").unlink(missing_ok=True)
        for suffix in (*FORMATS, SEGMENTATION_SUFFIX, *PROBABILITIES_SUFFIXES):
            mask = self.folder / f"{case_id}{suffix}"
            if mask.exists() and not mask.name == vouched == keep:
                self.run.set_aside(mask)
        failpoint("after_clear", case_id)

    def record(
        self,
        job: Job,
        *,
        failure: Status | None = None,
        error: CaseError | None = None,
        output: OutputFile | None = None,
        segmentation: OutputFile | None = None,
        probabilities: OutputFile | None = None,
        labels: tuple[LabelStatistics, ...] = (),
    ) -> CommitRecord:
        """Describe what became of a case; without ``failure`` it has a mask, the ``output``."""
        warnings = _warnings(job, labels)
        record = CommitRecord(
            case_id=job.case.id,
            status=failure or ("ok_with_warnings" if warnings else "ok"),
            warnings=warnings,
            error=error,
            key=job.key,
            inputs=job.inputs,
            geometry=None if job.header is None else job.header.geometry,
            model=self.model,
            parameters=self.parameters,
            numerics=self._numerics,
            fallbacks=() if job.segmented is None else job.segmented.fallbacks,
            tiles=TileCount() if job.segmented is None else job.segmented.tiles,
            labels=labels,
            output=output,
            segmentation=segmentation,
            probabilities=probabilities,
            timings_s=dict(job.watch.seconds),
            peak_memory_bytes=peak_memory_bytes(),
        )
        return redacted(record, job.case)

    def store(self, record: CommitRecord) -> None:
        """Commit a record, which must come after everything it speaks of."""
        failpoint("before_record", record.case_id)
        write_atomic(self._record_path(record.case_id), to_json(record))
        code = record.error.code if record.error else ""
        output = record.output.sha256 if record.output else ""
        inputs = [identity.sha256 for identity in record.inputs]
        self.run.log(record.status, case=record.case_id, error=code, inputs=inputs, output=output)

    def _record_path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}.json"


def is_done(record: CommitRecord, folder: Path, key: str, overwrite: str) -> bool:
    """Tell whether a case with this record need not be done again for the work of ``key``."""
    if overwrite == "always" or (record.key != key and overwrite != "never"):
        return False
    return still_holds(record, folder)


def peak_memory_bytes() -> int:
    """Return the most memory this process has held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _warnings(job: Job, labels: tuple[LabelStatistics, ...]) -> tuple[str, ...]:
    known = () if job.header is None else job.header.warnings
    warnings = [text for text in known if text.startswith("W_")]
    if job.segmented is not None:
        warnings += [f"W_FALLBACK: {text}" for text in job.segmented.fallbacks]
    if labels and not any(item.voxels for item in labels):
        warnings.append("W_MASK_EMPTY: the networks found no label anywhere")
    return tuple(warnings)
