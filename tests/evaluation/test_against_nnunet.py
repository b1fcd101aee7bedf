"""Random masks scored beside nnU-Net's own evaluator, where it is installed."""

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from medmamba.evaluation.report import evaluate_folder
from medmamba.labels import LabelMap

from .test_report import assert_same_numbers, header, write  # noqa: F401 a fixture

DRAWS = 8
PLAIN = LabelMap(values={"background": (0,), "a": (1,), "b": (2,), "c": (3,)})
IGNORING = LabelMap(values={"background": (0,), "a": (1,), "b": (2,), "ignore": (3,)})
REGIONS = LabelMap(
    values={"background": (0,), "whole": (1, 2, 3), "part": (2, 3), "core": (3,)},
    region_order=(1, 2, 3),
)
IGNORING_REGIONS = LabelMap(
    values={"background": (0,), "whole": (1, 2), "core": (2,), "ignore": (3,)},
    region_order=(1, 2),
)


def mask(random: np.random.Generator) -> np.ndarray:
    """Values 0 to 3, of which some are often absent."""
    present = [value for value in range(4) if value == 0 or random.random() < 0.7]
    return random.choice(present, (5, 6, 7)).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("label_map", [PLAIN, IGNORING, REGIONS, IGNORING_REGIONS])
def test_scores_and_means_are_nnunets(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    header,  # noqa: F811
    label_map: LabelMap,
) -> None:
    evaluation = pytest.importorskip(
        "nnunetv2.evaluation.evaluate_predictions",
        reason="the extra 'nnunet' is not installed",
    )
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    random = np.random.default_rng(len(label_map.values))
    for number in range(DRAWS):
        write(tmp_path / "reference", f"case_{number}", mask(random), header)
        guess = np.minimum(mask(random), 3 if label_map.ignore_value is None else 2)
        write(tmp_path / "prediction", f"case_{number}", guess, header)
    theirs = tmp_path / "theirs.json"
    # Its pool would be of new processes, which each import torch; a thread computes the same.
    threads = SimpleNamespace(get_context=lambda kind: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(evaluation, "multiprocessing", threads)
    evaluation.compute_metrics_on_folder(
        str(tmp_path / "reference"),
        str(tmp_path / "prediction"),
        str(theirs),
        SimpleITKIO(),
        ".nii.gz",
        [values if len(values) > 1 else values[0] for values in label_map.foreground.values()],
        label_map.ignore_value,
        num_processes=1,
    )
    found = evaluate_folder(
        tmp_path / "reference", tmp_path / "prediction", label_map=label_map
    ).summary(extra=False)
    assert_same_numbers(json.loads(json.dumps(found)), json.loads(theirs.read_text()))
