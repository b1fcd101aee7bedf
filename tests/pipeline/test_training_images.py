import numpy as np
import pytest

from medmamba.inference.records import describe_labels
from medmamba.labels import FEWEST_CASES, LabelMap, UsualVolume
from medmamba.pipeline.training_images import common_orientation, measure_usual_volumes
from medmamba.preprocessing.pipeline import preprocess_case
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.preprocessing.store import CaseStore
from medmamba.volume import Geometry, Grid, Volume, VolumeKind

REGIONS = LabelMap(values={"background": (0,), "whole": (1, 2), "core": (2,)}, region_order=(1, 2))
RECIPE = PreprocessingRecipe(
    channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(0, 1, 2)
)


def test_volumes_of_stored_cases_are_those_of_their_label_images(tmp_path) -> None:
    store = CaseStore(tmp_path)
    spacing = (2.0, 1.0, 1.5)
    whole, core = [], []
    for number in range(5):
        labels = np.zeros((1, 10, 16, 12), np.int16)
        labels[0, 2:8, 2 : 5 + number, 3:9] = 1
        labels[0, 4:6, 3:5, 4:7] = 2
        geometry = Geometry.from_spacing(labels.shape[1:], spacing)
        image = np.random.default_rng(number).normal(50, 3, labels.shape).astype(np.float32)
        case = preprocess_case(
            Volume(array=image, geometry=geometry),
            Volume(array=labels, geometry=geometry, kind=VolumeKind.LABELS),
            grid=Grid(spacing_mm=spacing, patch_size=(8, 8, 8)),
            recipe=RECIPE,
            label_map=REGIONS,
        )
        store.write(f"case_{number}", case, key="k", patch_size=(8, 8, 8))
        whole.append((labels > 0).sum() * 3e-3)
        core.append((labels == 2).sum() * 3e-3)
    found = measure_usual_volumes(store, [f"case_{number}" for number in range(5)], REGIONS)
    assert set(found) == {"whole", "core"}
    assert found["whole"].low_ml == pytest.approx(np.percentile(whole, 1))
    assert found["whole"].high_ml == pytest.approx(np.percentile(whole, 99))
    assert found["core"].low_ml == found["core"].high_ml == pytest.approx(core[0])
    assert found["core"].cases == 5


def test_a_volume_is_flagged_when_it_is_not_usual_and_enough_cases_say_so() -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[1:3, 1:3, 1:3] = 2
    labels[4, 4, 4] = 1
    geometry = Geometry.from_spacing(labels.shape, (10.0, 10.0, 10.0))

    def flags(cases: int, **limits: tuple[float, float]) -> dict[str, str | None]:
        usual = {
            name: UsualVolume(low_ml=low, high_ml=high, cases=cases)
            for name, (low, high) in limits.items()
        }
        found = describe_labels(labels, geometry, REGIONS, usual=usual)
        return {item.name: item.volume_flag for item in found}

    assert flags(FEWEST_CASES, whole=(10, 12), core=(1, 7.5)) == {"whole": "low", "core": "high"}
    assert flags(FEWEST_CASES, whole=(8.9, 9.1), core=(7.9, 8.1)) == {"whole": None, "core": None}
    assert flags(FEWEST_CASES - 1, whole=(10, 12)) == {"whole": None, "core": None}


def test_the_orientation_is_known_where_all_images_have_the_same(tmp_path) -> None:
    store = CaseStore(tmp_path)
    for name, signs in {"a": (1, 1, 1), "b": (1, 1, 1), "c": (1, -1, 1)}.items():
        image = np.random.default_rng(0).normal(50, 3, (1, 10, 16, 12)).astype(np.float32)
        matrix = np.zeros((4, 4))
        # Columns of (D, H, W): z up, y and x as signs say.
        matrix[2, 0], matrix[1, 1], matrix[0, 2], matrix[3, 3] = *signs, 1
        matrix[:3, 3] = 5, 6, 7
        case = preprocess_case(
            Volume(array=image, geometry=Geometry.from_matrix((10, 16, 12), matrix)), None,
            grid=Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=(8, 8, 8)), recipe=RECIPE,
            label_map=REGIONS,
        )  # fmt: skip
        store.write(name, case, key="k", patch_size=(8, 8, 8))
    assert common_orientation(store, ["a", "b"]) == "RAS"
    assert common_orientation(store, ["c"]) == "RPS"
    assert common_orientation(store, ["a", "b", "c"]) == ""
    image = np.random.default_rng(0).normal(50, 3, (1, 10, 16, 12)).astype(np.float32)
    unknown = Geometry.from_spacing((10, 16, 12), (1.0, 2.0, 1.0))
    case = preprocess_case(
        Volume(array=image, geometry=unknown), None, recipe=RECIPE, label_map=REGIONS,
        grid=Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=(8, 8, 8)),
    )  # fmt: skip
    store.write("d", case, key="k", patch_size=(8, 8, 8))
    assert common_orientation(store, ["d"]) == ""
