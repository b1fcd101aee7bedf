"""A run over cases that are all done: said again by their hashes, without a model. No torch.

Which labels come out depends on parameters that only a loaded model knows, such as the precision
that its gate allows. An earlier run into the same folder that was asked for the same, of the same
model and machine, wrote them down.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba import __version__
from medmamba.dataset import Case, Rejection
from medmamba.errors import MedMambaError
from medmamba.files import to_plain
from medmamba.inference.assignment import Assignment, PredictionRun, Tally
from medmamba.inference.draining import DrainRequest
from medmamba.inference.engine import finish_run
from medmamba.inference.history import manifests
from medmamba.inference.journal import Run
from medmamba.inference.ledger import Ledger, is_done
from medmamba.inference.records import (
    ModelIdentity,
    identify,
    read_record,
    work_key,
)


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What an earlier run computed with, and the key of every case."""

    parameters: dict[str, Any]
    keys: dict[str, str]


def skip_all(
    assignment: Assignment,
    folder: Path,
    *,
    model: ModelIdentity,
    overwrite: str,
    drain: DrainRequest,
) -> PredictionRun | None:
    """Report every case as skipped if all of them are done; None, and nothing done, if not.

    Inputs and masks are compared by their hashes, as when a model is loaded.

    Raises:
        EnvironmentFault: the folder cannot be written.
        UsageError: the folder holds the inputs.
    """
    if overwrite == "always" or not isinstance(assignment.cases, Sequence):
        return None
    cases = [case for case in assignment.cases if isinstance(case, Case)]
    if not cases or len(cases) < len(assignment.cases):
        return None
    assignment.prepare_folder(folder)
    done = _all_done(cases, assignment, folder, model, overwrite, drain)
    if done is None:
        return None
    run = Run(folder, on_event=assignment.on_event)
    ledger = Ledger(
        folder, run=run, model=model, parameters=done.parameters, numerics={}, overwrite=overwrite
    )
    tally = Tally(assignment)
    with run:
        run.log("started", **assignment.describe())
        for item in assignment.work:
            if isinstance(item, Rejection):
                tally.report(ledger.refuse(item))
            elif isinstance(item, Case):
                record = ledger.kept(item, done.keys[item.id])
                if record is None:  # changed within this moment
                    raise MedMambaError(
                        f"case {item.id}: its mask or record changed while it was looked at. "
                        "Run again.",
                        code="E_IO_CHANGED",
                    )
                tally.report(record)
        exit_code = drain.exit_code or tally.exit_code
        finish_run(run, folder, exit_code, model, done.parameters, overwrite, assignment.request)
    return tally.outcome(run.run_id, folder, exit_code)


def _all_done(
    cases: Sequence[Case],
    assignment: Assignment,
    folder: Path,
    model: ModelIdentity,
    overwrite: str,
    drain: DrainRequest,
) -> _Done | None:
    if not all((folder / f"{case.id}.json").is_file() for case in cases):
        return None  # before anything is hashed
    parameters = _parameters_of(folder, model, assignment.request)
    if parameters is None:
        return None
    keys = {}
    for case in cases:
        record = read_record(folder / f"{case.id}.json")
        if drain.requested or record is None or not record.succeeded:
            return None
        try:
            keys[case.id] = work_key(identify(case.images), model, parameters)
        except MedMambaError:
            return None
        if not is_done(record, folder, keys[case.id], overwrite):
            return None
    return _Done(parameters=parameters, keys=keys)


def _parameters_of(
    folder: Path, model: ModelIdentity, request: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the latest run that was asked for the same computed with."""
    asked = to_plain(dict(request))
    for manifest in manifests(folder):
        if manifest.get("request") != asked or manifest.get("version") != __version__:
            continue
        parameters = manifest.get("parameters")
        if manifest.get("model", {}).get("sha256") == model.sha256 and parameters:
            return dict(parameters)
    return None
