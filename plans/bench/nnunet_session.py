"""nnU-Net's own steps on one raw dataset, driven through its Python API: plan, train, predict.

python plans/bench/nnunet_session.py STEP WORK DATASET [options]

STEP is ``plan`` (fingerprint, plan, preprocess), ``train`` (one short epoch) or ``predict``. WORK
gets nnU-Net's three folders ``raw``, ``preprocessed`` and ``results``. Needs the extra ``nnunet``;
runs on the CPU. Each call is a process of its own, because nnU-Net reads its folders from the
environment when it is imported. Parts of nnU-Net's command line import torchvision, this does not.
"""

import argparse
import os
import random
from pathlib import Path

TRAINER = "nnUNetTrainer"


def enter(work: Path, dataset: Path) -> int:
    """Point nnU-Net at ``work`` and return the dataset's number."""
    raw = work / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    link = raw / dataset.name
    if not link.exists():
        link.symlink_to(dataset.resolve())
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ.update({"nnUNet_compile": "f"})
    return int(dataset.name[7:10])


def plan(work: Path, dataset: Path, configuration: str, workers: int) -> None:
    number = enter(work, dataset)
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (  # noqa: TID251
        extract_fingerprint_dataset,
        plan_experiment_dataset,
        preprocess_dataset,
    )

    extract_fingerprint_dataset(number, num_processes=workers)
    plan_experiment_dataset(number)
    preprocess_dataset(number, configurations=(configuration,), num_processes=(workers,))


def train(
    work: Path,
    dataset: Path,
    configuration: str,
    *,
    plans: str,
    fold: int | str,
    iterations: int,
) -> Path:
    """Train one epoch of ``iterations`` steps; return the folder of results."""
    os.environ.update({"nnUNet_n_proc_DA": "0"})
    enter(work, dataset)
    import numpy as np
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args  # noqa: TID251

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    trainer = get_trainer_from_args(
        dataset.name, configuration, fold, TRAINER, plans, device=torch.device("cpu")
    )
    trainer.num_iterations_per_epoch = iterations
    trainer.num_val_iterations_per_epoch = 1
    trainer.num_epochs = 1
    trainer.initialize()
    trainer.run_training()
    return Path(trainer.output_folder_base)


def predict(
    work: Path, dataset: Path, model: Path, images: Path, output: Path, *, folds: list[str]
) -> None:
    """Segment every image of ``images`` as nnU-Net does, without mirroring."""
    enter(work, dataset)
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: TID251

    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    chosen = tuple(fold if fold == "all" else int(fold) for fold in folds)
    output.mkdir(parents=True, exist_ok=True)
    predictor.initialize_from_trained_model_folder(str(model), chosen)
    predictor.predict_from_files_sequential(str(images), str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("plan", "train", "predict"))
    parser.add_argument("work", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plans", default="nnUNetPlans")
    parser.add_argument("--folds", nargs="+", default=["0"])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--model", type=Path, help="results folder to predict with")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    if chosen.step == "plan":
        plan(chosen.work, chosen.dataset, chosen.configuration, chosen.workers)
    elif chosen.step == "train":
        for fold in chosen.folds:
            train(
                chosen.work,
                chosen.dataset,
                chosen.configuration,
                plans=chosen.plans,
                fold=fold if fold == "all" else int(fold),
                iterations=chosen.iterations,
            )
    else:
        predict(
            chosen.work,
            chosen.dataset,
            chosen.model,
            chosen.images,
            chosen.output,
            folds=chosen.folds,
        )


if __name__ == "__main__":
    main()
