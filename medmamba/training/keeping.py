"""A run's two checkpoints: the latest, to go on from, and the best, to predict with."""

import dataclasses

from medmamba.errors import CheckpointError
from medmamba.training import checkpoint as checkpoints
from medmamba.training.run_files import BEST, LATEST, RunState
from medmamba.training.setup import TrainingSetup
from medmamba.training.stepping import Stepper


class RunKeeper:
    """Saves a run and brings it back.

    Args:
        setup: of the run, whose identity a checkpoint must have.
        stepper: holds what a checkpoint holds besides the state.
    """

    def __init__(self, setup: TrainingSetup, stepper: Stepper) -> None:
        self.latest, self.best = setup.run_folder / LATEST, setup.run_folder / BEST
        self._setup = setup
        self._stepper = stepper

    def remove(self) -> None:
        """Delete the checkpoints of an earlier run."""
        for stale in (self.latest, self.best):
            stale.unlink(missing_ok=True)

    def restore(self) -> RunState:
        """Fill network, optimiser, average and scaler from the latest checkpoint.

        Raises:
            CheckpointError: it is damaged, of another run, or laid out for another length.
        """
        found = checkpoints.load_checkpoint(self.latest)
        state, setup, stepper = found.state, self._setup, self._stepper
        checkpoints.require_identity(self.latest, state.identity, setup.identity)
        if state.length != setup.length and not setup.extend:
            raise CheckpointError(
                f"checkpoint {self.latest}: its run was laid out for {state.length}, this one is "
                f"for {setup.length}. Resume with the same length, or add --extend."
            )
        checkpoints.restore_network(stepper.network, found, self.latest)
        checkpoints.restore_optimizer(stepper.optimizer, stepper.network, found)
        if stepper.average is not None:
            checkpoints.restore_average(stepper.average, found)
        if state.scaler:
            stepper.scaler.load_state_dict(dict(state.scaler))
        return dataclasses.replace(state, length=setup.length)

    def save(self, state: RunState, *, best: bool) -> None:
        """Write the latest checkpoint, and the best one too where this is it.

        Raises:
            EnvironmentFault: the disk is full or cannot be written; the earlier ones are kept.
        """
        network, average = self._stepper.network, self._stepper.average
        if best:
            checkpoints.save_checkpoint(
                self.best, state, network=network, optimizer=None, average=average
            )
        checkpoints.save_checkpoint(
            self.latest,
            state,
            network=network,
            optimizer=self._stepper.optimizer,
            average=average,
        )
