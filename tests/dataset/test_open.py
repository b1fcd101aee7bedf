"""Opening raw datasets in both layouts, and reading their cases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medmamba import io
from medmamba.dataset import Case, load_case, open_dataset, read_label_map
from medmamba.errors import DatasetError, InputError

Edit = Callable[..., None]
Write = Callable[..., Path]


def random_image(seed: int, shape: tuple[int, ...] = (10, 12, 8)) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def test_nnunet_layout(raw_dataset: Path) -> None:
    (raw_dataset / "imagesTr" / "._case_00_0000.nii.gz").write_bytes(b"macOS")
    dataset = open_dataset(raw_dataset)
    assert (dataset.name, dataset.layout) == ("Dataset123_Phantom", "nnunet")
    assert dataset.channel_names == ("PET", "MRI")
    assert [case.id for case in dataset.training_cases] == [f"case_{i:02d}" for i in range(6)]
    assert [case.id for case in dataset.test_cases] == ["new"]
    case = dataset.case("case_03")
    assert [path.name for path in case.images] == ["case_03_0000.nii.gz", "case_03_0001.nii.gz"]
    assert case.labels == raw_dataset / "labelsTr" / "case_03.nii.gz"
    image, labels, header = load_case(case, channels=2)
    assert labels is not None
    assert (image.array.shape, labels.array.shape) == ((2, 8, 12, 10), (1, 8, 12, 10))
    assert image.geometry.spacing_mm == (2.0, 1.5, 1.0)
    assert np.array_equal(image.array[1], random_image(31).T)
    assert header.warnings == ()


def test_old_key_regions_ignore_and_reader(raw_dataset: Path, edit: Edit) -> None:
    edit(raw_dataset, channel_names=None, modality={"0": "CT", "1": "noNorm"},
         labels={"background": 0, "whole": [1, 2], "tumour": 2, "ignore": 3},
         regions_class_order=[1, 2])  # fmt: skip
    dataset = open_dataset(raw_dataset)
    assert dataset.channel_names == ("CT", "noNorm")
    assert dataset.description["channel_names"] == {"0": "CT", "1": "noNorm"}
    assert (dataset.label_map.has_regions, dataset.label_map.ignore_value) == (True, 3)


def test_list_of_files(raw_dataset: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGES_OF_TEST", str(raw_dataset / "imagesTr"))
    listed = {
        "a": {
            "images": ["$IMAGES_OF_TEST/case_00_0000.nii.gz", "imagesTr/case_00_0001.nii.gz"],
            "label": str(raw_dataset / "labelsTr" / "case_00.nii.gz"),
        }
    }
    edit(raw_dataset, dataset=listed, numTraining=1)
    (case,) = open_dataset(raw_dataset).training_cases
    image, labels, _ = load_case(case)
    assert image.array.shape[0] == 2
    assert labels is not None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"channel_names": None}, "'channel_names' is None"),
        ({"channel_names": {"0": "CT", "2": "MRI"}}, "must be 0 to 1"),
        ({"file_ending": None}, "'file_ending' is None"),
        ({"file_ending": ".dcm"}, "'file_ending' is '.dcm'"),
        ({"file_ending": ".mha"}, "has no training case"),
        ({"labels": {"background": 0, "liver": 2}}, "have gaps"),
        ({"labels": {"liver": 1}}, "'background' is None"),
        ({"labels": None}, "'labels' is None"),
        ({"dataset": {"a": {"label": "x"}}}, "entry 'a'"),
        ({"dataset": ["a"]}, "a map case -> files"),
    ],
)
def test_what_cannot_be_opened(
    raw_dataset: Path, edit: Edit, entries: dict[str, Any], message: str
) -> None:
    edit(raw_dataset, **entries)
    with pytest.raises(DatasetError) as caught:
        open_dataset(raw_dataset)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3


def test_no_folder_no_description_no_json(tmp_path: Path) -> None:
    for prepare, message in (
        (lambda: None, "is not a folder"),
        (lambda: (tmp_path / "d").mkdir(), "has no dataset.json"),
        (lambda: (tmp_path / "d" / "dataset.json").write_text("{"), "not valid JSON"),
        (lambda: (tmp_path / "d" / "dataset.json").write_text("[]"), "a map is needed"),
    ):
        prepare()
        with pytest.raises(DatasetError, match=message):
            open_dataset(tmp_path / "d")


def decathlon(folder: Path, write: Write, *, channels: int, numbered: bool = False) -> Path:
    shape = (10, 12, 8) if channels == 1 else (10, 12, 8, channels)
    for index in range(3):
        name = f"BRATS_{index:03d}{'_0000' if numbered else ''}.nii.gz"
        write(folder / "imagesTr" / name, random_image(index, shape))
        (folder / "imagesTr" / f"._BRATS_{index:03d}.nii.gz").write_bytes(b"macOS")
        write(folder / "labelsTr" / f"BRATS_{index:03d}.nii.gz",
              np.pad(np.ones((2, 2, 2), np.uint8), ((3, 5), (3, 7), (2, 4))))  # fmt: skip
    write(folder / "imagesTs" / "BRATS_900.nii.gz", random_image(9, shape))
    description = {
        "name": "BRATS",
        "modality": {str(index): f"m{index}" for index in range(channels)},
        "labels": {"0": "Background", "1": "edema"},
        "numTraining": 3,
        "training": [{"image": f"./imagesTr/BRATS_{i:03d}.nii.gz",
                      "label": f"./labelsTr/BRATS_{i:03d}.nii.gz"} for i in (2, 0, 1)],
        "test": ["./imagesTs/BRATS_900.nii.gz"],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def test_label_map_alone(raw_dataset: Path, tmp_path: Path, volume: Write) -> None:
    assert read_label_map(raw_dataset / "dataset.json").foreground_values == (1, 2)
    task = decathlon(tmp_path / "Task01_X", volume, channels=1)
    assert read_label_map(task / "dataset.json").values == {"background": (0,), "edema": (1,)}
    with pytest.raises(DatasetError):
        read_label_map(tmp_path / "none.json")


@pytest.mark.parametrize("channels", [1, 4])
def test_decathlon_layout(channels: int, tmp_path: Path, volume: Write) -> None:
    dataset = open_dataset(decathlon(tmp_path / "Task01_BrainTumour", volume, channels=channels))
    assert (dataset.name, dataset.layout) == ("Dataset001_BrainTumour", "decathlon")
    assert [case.id for case in dataset.training_cases] == ["BRATS_000", "BRATS_001", "BRATS_002"]
    assert [case.id for case in dataset.test_cases] == ["BRATS_900"]
    assert dataset.description["labels"] == {"background": 0, "edema": 1}
    assert dataset.description["file_ending"] == ".nii.gz"
    image, labels, header = load_case(dataset.case("BRATS_001"), channels=channels)
    assert image.array.shape == (channels, 8, 12, 10)
    assert labels is not None
    stored = random_image(1, (10, 12, 8) if channels == 1 else (10, 12, 8, channels))
    assert np.array_equal(image.array[-1], (stored if channels == 1 else stored[..., -1]).T)
    assert header.channels == channels


def test_first_nnunet_layout_numbers_its_files(tmp_path: Path, volume: Write) -> None:
    folder = decathlon(tmp_path / "Task7_Old", volume, channels=1, numbered=True)
    dataset = open_dataset(folder)
    assert dataset.name == "Dataset007_Old"
    assert load_case(dataset.training_cases[0])[0].array.shape == (1, 8, 12, 10)


def test_colour_planes(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset200_Colour"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    random = np.random.default_rng(1)
    for index in range(2):
        colour = random.integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(colour).save(folder / "imagesTr" / f"c{index}_0000.png")
        Image.fromarray(colour[..., 0] // 128).save(folder / "labelsTr" / f"c{index}.png")
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "R", "1": "G", "2": "B"}, "numTraining": 2,
        "labels": {"background": 0, "cell": 1}, "file_ending": ".png",
    }))  # fmt: skip
    dataset = open_dataset(folder)
    image, labels, header = load_case(dataset.training_cases[1], channels=3)
    assert (image.array.shape, header.dimension) == ((3, 1, 9, 11), 2)
    assert labels is not None
    assert np.array_equal(image.array[:, 0], np.moveaxis(colour, -1, 0).astype(np.float32))


def code_of(case: Case, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_case(case, **options)
    assert case.id in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.code


def test_files_that_do_not_belong_together(tmp_path: Path, volume: Write) -> None:
    first = volume(tmp_path / "a_0000.nii.gz", random_image(1))
    shifted = volume(tmp_path / "a_0001.nii.gz", random_image(2), origin=(0.0, 5.0, 0.0))
    smaller = volume(tmp_path / "b.nii.gz", np.ones((10, 12, 7), np.uint8))
    flat = volume(tmp_path / "c.nii.gz", np.full((10, 12, 8), 3, np.int16))
    four = volume(tmp_path / "d.nii.gz", random_image(4, (10, 12, 8, 3)))
    assert code_of(Case(id="a", images=(first, shifted))) == "E_CHAN_GRID"
    joined, _, _ = load_case(Case(id="a", images=(first, shifted)), allow_geometry_mismatch=True)
    assert joined.array.shape[0] == 2
    both = Case(id="a", images=(first, smaller))
    assert code_of(both, allow_geometry_mismatch=True) == "E_CHAN_GRID"
    assert code_of(Case(id="a", images=(first,), labels=smaller)) == "E_LABEL_GRID"
    assert code_of(Case(id="a", images=(first,)), channels=2) == "E_CHAN_COUNT"
    assert code_of(Case(id="d", images=(four,)), channels=1) == "E_SHAPE_4D"
    assert load_case(Case(id="d", images=(four,)), channels=3)[0].array.shape[0] == 3
    assert code_of(Case(id="c", images=(flat,))) == "E_VAL_CONSTANT"
    assert code_of(Case(id="e", images=())) == "E_CHAN_COUNT"
    assert code_of(Case(id="a", images=(first, flat))) == "E_VAL_CONSTANT"


def test_an_absent_modality_may_be_zero_in_training(tmp_path: Path, volume: Write) -> None:
    first = volume(tmp_path / "a_0000.nii.gz", random_image(1))
    zeros = volume(tmp_path / "a_0001.nii.gz", np.zeros((10, 12, 8), np.float32))
    labels = volume(tmp_path / "l.nii.gz", np.ones((10, 12, 8), np.uint8))
    _, _, header = load_case(Case(id="a", images=(first, zeros), labels=labels))
    assert header.warning_codes == ("W_VAL_CONSTANT",)


def test_prediction_is_stricter_about_grids_than_training(tmp_path: Path, volume: Write) -> None:
    first = volume(tmp_path / "a_0000.nii.gz", random_image(1))
    near = volume(tmp_path / "a_0001.nii.gz", random_image(2), origin=(0.02, 0.0, 0.0))
    labels = volume(tmp_path / "l.nii.gz", np.ones((10, 12, 8), np.uint8))
    assert code_of(Case(id="a", images=(first, near))) == "E_CHAN_GRID"
    assert load_case(Case(id="a", images=(first, near), labels=labels))[1] is not None


def test_real_datasets_open_and_load(data_dir: Path) -> None:
    folders = [path.parent for path in sorted(data_dir.glob("*/dataset.json"))]
    assert folders
    for folder in folders:
        dataset = open_dataset(folder)
        assert len(dataset.training_cases) == dataset.description["numTraining"]
        image, labels, header = load_case(
            dataset.training_cases[0], channels=len(dataset.channel_names)
        )
        assert labels is not None
        assert set(np.unique(labels.array)) <= set(dataset.label_map.all_values)
        assert not [code for code in header.warning_codes if code.startswith("W_")]
        assert image.array.dtype == np.float32


def test_preprocessing_inputs_read_as_the_reference_read_them(fixtures_dir: Path) -> None:
    """Spacing and shape before cropping in the goldens are what the reference reader returned."""
    checked = 0
    for case in sorted((fixtures_dir / "preprocess").glob("*__*__*")):
        properties = json.loads((case / "properties.json").read_text())
        plan = json.loads((case / "plans.json").read_text())
        name = case.name.split("__")[0]
        for path in sorted((fixtures_dir / "preprocess" / "raw").glob(f"*/{name}_0000.nii.gz")):
            volume, _ = io.read_image(path)
            assert volume.geometry.spacing_mm == tuple(properties["spacing"])
            working = [volume.geometry.shape[axis] for axis in plan["transpose_forward"]]
            assert working == properties["shape_before_cropping"]
            checked += 1
    if not checked:
        pytest.skip("no preprocessing goldens under the fixtures folder")
