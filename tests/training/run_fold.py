"""Trains the tests' tiny fold in a process of its own, or in several, so that they can be killed.

Usage: run_fold.py STORE RUN RECIPE [--slow SECONDS] [--die RANK:ITERATION:HOW]; RECIPE is JSON
"""

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("recipe", type=json.loads)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--die", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    here = Path(__file__).with_name("conftest.py")
    specification = importlib.util.spec_from_file_location("training_conftest", here)
    inputs = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(inputs)

    from medmamba.errors import MedMambaError
    from medmamba.training.team import join_team
    from medmamba.training.trainer import train_fold

    if arguments.die:
        arrange_death(*arguments.die.split(":"))

    setup = inputs.build_setup(arguments.store, arguments.run, recipe=arguments.recipe)

    def report(epoch) -> None:
        sys.stdout.write(f"epoch {epoch.epoch}\n")
        sys.stdout.flush()
        time.sleep(arguments.slow)

    try:
        with join_team(torch.device("cpu")) as team:
            train_fold(setup, on_progress=report, team=team)
    except MedMambaError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def arrange_death(rank: str, iteration: str, how: str) -> None:
    """Let one rank end in the middle of training: killed, or by an error of the program's own."""
    from medmamba.training.sampling import Batch
    from medmamba.training.trainer import FoldRun

    step = FoldRun.step

    def step_or_die(self: FoldRun, batch: Batch, rate: float) -> float:
        if self.team.rank == int(rank) and batch.iteration == int(iteration):
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("a bug of this rank")
        return step(self, batch, rate)

    FoldRun.step = step_or_die


if __name__ == "__main__":
    main()
