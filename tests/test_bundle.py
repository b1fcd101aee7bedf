import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medmamba.bundle import (
    Bundle,
    find_bundle,
    load_bundle,
    load_networks,
    read_manifest,
    save_bundle,
    save_ensemble,
    verify_bundle,
)
from medmamba.errors import BundleError, EnvironmentFault, SecurityError
from medmamba.files import hash_file
from medmamba.labels import LabelMap
from medmamba.networks import build_network
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.tensor_file import MAX_HEADER_BYTES
from medmamba.plans.plan import ConfigurationPlan, Plan
from medmamba.preprocessing.recipe import (
    ChannelRecipe,
    ChannelStatistics,
    Normalization,
    PreprocessingRecipe,
)
from medmamba.training.recipe import TrainingRecipe
from medmamba.volume import Grid

CONFIGURATION = "3d_fullres"
STATISTICS = ChannelStatistics(
    mean=1.0, median=1.0, std=1.0, min=0.0, max=2.0, percentile_00_5=0.0, percentile_99_5=2.0
)


def tiny_plan() -> Plan:
    spec = NetworkSpec(
        name="plain_unet",
        in_channels=1,
        out_channels=3,
        patch_size=(8, 8, 8),
        features=(4, 8),
        strides=((1, 1, 1), (2, 2, 2)),
        kernel_sizes=((3, 3, 3), (3, 3, 3)),
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    branch = ConfigurationPlan(
        grid=Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=(8, 8, 8)),
        preprocessing=PreprocessingRecipe(
            channels=(ChannelRecipe(normalization=Normalization.ZSCORE),),
            transpose_forward=(0, 1, 2),
        ),
        network=spec,
        training=TrainingRecipe(batch_size=2),
        median_shape=(10, 10, 10),
        data_identifier="nnUNetPlans_3d_fullres",
    )
    return Plan(
        dataset_name="Dataset001_Tiny",
        plans_name="nnUNetPlans",
        planner="ExperimentPlanner",
        network="plain_unet",
        configurations={CONFIGURATION: branch},
        label_map=LabelMap(values={"background": (0,), "front": (1,), "back": (2,)}),
        channel_names=("MRI",),
        file_ending=".nii.gz",
        reader="SimpleITKIO",
        transpose_forward=(0, 1, 2),
        median_spacing_mm=(1.0, 1.0, 1.0),
        median_shape=(10, 10, 10),
        intensities=(STATISTICS,),
    )


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_network(tiny_plan().configurations[CONFIGURATION].network).state_dict()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return save_bundle(
        tmp_path / "model",
        plan=tiny_plan(),
        configuration=CONFIGURATION,
        weights=[weights(0), weights(1)],
        scores={"mean Dice": 0.9},
        training={"epochs": 3},
    )


def rehash(folder: Path) -> None:
    """What someone does who damages a bundle and covers it up."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [
        f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in files
        if path.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    rehash(folder)


def test_a_bundle_comes_back_as_it_went(bundle: Bundle) -> None:
    again = load_bundle(bundle.folder)
    assert again == bundle
    assert again.plan == tiny_plan()
    assert again.folds == ("0", "1")
    assert again.manifest.scores == {"mean Dice": 0.9}
    assert "not a medical device" in again.manifest.intended_use.lower()
    assert [entry.name for entry in again.manifest.labels] == ["front", "back"]
    assert len({entry.color for entry in again.manifest.labels}) == 2
    for seed, network in enumerate(load_networks(again)):
        assert not network.training
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, weights(seed)[name])


def test_equal_content_gives_an_equal_identity(bundle: Bundle, tmp_path: Path) -> None:
    same = save_bundle(
        tmp_path / "other",
        plan=tiny_plan(),
        configuration=CONFIGURATION,
        weights=[weights(0), weights(1)],
        scores={"mean Dice": 0.9},
        training={"epochs": 3},
    )
    assert same.sha256 == bundle.sha256
    other = save_bundle(
        tmp_path / "third", plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(2)]
    )
    assert other.sha256 != bundle.sha256


def test_saving_replaces_a_bundle_whole_and_leaves_nothing_else(bundle: Bundle) -> None:
    newer = save_bundle(
        bundle.folder, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(5)]
    )
    assert newer.folds == ("0",)
    assert sorted(path.name for path in bundle.folder.parent.iterdir()) == ["model"]
    assert [path.name for path in (bundle.folder / "weights").iterdir()] == ["fold_0.safetensors"]


def test_a_failed_save_keeps_the_old_bundle(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, plan: Plan) -> None:
        raise EnvironmentFault("disk full")

    monkeypatch.setattr("medmamba.bundling.writing.save_plan", fail)
    with pytest.raises(EnvironmentFault):
        save_bundle(
            bundle.folder, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(5)]
        )
    assert load_bundle(bundle.folder) == bundle
    assert sorted(path.name for path in bundle.folder.parent.iterdir()) == ["model"]


def test_a_run_folder_stands_for_its_model(bundle: Bundle) -> None:
    assert find_bundle(bundle.folder.parent) == bundle.folder
    assert read_manifest(bundle.folder.parent) == bundle.manifest


@pytest.mark.parametrize("make", ["nothing", "empty", "file"])
def test_what_was_looked_for_is_said(tmp_path: Path, make: str) -> None:
    place = tmp_path / make
    if make == "empty":
        place.mkdir()
    elif make == "file":
        place.write_text("x")
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(place)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    place = tmp_path / f"model{suffix}"
    place.write_bytes(b"\x80\x04.")
    with pytest.raises(SecurityError, match="convert") as caught:
        load_bundle(place)
    assert caught.value.code == "E_MODEL_UNSAFE"


@pytest.mark.parametrize("name", ["weights/fold_0.safetensors", "plan.json", "manifest.json"])
def test_a_changed_byte_is_a_security_refusal(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    data = bytearray(path.read_bytes())
    at = -3 if name.startswith("weights") else data.index(b"Dataset001")
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(SecurityError) as caught:
        load_bundle(bundle.folder)
    assert caught.value.code == "E_MODEL_HASH"
    assert caught.value.exit_code == 7
    assert Path(name).name in caught.value.message


@pytest.mark.parametrize(
    "name",
    ["weights/fold_1.safetensors", "plan.json", "manifest.json", "SHA256SUMS"],
)
def test_a_missing_file_is_named(bundle: Bundle, name: str) -> None:
    (bundle.folder / name).unlink()
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle.folder)
    assert Path(name).name in caught.value.message
    assert caught.value.exit_code == 3


def test_missing_folds_can_be_done_without(bundle: Bundle) -> None:
    (bundle.folder / "weights" / "fold_1.safetensors").unlink()
    assert load_bundle(bundle.folder, folds=[0]).folds == ("0",)
    with pytest.raises(BundleError, match="folds 0, 1; asked for 7"):
        load_bundle(bundle.folder, folds=[7])


def test_truncated_weights_are_a_damaged_bundle(bundle: Bundle) -> None:
    path = bundle.folder / "weights" / "fold_0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match="bytes"):
        load_bundle(bundle.folder)
    change_manifest(
        bundle.folder,
        lambda content: content["weights"][0].update(size_bytes=path.stat().st_size),
    )
    with pytest.raises(BundleError, match="its header describes"):
        load_bundle(bundle.folder)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**63])
def test_a_giant_header_is_never_read(bundle: Bundle, length: int) -> None:
    path = bundle.folder / "weights" / "fold_0.safetensors"
    data = bytearray(path.read_bytes())
    data[:8] = struct.pack("<Q", length)
    path.write_bytes(data)
    rehash(bundle.folder)
    with pytest.raises(BundleError, match="header"):
        load_bundle(bundle.folder)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda content: content.update(surprise=1), "surprise"),
        (lambda content: content.pop("configuration"), "configuration"),
        (lambda content: content.update(schema_version=2), "schema_version"),
        (lambda content: content.update(channels=["CT", "PET"]), "channels"),
        (lambda content: content["labels"].pop(), "labels"),
        (lambda content: content.update(configuration="2d"), "configuration"),
        (lambda content: content.update(weights=[]), "weights"),
    ],
)
def test_manifests_that_do_not_fit_are_refused_by_key(
    bundle: Bundle, change: Callable[[dict], object], key: str
) -> None:
    change_manifest(bundle.folder, change)
    with pytest.raises(BundleError, match=key):
        load_bundle(bundle.folder)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/passwd"])
def test_paths_never_leave_the_folder(bundle: Bundle, name: str) -> None:
    change_manifest(bundle.folder, lambda content: content["weights"][0].update(file=name))
    with pytest.raises(SecurityError) as caught:
        load_bundle(bundle.folder)
    assert caught.value.code == "E_PATH_ESCAPE"


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, torch.Tensor]:
    state = weights()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(next(iter(state))), "missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "unexpected"),
        (lambda state: state.update({next(iter(state)): torch.zeros(2, 2)}), "another shape"),
        (lambda state: next(iter(state.values())).fill_(float("nan")), "NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    saved = save_bundle(
        tmp_path / "model",
        plan=tiny_plan(),
        configuration=CONFIGURATION,
        weights=[edited(change)],
        reference_case=False,
    )
    with pytest.raises(BundleError, match=message):
        load_networks(saved)


def test_the_reference_case_is_repeated_to_the_byte(bundle: Bundle) -> None:
    found = verify_bundle(bundle)
    assert found.passed
    assert (found.outcome, found.agreement) == ("identical", 1.0)
    assert found.logits_difference == 0


def test_another_computation_is_noticed(bundle: Bundle) -> None:
    path = bundle.folder / "reference.json"
    other = save_bundle(
        bundle.folder.parent / "other",
        plan=tiny_plan(),
        configuration=CONFIGURATION,
        weights=[weights(3)],
    )
    path.write_text((other.folder / "reference.json").read_text())
    with pytest.raises(SecurityError, match=r"reference\.json"):
        load_bundle(bundle.folder)
    rehash(bundle.folder)
    assert not verify_bundle(load_bundle(bundle.folder)).passed


@pytest.mark.parametrize(
    ("change", "key"),
    [({"pattern_version": 99}, "pattern_version"), ({"mask": "AAAA"}, "mask"), ({"x": 1}, "x")],
)
def test_damaged_reference_cases_are_refused(
    bundle: Bundle, change: dict[str, object], key: str
) -> None:
    path = bundle.folder / "reference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=key):
        verify_bundle(bundle)
    path.unlink()
    with pytest.raises(BundleError, match="does not exist"):
        verify_bundle(bundle)


POSTPROCESSING = {
    "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
    "postprocessing_kwargs": [{"labels_or_regions": 1}],
}


@pytest.fixture
def ensemble(bundle: Bundle, tmp_path: Path) -> Bundle:
    save_bundle(
        tmp_path / "other", plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(2)]
    )
    return save_ensemble(
        tmp_path / "both",
        [bundle.folder, tmp_path / "other"],
        name="two networks",
        scores={"Dice": 0.8},
        postprocessing=POSTPROCESSING,
    )


def test_an_ensemble_holds_its_members(ensemble: Bundle, bundle: Bundle) -> None:
    again = load_bundle(ensemble.folder)
    assert again == ensemble
    assert [len(load_networks(model)) for model in again.models] == [2, 1]
    assert again.manifest.network == "plain_unet + plain_unet"
    assert again.postprocessing is not None
    assert again.postprocessing.steps == ((1,),)
    assert verify_bundle(again).outcome == "identical"
    assert "two networks" in (again.folder / "CARD.md").read_text()
    assert bundle.models == (bundle,)
    assert bundle.postprocessing is None


@pytest.mark.parametrize("name", ["weights/fold_0.safetensors", "SHA256SUMS", "manifest.json"])
def test_a_changed_member_is_a_security_refusal(ensemble: Bundle, name: str) -> None:
    path = next((ensemble.folder / "members").iterdir()) / name
    data = bytearray(path.read_bytes())
    data[data.index(b"Dataset001") if name.startswith("manifest") else -3] ^= 1
    path.write_bytes(data)
    with pytest.raises(SecurityError):
        load_bundle(ensemble.folder)


def test_changed_postprocessing_is_a_security_refusal(ensemble: Bundle) -> None:
    (ensemble.folder / "postprocessing.json").write_text("{}")
    with pytest.raises(SecurityError, match="postprocessing"):
        load_bundle(ensemble.folder)


def test_members_must_belong_together(bundle: Bundle, tmp_path: Path) -> None:
    other = dataclasses.replace(
        tiny_plan(), label_map=LabelMap(values={"background": (0,), "x": (1,), "y": (2,)})
    )
    save_bundle(tmp_path / "other", plan=other, configuration=CONFIGURATION, weights=[weights(2)])
    with pytest.raises(BundleError, match="labels"):
        save_ensemble(tmp_path / "both", [bundle.folder, tmp_path / "other"], name="x")
    with pytest.raises(BundleError, match="1 members"):
        save_ensemble(tmp_path / "both", [bundle.folder], name="x")
    assert not (tmp_path / "both").exists()
