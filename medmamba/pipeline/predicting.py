"""predict(): masks for new images from a model folder."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from medmamba.bundle import Bundle, load_bundle
from medmamba.dataset import CaseListing, Rejection, split_acquisitions
from medmamba.dataset.manifest import CaseStream, open_cases
from medmamba.dataset.redaction import read_key
from medmamba.dataset.shards import Shard, parse_shard
from medmamba.errors import UsageError
from medmamba.files import require_writable_folder, to_plain
from medmamba.inference.draining import DEFAULT_GRACE_S, DrainRequest, drain_on_signals
from medmamba.inference.overlap import Work
from medmamba.io import DEFAULT_GATE, Gate
from medmamba.io.viewer_labels import write_viewer_labels
from medmamba.machine import describe_machine
from medmamba.pipeline.bids_layout import BidsLayout
from medmamba.pipeline.cluster import ENGINES, Engine
from medmamba.pipeline.label_forms import segments_of, viewer_labels
from medmamba.pipeline.predictors import describe_settings, make_predictor
from medmamba.pipeline.run_report import report_run
from medmamba.preprocessing.memory_gate import available_bytes
from medmamba.reporting.viewer import require_viewer

if TYPE_CHECKING:
    from medmamba.inference.assignment import Assignment, OnCase, PredictionRun
    from medmamba.inference.casework import OnTiles
    from medmamba.inference.journal import OnEvent
    from medmamba.inference.records import CommitRecord
    from medmamba.inference.worker_process import WorkerProcess

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PredictOutcome:
    """What a run did, case by case.

    Args:
        run: records and exit code.
        report: the page about it; None where none was made.
    """

    run: "PredictionRun"
    report: Path | None = None

    @property
    def exit_code(self) -> int:
        """0 all done, 4 some cases without a mask, 5 none with one, 130 or 143 stopped."""
        return self.run.exit_code

    @property
    def succeeded(self) -> int:
        """Cases that have a mask."""
        return self.run.succeeded

    @property
    def total(self) -> int:
        """Cases asked for."""
        return self.run.total

    @property
    def elapsed_s(self) -> float:
        """Seconds in all."""
        return self.run.elapsed_s

    def summary(self) -> dict[str, Any]:
        """The same as JSON values, with every record."""
        return {
            "folder": str(self.run.folder),
            "run": self.run.run_id,
            "exit_code": self.exit_code,
            "succeeded": self.succeeded,
            "total": self.total,
            "elapsed_s": round(self.elapsed_s, 3),
            "report": None if self.report is None else str(self.report),
            "cases": [to_plain(record) for record in self.run.records],
        }


def predict(
    images: Path | str,
    output: Path | str,
    model: Path | str,
    *,
    mirror: bool = False,
    step: float = 0.5,
    precision: str = "auto",
    device: str = "auto",
    compat: bool = False,
    overwrite: Literal["never", "stale", "always"] = "stale",
    workers: int | None = None,
    shard: str | None = None,
    root: Path | str | None = None,
    follow_links: bool = False,
    redact_ids: Path | str | None = None,
    fail_on: Literal["any", "all", "never"] = "any",
    max_failures: int | None = None,
    timeout_per_case: float | None = None,
    grace_s: float = DEFAULT_GRACE_S,
    supervised: bool = True,
    split: bool = False,
    save_probabilities: Literal["none", "float16", "uint8", "npz"] = "none",
    labels_for: Sequence[str] = (),
    cpu_fallback: bool = False,
    report: bool = True,
    report_interactive: bool = False,
    gate: Gate = DEFAULT_GATE,
    max_ram_bytes: int | None = None,
    metrics: Path | str | None = None,
    engine: Engine | str = "local",
    address: str | None = None,
    incoming: Callable[[Bundle], Iterable[Work]] | None = None,
    layout: Literal["plain", "bids"] = "plain",
    bids_suffixes: Sequence[str] = (),
    on_case: "OnCase | None" = None,
    on_message: Callable[[str], None] | None = None,
    on_event: "OnEvent | None" = None,
) -> PredictOutcome:
    """Segment images; each mask lies on exactly the grid of its image.

    Args:
        images: an image, a folder, or a list file.
        output: folder for masks and records; must not hold the images.
        model: model folder, or the run folder that holds it.
        mirror: average over the flips seen in training.
        step: tile step as a fraction of the patch.
        precision: ``auto`` takes what the model was validated in, where the device has it natively.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        compat: round as nnU-Net does.
        overwrite: which finished cases to do again.
        workers: processor threads of the network; all when None.
        shard: ``INDEX/COUNT`` does one share of the cases, ``auto`` or ``auto/COUNT`` that of a
            task of a Slurm array or an indexed Kubernetes job.
        root: folder that the paths of a list are relative to; the list's own when None.
        follow_links: take images outside the input folder, through links or a list's paths.
        redact_ids: file of a key; outputs call cases by keyed hashes of their names.
        fail_on: which failures show in the exit code: any, only if all cases fail, or none.
        max_failures: stop after so many cases without a mask.
        timeout_per_case: give up a case that takes more seconds than this; needs supervision.
        grace_s: after a signal, a case that needs no longer than this is finished.
        supervised: run the model in a child process, whose death costs no more than a case.
        save_probabilities: keep what labels are decided by, in this form: ``CASE_prob.b2nd``, or
            ``CASE.npz`` as nnU-Net does, with the ``CASE.pkl`` that it wants beside it.
        cpu_fallback: compute cases on the CPU that the device has no memory for.
        labels_for: viewers, ``slicer`` or ``itksnap``, that get a file of names and colours.
        split: make every acquisition of a DICOM series that mixes several a case of its own.
        report: write ``run/<run>/report.html``, a page with pictures of every case.
        report_interactive: with a viewer in it for the cases that need looking at most.
        gate: limits and permissions of reading; a strict one also computes every tile.
        max_ram_bytes: reject a case that takes more memory; what is free now when None.
        metrics: text file for Prometheus, rewritten every few seconds.
        engine: ``ray`` predicts on all machines of a Ray cluster.
        address: of the cluster; None for the one this machine belongs to, ``local`` for a new one.
        incoming: gives a stream of cases instead of those behind ``images``; it may have no end.
        layout: ``bids`` shows the masks as a BIDS derivative; records are in ``medmamba/`` then.
        bids_suffixes: which images of a BIDS folder are meant, one per channel, such as ``T1w``;
            by the names of the model's channels when empty.
        on_case: called per finished case.
        on_message: called with what was chosen and why.
        on_event: called with every event of the journal, and with progress within cases.

    Raises:
        BundleError, SecurityError: the model cannot be used or trusted.
        UsageError: no image there, or the output holds the images.
        EnvironmentFault: no such device, or the output cannot be written.
    """
    from medmamba.inference.assignment import Assignment
    from medmamba.inference.engine import predict_cases
    from medmamba.inference.records import ModelIdentity
    from medmamba.inference.supervision import predict_supervised
    from medmamba.inference.unchanged import skip_all
    from medmamba.inference.worker import WorkerSetup

    if not 0 < step <= 1:
        raise UsageError(f"step {step}: a fraction of the patch, above 0 and at most 1.")
    if engine not in ENGINES:
        raise UsageError(f"engine '{engine}': choose one of {', '.join(ENGINES)}.")
    if report_interactive:
        if not report:
            raise UsageError("an interactive report and no report at all: choose one.")
        require_viewer()  # before hours of work, not after them
    on_ray = engine == "ray"
    options: dict[str, Any] = {
        "mirror": mirror, "step": step, "precision": precision, "device": device,
        "compat": compat, "workers": workers, "probabilities": save_probabilities,
        "reuse_constant": not gate.strict, "cpu_fallback": cpu_fallback,
    }  # fmt: skip
    with (
        drain_on_signals(grace_s) as drain,
        _workers(supervised and not on_ray, None if on_ray else timeout_per_case) as start,
        reported(on_case, metrics) as on_decided,
    ):
        bundle = load_bundle(Path(model))
        share = None if shard is None else parse_shard(shard)
        cases: Iterable[Work]
        rejected: tuple[Rejection, ...] = ()
        total: int | None = None
        if incoming is not None:
            cases = incoming(bundle)
        else:
            work = open_work(
                bundle, Path(images), Path(output), root=root, share=share,
                follow_links=follow_links, split=split, bids_suffixes=bids_suffixes,
                hides_names=redact_ids is not None,
            )  # fmt: skip
            total = work.total
            cases, rejected = _under_their_names(work, redact_ids)
        folder = require_writable_folder(Path(output))
        if layout == "bids":
            tree = BidsLayout(folder, bundle.manifest, Path(images))
            tree.begin()
            folder = tree.records
            on_decided = _placing(tree, on_decided)
        if save_probabilities == "npz":
            on_decided = _with_properties(folder, bundle.plan.reader, on_decided)
        write_viewer_labels(folder, viewer_labels(bundle), labels_for)
        identity = ModelIdentity(name=bundle.manifest.name, sha256=bundle.sha256)
        reading: dict[str, Any] = {
            "gate": gate, "segments": segments_of(bundle.manifest), "overwrite": overwrite,
            "channel_names": bundle.manifest.channels,
            # Members of an ensemble were trained on the same cases.
            "orientation": bundle.models[0].manifest.orientation,
            "budget_bytes": max_ram_bytes or available_bytes(),
        }  # fmt: skip

        def announce(settings: str) -> None:
            if on_message is not None:
                on_message(_describe(bundle, total, len(rejected), settings))

        assignment = Assignment(
            cases=cases, rejected=rejected, total=total, shard=str(share or ""), fail_on=fail_on,
            request={
                "options": options, "file_ending": bundle.plan.file_ending,
                "machine": describe_machine(),
            },
            alert=gate.strict, max_failures=max_failures, on_case=on_decided, on_event=on_event,
            on_tiles=_progress_to(on_event), on_ready=lambda about: announce(about["settings"]),
        )  # fmt: skip
        run = (
            None
            if on_ray
            else skip_all(assignment, folder, model=identity, overwrite=overwrite, drain=drain)
        )
        if run is not None:
            if on_message is not None:
                on_message("every case is done; nothing to predict")
        elif on_ray:
            run = _predict_on_ray(
                address, assignment, bundle, folder, drain, options, reading,
                timeout_s=timeout_per_case,
            )  # fmt: skip
        elif start is None:
            predictor = make_predictor(bundle, **options)
            announce(describe_settings(predictor))
            run = predict_cases(
                assignment, folder, predictor, model=identity, drain=drain, **reading
            )
        else:
            setup = WorkerSetup(
                folder=folder, model=identity, **reading,
                options={"bundle": str(bundle.folder), **options}, grace_s=drain.grace_s,
                log_level=logging.getLogger().getEffectiveLevel(),
            )  # fmt: skip
            run = predict_supervised(assignment, setup, start, drain, timeout_s=timeout_per_case)
    # After a signal there is no time for pictures.
    wants_page = report and not drain.requested
    page = report_run(run, cases, interactive=report_interactive) if wants_page else None
    return PredictOutcome(run=run, report=page)


def _under_their_names(
    work: CaseListing | CaseStream, key: Path | str | None
) -> tuple[Iterable[Work], tuple[Rejection, ...]]:
    """Cases, and those turned away, as outputs call them: by their names, or by a key's."""
    redaction = None if key is None else read_key(Path(key))
    if isinstance(work, CaseStream):
        return work if redaction is None else redaction.stream(work), ()
    listing = work if redaction is None else redaction.listing(work)
    return listing.cases, listing.rejected


def open_work(
    bundle: Bundle,
    images: Path,
    output: Path,
    *,
    root: Path | str | None = None,
    share: Shard | None = None,
    follow_links: bool = False,
    split: bool = False,
    bids_suffixes: Sequence[str] = (),
    hides_names: bool = False,
) -> CaseListing | CaseStream:
    """List or stream the cases that a model is asked to predict; arguments as of ``predict``."""
    work = open_cases(
        images,
        channels=len(bundle.manifest.channels),
        file_ending=bundle.plan.file_ending or None,
        root=None if root is None else Path(root),
        shard=share,
        follow_links=follow_links,
        stream=not split,
        apart_from=output,
        modalities=bids_suffixes or bundle.manifest.channels,
    )
    if not isinstance(work, CaseListing):
        return work
    if left_out := work.describe_ignored(output):
        hidden = f"left out of the input folder: {len(work.ignored)}; `medmamba check` names them"
        logger.warning("%s", hidden if hides_names else left_out)
    return split_acquisitions(work) if split else work


def _predict_on_ray(
    address: str | None,
    assignment: "Assignment",
    bundle: Bundle,
    folder: Path,
    drain: DrainRequest,
    options: dict[str, Any],
    reading: dict[str, Any],
    *,
    timeout_s: float | None,
) -> "PredictionRun":
    """Predict on a Ray cluster; each worker takes a GPU where there are any and --device allows."""
    from medmamba.inference.records import ModelIdentity
    from medmamba.inference.worker import WorkerSetup
    from medmamba.pipeline.cluster import Needs, largest_node, ray_cluster
    from medmamba.pipeline.cluster_prediction import predict_on_cluster
    from medmamba.pipeline.prediction_worker import make_predictor_of

    # The memory that is free here says nothing about other machines.
    setup = WorkerSetup(
        folder=folder.absolute(),
        model=ModelIdentity(name=bundle.manifest.name, sha256=bundle.sha256),
        options={"bundle": str(bundle.folder.absolute()), **options},
        grace_s=drain.grace_s,
        **{**reading, "budget_bytes": None},
    )
    with ray_cluster(address) as ray:
        wants_gpu = options["device"] != "cpu" and largest_node(ray).gpus > 0
        needs = Needs(cpus=options["workers"] or 1, gpus=float(wants_gpu))
        return predict_on_cluster(
            ray, assignment, setup, make_predictor_of, drain, needs=needs, timeout_s=timeout_s
        )


def _progress_to(on_event: "OnEvent | None") -> "OnTiles | None":
    """Tell of tiles in the way of events; these are too many for the journal."""
    if on_event is None:
        return None
    tell = on_event
    return lambda case, done, total: tell(
        {"event": "progress", "case": case, "done": done, "total": total}
    )


@contextmanager
def reported(on_case: "OnCase | None", metrics: Path | str | None) -> "Iterator[OnCase | None]":
    """Give what is to be called per case: the caller's function, and the metrics file's."""
    if metrics is None:
        yield on_case
        return
    from medmamba.inference.metrics import MetricsFile

    figures = MetricsFile(Path(metrics))

    def report(record: "CommitRecord", done: int, total: int, left_s: float) -> None:
        figures.report(record, done, total, left_s)
        if on_case is not None:
            on_case(record, done, total, left_s)

    try:
        yield report
    finally:
        figures.close()


def _placing(tree: BidsLayout, on_case: "OnCase | None") -> "OnCase":
    def place(record: "CommitRecord", done: int, total: int, remaining_s: float) -> None:
        tree.place(record)
        if on_case is not None:
            on_case(record, done, total, remaining_s)

    return place


def _with_properties(folder: Path, reader: str, on_case: "OnCase | None") -> "OnCase":
    """Write what nnU-Net wants to know of probabilities beside them."""
    from medmamba.inference.ledger import PROPERTIES_SUFFIX
    from medmamba.interop.nnunet_export import write_prediction_properties

    def write(record: "CommitRecord", done: int, total: int, remaining_s: float) -> None:
        if record.probabilities is not None and record.geometry is not None:
            path = folder / f"{record.case_id}{PROPERTIES_SUFFIX}"
            write_prediction_properties(path, record.geometry, reader)
        if on_case is not None:
            on_case(record, done, total, remaining_s)

    return write


@contextmanager
def _workers(
    supervised: bool, timeout_s: float | None
) -> "Iterator[Callable[[], WorkerProcess] | None]":
    """Give what starts worker processes; the first is started at once.

    It loads torch while the inputs are looked at.
    """
    from medmamba.inference.worker_process import WorkerProcess, can_start_workers, worker_command
    from medmamba.pipeline.prediction_worker import MODULE

    if supervised and not can_start_workers():
        logger.warning("no Python to start a worker process with: a crash will end the whole run")
        supervised = False
    if not supervised:
        if timeout_s is not None:
            raise UsageError("a timeout per case needs a worker process that can be ended.")
        yield None
        return
    command = worker_command(MODULE)
    first = WorkerProcess(command)
    unused = [first]
    try:
        yield lambda: unused.pop() if unused else WorkerProcess(command)
    finally:
        first.close()


def _describe(bundle: Bundle, total: int | None, turned_away: int, settings: str) -> str:
    what = "waiting for cases," if total is None else f"predicting {total - turned_away} cases"
    rejected = f" ({turned_away} rejected)" if turned_away else ""
    folds = ", ".join(bundle.folds)
    return f"{what}{rejected} with {bundle.manifest.name} (fold {folds}) {settings}"
