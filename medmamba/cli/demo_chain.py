"""The demo's chain: plan, train, predict the test cases, evaluate, draw."""

import sys
from pathlib import Path

from medmamba.cli.evaluate import print_evaluation
from medmamba.cli.plan import print_plan
from medmamba.cli.predict import print_case
from medmamba.cli.train import print_epoch
from medmamba.dataset import Dataset, open_dataset
from medmamba.errors import DatasetError


def run_chain(raw: Path, output: Path, *, network: str, max_time_s: float) -> None:
    """Run every step and print the table, the picture's path and the paths of all that was written.

    Raises:
        DatasetError: the dataset has no test cases with labels to score.
    """
    from medmamba import pipeline
    from medmamba.cli.display import StepProgress

    dataset = open_dataset(raw)
    references = find_references(dataset)
    work, masks = output / "work", output / "masks"
    with StepProgress() as progress:
        planned = pipeline.plan(raw, work, network=network, on_progress=progress)
    print_plan(planned.plan)
    trained = pipeline.train(
        work, network=network, fold="all", max_time=max_time_s, overwrite=True,
        on_epoch=print_epoch, on_message=_say,
    )  # fmt: skip
    predicted = pipeline.predict(
        raw / "imagesTs", masks, trained.model, overwrite="always", on_case=print_case, on_message=_say
    )
    scores = pipeline.evaluate(
        references, masks, dataset_json=raw / "dataset.json", output=output / "evaluation"
    )
    picture = draw_first_case(dataset, references, masks, output / "overlay.png")
    print_evaluation(scores)
    print(f"picture   {picture}")
    print(f"scores    {output / 'evaluation' / 'metrics.csv'}")
    print(f"masks     {masks} ({predicted.succeeded} of {predicted.total})")
    print(f"plan      {planned.plan_path}")
    print(f"curves    {trained.run_folder / 'curves.png'}")
    print(f"model     {trained.model}")


def find_references(dataset: Dataset) -> Path:
    """Return the folder of labels of the test cases.

    Raises:
        DatasetError: there is none.
    """
    folder = dataset.folder / "labelsTs"
    if not dataset.test_cases or not folder.is_dir():
        raise DatasetError(
            f"{dataset.folder}: the demo scores test cases, and imagesTs or labelsTs is missing. "
            "Use plan, train, predict and evaluate one by one instead."
        )
    return folder


def draw_first_case(dataset: Dataset, references: Path, masks: Path, path: Path) -> Path:
    """Draw image, reference and prediction of the first test case."""
    from medmamba.evaluation.figures import overlay_figure
    from medmamba.io import read_image, read_labels

    case = dataset.test_cases[0]
    name = f"{case.id}{dataset.file_ending}"
    image, _ = read_image(case.images[0])
    reference, _ = read_labels(references / name)
    prediction, _ = read_labels(masks / name)
    overlay_figure(image, reference, prediction, dataset.label_map, path)
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
