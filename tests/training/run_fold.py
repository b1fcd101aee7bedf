"""Trains the tests' tiny fold in a process of its own, so that it can be killed.

Usage: run_fold.py STORE RUN RECIPE [--slow SECONDS]; RECIPE is JSON
"""

import argparse
import importlib.util
import json
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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    here = Path(__file__).with_name("conftest.py")
    specification = importlib.util.spec_from_file_location("training_conftest", here)
    inputs = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(inputs)

    from medmamba.errors import MedMambaError
    from medmamba.training.trainer import train_fold

    setup = inputs.build_setup(arguments.store, arguments.run, recipe=arguments.recipe)

    def report(epoch) -> None:
        sys.stdout.write(f"epoch {epoch.epoch}\n")
        sys.stdout.flush()
        time.sleep(arguments.slow)

    try:
        train_fold(setup, on_progress=report)
    except MedMambaError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
