"""A cascade as a user runs it: the coarse network, the fine one on its labels, prediction."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import medmamba
from medmamba.bundle import load_bundle, verify_bundle
from medmamba.dataset import Split, open_dataset, write_splits
from medmamba.errors import PlanError
from medmamba.pipeline.cascade import find_previous_stage
from medmamba.pipeline.plan_request import with_previous_stages
from medmamba.pipeline.references import keep_references
from medmamba.pipeline.validating import validate_cases
from medmamba.pipeline.work import open_work
from medmamba.plans.nnunet_schema import save_plan
from medmamba.plans.preprocess import preprocess_dataset
from medmamba.preprocessing.store import CaseStore, PreviousStore
from medmamba.volume import Grid

NETWORK, COARSE, FINE = "plain_unet", "3d_lowres", "3d_cascade_fullres"
CASES = tuple(f"case_{number:03d}" for number in range(6))


def add_cascade(work: Path) -> None:
    """Give a plan a coarse stage, which so small a dataset does not need."""
    place = open_work(work)
    plan = place.load_plan(NETWORK)
    full = plan.configurations["3d_fullres"]
    network = dataclasses.replace(
        full.network,
        patch_size=(8, 16, 16),
        features=(8, 16),
        strides=((1, 1, 1), (2, 2, 2)),
        kernel_sizes=((3, 3, 3),) * 2,
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    spacing = full.grid.spacing_mm
    coarse = dataclasses.replace(
        full,
        grid=Grid(spacing_mm=tuple(1.5 * s for s in spacing), patch_size=(8, 16, 16)),
        network=network,
        next_stage=FINE,
    )
    full = dataclasses.replace(
        full, grid=Grid(spacing_mm=spacing, patch_size=(8, 16, 16)), network=network
    )
    fine = dataclasses.replace(
        full,
        network=dataclasses.replace(network, in_channels=network.in_channels + 2),
        previous_stage=COARSE,
    )
    branches = {COARSE: coarse, "3d_fullres": full, FINE: fine}
    save_plan(place.plan(NETWORK), dataclasses.replace(plan, configurations=branches))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_raw_ellipsoids):
    root = tmp_path_factory.mktemp("cascade")
    raw = write_raw_ellipsoids(root / "Dataset901_Ellipsoids")
    work = root / "work"
    medmamba.plan(raw, work, network=NETWORK, preprocess=False, workers=1)
    add_cascade(work)
    place, dataset = open_work(work), open_dataset(raw)
    plan = place.load_plan(NETWORK)
    names = with_previous_stages(plan, [FINE])
    assert names == (COARSE, FINE)
    stores = {name: place.store(name, plan.configurations[name]) for name in names}
    preprocess_dataset(dataset, plan, stores)
    keep_references(dataset, place)
    with pytest.raises(PlanError, match=f"-c {COARSE} --fold all"):
        medmamba.train(work, network=NETWORK, configuration=FINE, fold="all", epochs=1)
    options = {"network": NETWORK, "fold": "all", "recipe": "short", "epochs": 2, "iterations": 15}
    medmamba.train(work, configuration=COARSE, **options)
    outcome = medmamba.train(work, configuration=FINE, **options)
    return raw, work, outcome


def test_one_command_predicts_through_both_stages(trained, tmp_path) -> None:
    raw, _, outcome = trained
    done = medmamba.predict(raw / "imagesTs", tmp_path / "masks", outcome.model)
    assert (done.succeeded, done.exit_code) == (2, 0)
    record = json.loads((tmp_path / "masks" / "case_006.json").read_text())
    assert (
        record["parameters"]["previous_stage"]["spacing_mm"] != record["parameters"]["spacing_mm"]
    )
    scores = medmamba.evaluate(raw / "labelsTs", tmp_path / "masks")
    assert scores.foreground_dice > 0.5


def test_whole_validation_cases_go_through_both_stages(trained, tmp_path) -> None:
    bundle, place = load_bundle(trained[2].model), open_work(trained[1])
    record = validate_cases(bundle, place, CASES[:2], tmp_path, device="cpu", overlays=False)
    assert record.dice["foreground"] > 0.5


@pytest.mark.slow
def test_folds_of_a_cascade_become_one_model(trained, tmp_path) -> None:
    raw, work = trained[0], tmp_path / "work"
    shutil.copytree(trained[1], work)
    halves = [
        Split(train=CASES[3:], validation=CASES[:3]),
        Split(train=CASES[:3], validation=CASES[3:]),
    ]
    write_splits(work / "splits.json", halves)
    said: list[str] = []
    for stage in (COARSE, FINE):
        for fold in (0, 1):
            medmamba.train(
                work, network=NETWORK, configuration=stage, fold=fold, recipe="short", epochs=1,
                iterations=2, on_message=said.append,
            )  # fmt: skip
    assert sum("validating 3 whole cases" in text for text in said) == 4
    found = medmamba.select(work, output=tmp_path / "model")
    assert {one.name for one in found.candidates} == {
        f"{NETWORK} {COARSE}",
        f"{NETWORK} {FINE}",
        f"{NETWORK} {FINE} + {NETWORK} {COARSE}",
    }
    best = medmamba.select(work, configurations=[FINE], output=tmp_path / "cascade").bundle
    assert [entry.fold for entry in best.manifest.previous_weights] == ["0", "1"]
    done = medmamba.predict(raw / "imagesTs", tmp_path / "masks", best.folder)
    assert done.succeeded == 2


def test_the_model_holds_both_stages_and_repeats_its_reference_case(trained) -> None:
    bundle = load_bundle(trained[2].model)
    assert [entry.file for entry in bundle.manifest.previous_weights] == [
        "weights/previous_fold_all.safetensors"
    ]
    assert bundle.previous is not None
    assert verify_bundle(bundle).outcome == "identical"


def test_the_second_stage_depends_on_the_first(trained, tmp_path) -> None:
    from medmamba.bundle import load_networks, load_previous_networks
    from medmamba.inference.predictor import PredictionSettings, Predictor
    from medmamba.io import read_image

    raw, _, outcome = trained
    bundle = load_bundle(outcome.model)

    def predictor(branch, networks, previous=None) -> Predictor:
        return Predictor(
            networks, grid=branch.grid, preprocessing=branch.preprocessing,
            label_map=bundle.plan.label_map, settings=PredictionSettings(), previous=previous,
        )  # fmt: skip

    image, _ = read_image(raw / "imagesTs" / "case_006_0000.nii.gz")
    logits = []
    for scale in (1.0, -1.0):
        networks = load_previous_networks(bundle)
        for parameter in networks[0].parameters():
            parameter.mul_(scale)
        first = predictor(bundle.previous, networks)
        second = predictor(bundle.configuration, load_networks(bundle), first)
        logits.append(second.logits(second.prepare(image)))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_both_resolutions_share_the_data_of_full_resolution(trained) -> None:
    place = open_work(trained[1])
    plan = place.load_plan(NETWORK)
    stores = {name: place.store(name, branch) for name, branch in plan.configurations.items()}
    assert stores["3d_fullres"] == stores[FINE] != stores[COARSE]
    previous = PreviousStore(place.previous(NETWORK, FINE, "all"))
    for case in CASES:
        labels = previous.open(case)[:]
        assert labels.shape[1:] == CaseStore(stores[FINE]).open(case).record.working_shape
        assert set(np.unique(labels)) <= {0, 1, 2}


def test_a_case_is_predicted_by_the_fold_that_held_it_out(trained, tmp_path, monkeypatch) -> None:
    place = open_work(trained[1])
    plan = place.load_plan(NETWORK)
    splits = [
        Split(train=CASES[2:], validation=CASES[:2]),
        Split(train=CASES[:2] + CASES[4:], validation=CASES[2:4]),
        Split(train=CASES[:4], validation=CASES[4:]),
    ]
    write_splits(place.splits, splits)
    with pytest.raises(
        PlanError, match=r"fold 0, 1, 2: run `medmamba train .*-c 3d_lowres --fold 0"
    ):
        find_previous_stage(place, plan, FINE, 1, splits[1])
    model = place.run(NETWORK, COARSE, "all") / "model"
    for fold in range(3):
        (place.run(NETWORK, COARSE, fold)).mkdir(parents=True)
        (place.run(NETWORK, COARSE, fold) / "model").symlink_to(model)
    found = find_previous_stage(place, plan, FINE, 1, splits[1])
    assert found.fold == 1
    assert [found.fold_of[case] for case in CASES] == [0, 0, 1, 1, 2, 2]
    assert find_previous_stage(place, plan, COARSE, 1, splits[1]) is None
