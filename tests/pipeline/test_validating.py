"""Final validation as a user finds it after training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import medmamba
from medmamba.errors import PlanError
from medmamba.io import read_header
from medmamba.pipeline.references import find_references
from medmamba.pipeline.validating import read_validation
from medmamba.pipeline.work import Work
from medmamba.preprocessing.pipeline import preprocess_case
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.preprocessing.restore import on_working_grid, working_geometry
from medmamba.volume import Geometry, Grid, Volume


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_raw_ellipsoids):
    root = tmp_path_factory.mktemp("validated")
    raw = write_raw_ellipsoids(root / "Dataset901_Ellipsoids")
    medmamba.plan(raw, root / "work", workers=1)
    messages: list[str] = []
    outcome = medmamba.train(
        root / "work", fold=0, epochs=1, iterations=1, on_message=messages.append
    )
    return raw, Work(root / "work"), outcome, messages


def test_whole_validation_cases_are_scored_as_a_user_would(run, tmp_path) -> None:
    raw, work, outcome, messages = run
    split = json.loads(work.splits.read_text())[0]
    folder = outcome.run_folder / "validation"
    masks = sorted(folder.glob("*.nii.gz"))
    assert [path.name[:-7] for path in masks] == split["val"]
    for mask in masks:
        reference = read_header(raw / "labelsTr" / mask.name)
        assert read_header(mask).geometry == reference.geometry
    record = read_validation(outcome.run_folder)
    images = tmp_path / "images"
    images.mkdir()
    for case in split["val"]:
        name = f"{case}_0000.nii.gz"
        shutil.copy(raw / "imagesTr" / name, images)
    medmamba.predict(images, tmp_path / "masks", outcome.model)
    truth = tmp_path / "truth"
    truth.mkdir()
    for case in split["val"]:
        shutil.copy(raw / "labelsTr" / f"{case}.nii.gz", truth)
    found = medmamba.evaluate(truth, tmp_path / "masks", dataset_json=work.dataset_json)
    assert record.dice["foreground"] == pytest.approx(found.foreground_dice, abs=1e-12)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] == pytest.approx(found.foreground_dice)
    assert any("Dice of whole validation cases" in text for text in messages)


def test_pictures_show_the_worst_the_median_and_the_best(run) -> None:
    folder = run[2].run_folder / "validation" / "overlays"
    kinds = {path.name.partition("_")[0] for path in folder.glob("*.png")}
    assert kinds == {"worst", "median", "best"}


def test_missing_label_images_are_named(run, tmp_path) -> None:
    with pytest.raises(PlanError, match=r"case_000.*medmamba plan"):
        find_references(Work(tmp_path), ["case_000"])
    assert set(find_references(run[1], ["case_000"])) == {"case_000"}


def test_the_working_grid_lies_where_the_raw_image_does() -> None:
    rng = np.random.default_rng(0)
    array = np.zeros((1, 10, 12, 14), np.float32)
    array[:, 2:8, 3:9, 4:12] = rng.uniform(1, 2, (1, 6, 6, 8))
    geometry = Geometry.from_spacing((10, 12, 14), (3.0, 1.0, 2.0))
    recipe = PreprocessingRecipe(
        channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(2, 0, 1)
    )
    grid = Grid(spacing_mm=(2.0, 3.0, 1.0), patch_size=(8, 8, 8))
    case = preprocess_case(
        Volume(array=array, geometry=geometry), None, grid=grid, recipe=recipe,
        label_map=medmamba.LabelMap(values={"background": (0,), "a": (1,)}),
    )  # fmt: skip
    place = working_geometry(case.record)
    corner = geometry.matrix @ [2, 3, 4, 1]
    np.testing.assert_allclose(place.matrix[:, 3], corner)
    assert place.spacing_mm == pytest.approx((2.0, 3.0, 1.0))
    labels = np.arange(array.size).reshape(array.shape[1:])
    moved = on_working_grid(labels, case.record)
    assert moved.shape == place.shape
    assert moved[0, 0, 0] == labels[2, 3, 4]
    assert moved[1, 2, 3] == labels[4, 6, 5]


def test_predicted_cases_are_not_predicted_again(run) -> None:
    from medmamba.bundle import load_bundle
    from medmamba.pipeline.validating import validate_cases

    _, work, outcome, _ = run
    mask = next(Path(outcome.run_folder / "validation").glob("*.nii.gz"))
    before = mask.stat().st_mtime_ns
    record = read_validation(outcome.run_folder)
    again = validate_cases(load_bundle(outcome.model), work, record.cases, outcome.run_folder)
    assert again == record
    assert mask.stat().st_mtime_ns == before
