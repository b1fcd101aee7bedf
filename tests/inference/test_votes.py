import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medmamba.inference.predictor import PredictionSettings, Predictor
from medmamba.labels import LabelMap
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.volume import Geometry, Grid, Volume

CLASSES = LabelMap(values={"background": (0,), "low": (1,), "high": (2,)})
REGIONS = LabelMap(
    values={"background": (0,), "all": (1, 2), "core": (2,), "rim": (1,)}, region_order=(1, 2, 1)
)
RECIPE = PreprocessingRecipe(
    channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(0, 1, 2)
)
SIZE = (6, 7, 8)


def networks(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Conv3d(1, 3, 3, padding=1) for _ in range(count)]


def predictor(folds: list[nn.Module], label_map: LabelMap, axes: tuple[int, ...]) -> Predictor:
    settings = PredictionSettings(mirror_axes=axes)
    return Predictor(
        folds, grid=Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=SIZE), preprocessing=RECIPE,
        label_map=label_map, settings=settings,
    )  # fmt: skip


def image() -> Volume:
    voxels = np.random.default_rng(0).normal(100, 5, (1, *SIZE)).astype(np.float32)
    return Volume(array=voxels, geometry=Geometry.from_spacing(SIZE, (1.0, 1.0, 1.0)))


def disagreement(each: Predictor) -> dict[str, float | None]:
    found = each.restore(each.infer(each.prepare(image())))
    return {name: item.disagreement for name, item in found.confidence.items()}


@torch.inference_mode()
def counted_by_hand(folds: list[nn.Module], label_map: LabelMap, x: Tensor) -> dict[str, float]:
    """Every fold, straight and flipped along the last axis, voxel by voxel."""
    said = [
        np.asarray(output[0])
        for fold in folds
        for output in (fold(x), fold(x.flip(-1)).flip(-1))
    ]  # fmt: skip
    mean = np.mean(said, axis=0)
    found = {}
    for channel, name in enumerate(label_map.foreground):
        if label_map.has_regions:
            won = mean[channel] > 0
            against = [(each[channel] <= 0)[won] for each in said]
        else:
            won = mean.argmax(0) == channel + 1
            against = [(each.argmax(0) != channel + 1)[won] for each in said]
        found[name] = np.mean(against)
    return found


@pytest.mark.parametrize("label_map", [CLASSES, REGIONS], ids=["classes", "regions"])
def test_flips_and_folds_are_counted_where_a_label_won(label_map: LabelMap) -> None:
    folds = networks(2)
    each = predictor(folds, label_map, (2,))
    prepared = torch.from_numpy(each.prepare(image()).data)[None]
    expected = counted_by_hand(folds, label_map, prepared)
    assert disagreement(each) == pytest.approx(expected, abs=1e-5)
    assert 0 < min(expected.values()) < max(expected.values()) < 1


def test_passes_that_say_the_same_agree() -> None:
    (network,) = networks(1)
    assert set(disagreement(predictor([network, network], CLASSES, ())).values()) == {0.0}


def test_where_the_network_spoke_once_nothing_is_said() -> None:
    assert set(disagreement(predictor(networks(1), CLASSES, ())).values()) == {None}
