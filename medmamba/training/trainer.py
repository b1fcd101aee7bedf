"""Train one fold: epochs of steps, validation and checkpoints, from a store of patches to weights.

Sampling, augmentation, the step, the schedule and the files are in modules of their own; this one
puts them in order and keeps the promises: a checkpoint per epoch, a state saved on SIGTERM, and on
a CPU a resumed run that equals an undisturbed one bit for bit.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from medmamba.errors import TrainingError
from medmamba.files import require_writable_folder, to_json, to_plain, write_atomic
from medmamba.networks import build_network
from medmamba.training.diary import RunDiary
from medmamba.training.feeding import batch_size_on, make_sampler, model_seed
from medmamba.training.interruption import StopRequest, stop_on_signals
from medmamba.training.keeping import RunKeeper
from medmamba.training.loading import BatchLoader
from medmamba.training.precision import (
    choose_precision,
    deterministic_algorithms,
    keep_freed_memory,
    resolve_device,
)
from medmamba.training.progress import EpochReport, StepReport, memory_gb
from medmamba.training.run_files import LATEST, START_RECORD, RunState
from medmamba.training.sampling import Batch, PatchSampler, Stream
from medmamba.training.schedule import Clock, make_schedule
from medmamba.training.setup import TrainingResult, TrainingSetup
from medmamba.training.start import Freezing
from medmamba.training.stepping import Stepper
from medmamba.training.tally import EpochTally
from medmamba.training.team import ALONE, Team
from medmamba.training.validation import Validation, validate

__all__ = ["TrainingResult", "TrainingSetup", "train_fold"]

logger = logging.getLogger(__name__)

EMA_KEEP = 0.9
"""Share of the old value in the smoothed validation Dice (nnU-Net)."""

BAD_STEPS_ALLOWED = 10
"""Consecutive steps without a finite loss and gradient after which training stops."""


def train_fold(
    setup: TrainingSetup,
    *,
    resume: bool = False,
    on_progress: Callable[[EpochReport], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    team: Team = ALONE,
) -> TrainingResult:
    """Train until the schedule ends.

    Args:
        setup: the fold.
        resume: go on from the latest checkpoint, or start if there is none yet.
        on_progress: called after every epoch, on the rank that leads.
        on_step: called there after every step, and every batch of validation.
        team: the processes that share every batch; all call this with the same setup.

    Raises:
        CheckpointError: the checkpoint is damaged or of another run.
        EnvironmentFault: the device or the folder cannot be used, or memory or disk are full.
        TrainingError: the loss is not finite (E_TRAIN_NONFINITE), a case cannot be read
            (E_TRAIN_LOADER), or a signal asked to stop; the last state is kept.
    """
    clock = Clock()
    require_writable_folder(setup.run_folder)
    keep_freed_memory()
    deterministic = deterministic_algorithms(setup.deterministic)
    with stop_on_signals() as stop, deterministic:
        run = FoldRun(setup, clock, resume=resume, on_step=on_step, team=team)
        try:
            run.train(stop, on_progress)
        finally:
            run.diary.log.close()
        return run.result()


class FoldRun:
    """The loop's state: everything a checkpoint holds, live."""

    def __init__(
        self,
        setup: TrainingSetup,
        clock: Clock,
        *,
        resume: bool,
        on_step: Callable[[StepReport], None] | None = None,
        team: Team = ALONE,
    ) -> None:
        self.setup = setup
        self._on_step = on_step if team.leads else None
        self.team = team
        self.device = resolve_device(setup.device)
        self.precision = choose_precision(self.device, setup.precision)
        torch.manual_seed(model_seed(setup.seed, 0))
        network = build_network(setup.network).to(self.device)
        if setup.start is not None and not (resume and (setup.run_folder / LATEST).exists()):
            record = setup.start.fill(network)
            if team.leads:
                write_atomic(setup.run_folder / START_RECORD, to_json(record))
        self._batch_size = batch_size_on(setup.recipe, self.device)
        self._share = team.share(self._batch_size)
        self.stepper = Stepper(
            network,
            setup.recipe,
            setup.label_map,
            device=self.device,
            precision=self.precision,
            batch_size=len(self._share or range(self._batch_size)),
            team=team,
            graph=setup.cuda_graph,
        )
        self._keeper = RunKeeper(setup, self.stepper)
        self.state = self._initial_state(resume)
        clock.before_s = self.state.elapsed_s
        self.schedule = make_schedule(setup.recipe, clock, setup.max_time_s)
        self._freezing = Freezing(network, setup.start, self.schedule.epochs)
        self._tally = EpochTally(losses=list(self.state.losses))
        self.diary = RunDiary(setup, leads=team.leads, state=self.state, now=clock.elapsed_s())
        self.diary.record_start(self.device, self._settings())

    def _initial_state(self, resume: bool) -> RunState:
        latest = self._keeper.latest
        if resume and self.team.decide(latest.exists()):
            return self._keeper.restore()
        if resume:
            logger.warning("%s does not exist yet; the run starts at its beginning", latest)
        if self.team.leads:
            self._keeper.remove()
        return RunState(identity=self.setup.identity, length=self.setup.length)

    def _settings(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "batch_size": self._batch_size,
            "processes": self.team.size,
            "seed": self.setup.seed,
            "length": self.setup.length,
            "resumed_at_iteration": self.state.iteration,
            "recipe": to_plain(self.setup.recipe),
            "network": to_plain(self.setup.network),
            "split": to_plain(self.setup.split),
        }

    def sampler(self, stream: Stream) -> PatchSampler:
        """Return what makes the batches of training or validation."""
        return make_sampler(self.setup, stream, batch_size=self._batch_size, device=self.device)

    def train(self, stop: StopRequest, on_progress: Callable[[EpochReport], None] | None) -> None:
        validation = self.sampler(Stream.VALIDATION)
        training, first = self.sampler(Stream.TRAINING), self.state.iteration
        with BatchLoader(training, first=first, samples=self._share) as loader:
            while not self.team.decide(self.schedule.finished(self.state.epoch)):
                self._train_epoch(loader, stop)
                report = self._finish_epoch(validation)
                if on_progress is not None and self.team.leads:
                    on_progress(report)
                _, stopping = self.team.agree([], any_of=stop.signal_number is not None)
                if stopping and not self.state.finished:
                    raise stop.error(str(self._keeper.latest))
        if not self.state.finished:
            self._save(finished=True)
        self.diary.draw_curves(self.schedule.elapsed_s(), force=True)

    def _train_epoch(self, loader: BatchLoader, stop: StopRequest) -> None:
        self.stepper.network.train()
        self._freezing.apply(self.state.epoch)
        while True:
            rate, goes_on, stopping = self._agree_on_step(stop)
            if not goes_on:
                return
            if stopping:
                self._save()
                raise stop.error(str(self._keeper.latest))
            begun = time.monotonic()
            batch = loader.next()
            self._tally.waiting_s += time.monotonic() - begun
            self.step(batch, rate)
            seconds = time.monotonic() - begun
            self._tally.training_s += seconds
            self.schedule.step_took(seconds)
            self._tell_step(self.state.steps, validating=False)

    def _agree_on_step(self, stop: StopRequest) -> tuple[float, bool, bool]:
        """Rate of the next step, whether there is one, and whether a signal asks to stop."""
        epoch, steps = self.state.epoch, self.state.steps
        goes_on = self.schedule.goes_on(epoch, steps)
        rate = self.schedule.learning_rate(epoch, steps) if goes_on else 0.0
        numbers, stopping = self.team.agree(
            [rate, float(goes_on)], any_of=stop.signal_number is not None
        )
        return numbers[0], bool(numbers[1]), stopping

    def step(self, batch: Batch, rate: float) -> float:
        """Take one step of training at a learning rate and return its loss."""
        state = self.state
        torch.manual_seed(model_seed(self.setup.seed, 1 + state.iteration, self.team.rank))
        outcome = self.stepper.train(batch, rate, state.iteration)
        bad_steps = 0 if outcome.applied else state.bad_steps + 1
        self.diary.log.write(
            {
                "kind": "step", "iteration": state.iteration, "epoch": state.epoch,
                "loss": outcome.loss, "lr": rate, "gradient_norm": outcome.gradient_norm,
            }
        )  # fmt: skip
        self._tally.count(outcome)
        if not outcome.applied:
            self._guard(batch, outcome.loss, bad_steps)
        self.state = dataclasses.replace(
            state, steps=state.steps + 1, iteration=state.iteration + 1, bad_steps=bad_steps
        )
        return outcome.loss

    def _guard(self, batch: Batch, loss: float, bad_steps: int) -> None:
        everyone = [case for cases in self.team.gather(batch.cases) for case in cases]
        cases = ", ".join(dict.fromkeys(everyone))
        scaling = self.precision == "fp16" and math.isfinite(loss)
        level = logging.INFO if scaling else logging.WARNING
        logger.log(level, "iteration %d skipped: loss %g, cases %s", batch.iteration, loss, cases)
        if bad_steps <= BAD_STEPS_ALLOWED:
            return
        bad = self.stepper.bad_parameters()
        where = f"first bad tensor: {bad[0]}" if bad else "all weights are finite"
        raise self._not_finite(
            f"loss or gradient was not finite in {bad_steps} steps in a row, the last with cases "
            f"{cases} (loss {loss}, {where})",
            "Check these cases, or train",
        )

    def _not_finite(self, what: str, advice: str) -> TrainingError:
        latest = self._keeper.latest
        kept = f"The last good checkpoint is {latest}" if latest.exists() else "None was saved yet"
        return TrainingError(
            f"{what}. {kept}. {advice} with --precision fp32 or a lower learning rate.",
            code="E_TRAIN_NONFINITE",
        )

    def _finish_epoch(self, sampler: PatchSampler) -> EpochReport:
        begun = time.monotonic()
        if not self.stepper.has_finite_weights():
            # They would take the place of the last good ones.
            raise self._not_finite(
                f"weights are not finite after iteration {self.state.iteration}", "Train"
            )
        validation = self._validate(sampler)
        state, dice = self.state, validation.dice
        ema, best = state.ema_dice, state.best_dice
        if dice == dice:
            ema = dice if ema is None else EMA_KEEP * ema + (1 - EMA_KEEP) * dice
        is_best = ema is not None and (best is None or ema > best)
        report = self._report(validation, ema=ema, is_best=is_best)
        self.diary.log.write({"kind": "epoch", **dataclasses.asdict(report)})
        self.state = dataclasses.replace(
            state,
            epoch=state.epoch + 1,
            steps=0,
            dice=None if dice != dice else dice,
            ema_dice=ema,
            best_dice=ema if is_best else best,
            validation_batches=validation.batches,
        )
        self._tally = EpochTally(losses=[])
        finished = self.team.decide(self.schedule.finished(self.state.epoch))
        self._save(finished=finished, best=is_best)
        self.diary.draw_curves(self.schedule.elapsed_s())
        self.schedule.overhead_took(time.monotonic() - begun)
        return report

    def _validate(self, sampler: PatchSampler) -> Validation:
        settled = self.state.validation_batches
        begun = time.monotonic()

        def goes_on(batches: int) -> bool:
            self._tell_step(batches, validating=True)
            if settled is not None:
                return batches < settled
            seconds = time.monotonic() - begun
            return self.team.decide(self.schedule.validation_goes_on(batches, seconds))

        limit = self.setup.recipe.validation_iterations if settled is None else settled
        self.stepper.network.eval()
        with (
            self.stepper.averaged_weights(),
            BatchLoader(sampler, first=0, stop=limit, samples=self._share) as loader,
        ):
            return validate(
                loader.next, self.stepper.evaluate, self.setup.label_map, goes_on, self.team.total
            )

    def _tell_step(self, step: int, *, validating: bool) -> None:
        if self._on_step is None:
            return
        epoch, settled = self.state.epoch, self.state.validation_batches
        batches = self.setup.recipe.validation_iterations if settled is None else settled
        steps = self.schedule.steps_in_epoch(epoch, self.state.steps)
        self._on_step(
            StepReport(
                epoch=epoch,
                epochs=self.schedule.epochs,
                validating=validating,
                step=step,
                steps=batches if validating else max(step, steps),
                loss=self._tally.loss,
                patches_per_s=self._tally.steps_per_s * self._batch_size,
                memory_gb=memory_gb(self.device),
                remaining_s=self.schedule.remaining_s(epoch, self.state.steps),
            )
        )

    def _report(self, validation: Validation, *, ema: float | None, is_best: bool) -> EpochReport:
        state, tally = self.state, self._tally
        return EpochReport(
            epoch=state.epoch,
            epochs=self.schedule.epochs,
            iteration=state.iteration,
            loss=tally.loss,
            validation_loss=validation.loss,
            dice=validation.dice,
            dice_per_class=validation.dice_per_class,
            ema_dice=float("nan") if ema is None else ema,
            is_best=is_best,
            learning_rate=float(self.stepper.optimizer.param_groups[0]["lr"]),
            gradient_norm=tally.gradient_norm,
            skipped_steps=tally.skipped,
            seconds=tally.training_s,
            elapsed_s=self.schedule.elapsed_s(),
            remaining_s=self.schedule.remaining_s(state.epoch + 1, 0),
            patches_per_s=tally.steps_per_s * self._batch_size,
            loading_share=tally.loading_share,
            memory_gb=memory_gb(self.device),
        )

    def _save(self, *, finished: bool = False, best: bool = False) -> None:
        scaler = self.stepper.scaler
        self.state = dataclasses.replace(
            self.state,
            losses=tuple(self._tally.losses),
            elapsed_s=self.schedule.elapsed_s(),
            log_bytes=self.diary.log.sync(),
            scaler=dict(scaler.state_dict()) if scaler.is_enabled() else None,
            finished=finished,
        )
        if self.team.leads:
            self._keeper.save(self.state, best=best)

    def result(self) -> TrainingResult:
        state = self.state
        return TrainingResult(
            run_folder=self.setup.run_folder,
            epochs=state.epoch,
            iterations=state.iteration,
            dice=float("nan") if state.dice is None else state.dice,
            best_dice=float("nan") if state.best_dice is None else state.best_dice,
            elapsed_s=self.schedule.elapsed_s(),
            latest=self._keeper.latest,
            best=self._keeper.best,
            precision=self.precision,
        )
