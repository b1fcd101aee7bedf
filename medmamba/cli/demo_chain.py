"""The demo's chain: plan, train, predict the test cases, evaluate, draw."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import medmamba
from medmamba.cli.evaluate import print_evaluation
from medmamba.cli.messages import say
from medmamba.cli.plan import print_plan
from medmamba.cli.predict import print_case
from medmamba.dataset import Case, Dataset, open_dataset, read_splits
from medmamba.errors import DatasetError
from medmamba.files import write_atomic
from medmamba.pipeline.work import Work


def run_chain(raw: Path, output: Path, *, network: str, max_time_s: float) -> None:
    """Run every step and print the table, the picture's path and the paths of all that was written.

    Raises:
        DatasetError: the dataset has no test cases with labels to score.
    """
    from medmamba.cli.display import StepProgress
    from medmamba.cli.train_progress import TrainingDisplay

    dataset = open_dataset(raw)
    work, masks = output / "work", output / "masks"
    with StepProgress() as progress:
        planned = medmamba.plan(raw, work, network=network, on_progress=progress)
    print_plan(planned.plan)
    held_out = choose_held_out(dataset, work)
    with TrainingDisplay() as show:
        trained = medmamba.train(
            work, network=network, fold=held_out.fold, max_time=max_time_s, overwrite=True,
            on_epoch=show.on_epoch, on_step=show.on_step, on_message=show.say,
        )  # fmt: skip
    listing, references = write_held_out(held_out, dataset, output / "held_out")
    predicted = medmamba.predict(
        listing,
        masks,
        trained.model,
        root=raw,
        overwrite="always",
        on_case=print_case,
        on_message=say,
    )
    scores = medmamba.evaluate(
        references, masks, dataset_json=raw / "dataset.json", output=output / "evaluation"
    )
    middle = held_out.cases[len(held_out.cases) // 2]
    picture = draw_case(middle, dataset, masks, output / "overlay.png")
    print_evaluation(scores)
    print(f"picture   {picture}")
    print(f"scores    {output / 'evaluation' / 'metrics.csv'}")
    print(f"masks     {masks} ({predicted.succeeded} of {predicted.total})")
    print(f"plan      {planned.plan_path}")
    print(f"curves    {trained.run_folder / 'curves.png'}")
    print(f"model     {trained.model}")


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Cases to score, and the fold to train that has never seen them."""

    cases: tuple[Case, ...]
    fold: int | str


def choose_held_out(dataset: Dataset, work: Path) -> HeldOut:
    """Take the test cases where they have labels, else the validation cases of fold 0.

    Raises:
        DatasetError: neither exists.
    """
    folder = dataset.folder / "labelsTs"
    labelled = tuple(
        replace(case, labels=folder / f"{case.id}{dataset.file_ending}")
        for case in dataset.test_cases
        if (folder / f"{case.id}{dataset.file_ending}").is_file()
    )
    if labelled:
        return HeldOut(cases=labelled, fold="all")
    splits = Work(work).splits
    if not splits.is_file():
        raise DatasetError(
            f"{dataset.folder}: no test cases with labels (imagesTs, labelsTs) and too few cases "
            "to hold some out. Use plan, train, predict and evaluate one by one."
        )
    names = set(read_splits(splits)[0].validation)
    cases = tuple(case for case in dataset.training_cases if case.id in names)
    return HeldOut(cases=cases, fold=0)


def write_held_out(held_out: HeldOut, dataset: Dataset, folder: Path) -> tuple[Path, Path]:
    """Write a list of the held-out images to predict, and copies of their labels to score with."""
    labels = folder / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    entries = []
    for case in held_out.cases:
        assert case.labels is not None
        shutil.copyfile(case.labels, labels / f"{case.id}{dataset.file_ending}")
        entries.append(
            {"case_id": case.id, "images": [str(path.resolve()) for path in case.images]}
        )
    listing = folder / "images.json"
    write_atomic(listing, json.dumps(entries, indent=2) + "\n")
    return listing, labels


def draw_case(case: Case, dataset: Dataset, masks: Path, path: Path) -> Path:
    """Draw image, reference and prediction of one case."""
    from medmamba.evaluation.figures import overlay_figure
    from medmamba.io import read_image, read_labels

    assert case.labels is not None
    image, _ = read_image(case.images[0])
    reference, _ = read_labels(case.labels)
    prediction, _ = read_labels(masks / f"{case.id}{dataset.file_ending}")
    overlay_figure(image, reference, prediction, dataset.label_map, path)
    return path
