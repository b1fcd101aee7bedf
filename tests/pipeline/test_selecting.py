"""select() as a user runs it: two networks, two folds, one model to predict with."""

import json
import shutil

import numpy as np
import pytest

import medmamba
from medmamba.bundle import load_bundle, verify_bundle
from medmamba.errors import PlanError, UsageError
from medmamba.evaluation.postprocessing import load_postprocessing
from medmamba.io import read_image, read_labels
from medmamba.pipeline.predictors import make_predictor
from medmamba.pipeline.selecting import select
from medmamba.preprocessing.restore import labels_from_probabilities, restore_probabilities

pytestmark = pytest.mark.slow

NETWORKS = ("lightm_unet_s", "lightm_unet_plan")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_raw_ellipsoids):
    root = tmp_path_factory.mktemp("selected")
    raw = write_raw_ellipsoids(root / "Dataset901_Ellipsoids")
    work = root / "work"
    for network in NETWORKS:
        medmamba.plan(raw, work, network=network, workers=1)
    names = [f"case_{number:03d}" for number in range(6)]
    folds = [{"train": names[3:], "val": names[:3]}, {"train": names[:3], "val": names[3:]}]
    (work / "splits.json").write_text(json.dumps(folds))
    for network in NETWORKS:
        for fold in (0, 1):
            medmamba.train(work, network=network, fold=fold, epochs=1, iterations=2)
    return raw, work


def test_the_best_candidate_becomes_a_model(trained, tmp_path) -> None:
    raw, work = trained
    outcome = select(work, output=tmp_path / "model", ensembles=True)
    assert len(outcome.candidates) == 3
    assert outcome.candidates[0].dice == max(one.dice for one in outcome.candidates)
    assert outcome.dice_after >= outcome.candidates[0].dice
    bundle = load_bundle(tmp_path / "model")
    assert bundle.folds == ("0", "1")
    assert verify_bundle(bundle).passed
    card = (tmp_path / "model" / "CARD.md").read_text()
    assert "cross_validated_dice" in card
    found = medmamba.predict(raw / "imagesTs", tmp_path / "masks", tmp_path / "model")
    assert found.succeeded == 2
    stored = json.loads((work / "selection" / "selection.json").read_text())
    assert stored["chosen"] == outcome.candidates[0].name


def test_a_pair_predicts_the_mean_of_probabilities(trained, tmp_path) -> None:
    raw, work = trained
    from medmamba.bundle import save_ensemble

    members = []
    for number, network in enumerate(NETWORKS):
        found = select(work, networks=[network], output=tmp_path / str(number), ensembles=False)
        members.append(found.bundle.folder)
    cleaning = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
        "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}],
    }
    pair = save_ensemble(tmp_path / "pair", members, name="pair", postprocessing=cleaning)
    medmamba.predict(raw / "imagesTs", tmp_path / "masks", pair.folder, precision="fp32")
    image, _ = read_image(raw / "imagesTs" / "case_006_0000.nii.gz")
    total = 0.0
    for member in pair.models:
        predictor = make_predictor(member, precision="fp32").members[0]
        prepared = predictor.prepare(image)
        total = total + restore_probabilities(
            predictor.logits(prepared), prepared.record, predictor.recipe, predictor.label_map
        )
    labels = labels_from_probabilities(total / 2, pair.plan.label_map)
    expected = load_postprocessing(pair.folder / "postprocessing.json").apply(labels)
    mask, _ = read_labels(tmp_path / "masks" / "case_006.nii.gz")
    np.testing.assert_array_equal(mask.array[0], expected)


def test_a_missing_fold_is_named(trained, tmp_path) -> None:
    _, work = trained
    copy = tmp_path / "work"
    shutil.copytree(work, copy, ignore=shutil.ignore_patterns("preprocessed", "selection"))
    for network in NETWORKS:
        shutil.rmtree(copy / "runs" / network / "3d_fullres" / "fold_1")
    with pytest.raises(PlanError, match="fold 1 not trained"):
        select(copy)
    with pytest.raises(UsageError, match="plain_unet"):
        select(copy, networks=["plain_unet"])
