import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medmamba.errors import EnvironmentFault, MedMambaError
from medmamba.inference.predictor import PredictionSettings, Predictor
from medmamba.labels import LabelMap
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.volume import Geometry, Grid, Volume

LABELS = LabelMap(values={"background": (0,), "bright": (1,)})
RECIPE = PreprocessingRecipe(
    channels=(ChannelRecipe(normalization=Normalization.ZSCORE),), transpose_forward=(0, 1, 2)
)
GRID = Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=(8, 8, 8))


class Bright(nn.Module):
    """Foreground where the normalised image is above the mean."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([-x, x + self.shift], dim=1)


def predictor(*networks: nn.Module, grid: Grid = GRID, **settings: object) -> Predictor:
    return Predictor(
        networks,
        grid=grid,
        preprocessing=RECIPE,
        label_map=LABELS,
        settings=PredictionSettings(**settings),
    )


def ball(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Volume:
    """A bright ball in a grey block."""
    axes = [(np.arange(n) - n / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    voxels = np.where(z**2 + y**2 + x**2 < 16, 100.0, 10.0).astype(np.float32)
    return Volume(array=voxels[None], geometry=Geometry.from_spacing(shape, spacing_mm))


def test_labels_come_back_on_the_images_own_grid() -> None:
    image = ball((9, 24, 21), (2.0, 0.8, 0.9))
    half_way = -4.6  # the ball is 4.8 standard deviations above the mean, the block 0.2 below
    labels = predictor(Bright(half_way)).predict(image)
    assert labels.shape == (9, 24, 21)
    truth = image.array[0] > 50
    overlap = 2 * (truth & (labels == 1)).sum() / (truth.sum() + (labels == 1).sum())
    assert overlap > 0.9


def test_a_2d_grid_keeps_the_slices() -> None:
    image = ball((5, 24, 21), (4.0, 1.0, 1.0))
    grid = Grid(spacing_mm=(1.0, 1.0), patch_size=(16, 16))
    network = Bright()
    labels = predictor(network, grid=grid).predict(image)
    np.testing.assert_array_equal(labels == 1, image.array[0] > 50)


def test_logits_of_folds_are_averaged() -> None:
    image = ball((8, 8, 8), (1.0, 1.0, 1.0))
    single = predictor(Bright(0.0))
    prepared = single.prepare(image)
    first = single.logits(prepared)
    second = predictor(Bright(3.0)).logits(prepared)
    both = predictor(Bright(0.0), Bright(3.0)).logits(prepared)
    torch.testing.assert_close(both, (first + second) / 2)


def test_only_by_default_weights_change_their_layout_and_with_it_the_order_of_sums() -> None:
    def contiguous(*, compat: bool) -> bool:
        network = nn.Conv3d(2, 2, 3)
        predictor(network, compat=compat)
        return network.weight.is_contiguous()

    assert contiguous(compat=True)
    assert not contiguous(compat=False)


def test_progress_counts_tiles() -> None:
    image = ball((8, 8, 12), (1.0, 1.0, 1.0))
    seen: list[tuple[int, int]] = []
    model = predictor(Bright(), Bright())
    model.infer(model.prepare(image), on_tiles=lambda *now: seen.append(now))
    assert seen[-1] == (2, 2)


@pytest.mark.parametrize("failures", [1, 2])
def test_the_ladder_gives_the_same_labels_with_less_memory(failures: int) -> None:
    class Hungry(Bright):
        def forward(self, x: Tensor) -> Tensor:
            if self.calls < failures:
                self.calls += 1
                raise torch.OutOfMemoryError("fake device is full")
            return super().forward(x)

    image = ball((8, 12, 8), (1.0, 1.0, 1.0))
    calm = predictor(Bright())
    prepared = calm.prepare(image)
    hungry = predictor(Hungry())
    found = hungry.restore(hungry.infer(prepared))
    assert len(found.fallbacks) == 1
    np.testing.assert_array_equal(found.labels, calm.restore(calm.infer(prepared)).labels)
    torch.testing.assert_close(predictor(Hungry()).logits(prepared), calm.logits(prepared))


class Hungry(Bright):
    """Has memory on no device, until ``failures`` passes were tried."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures
        self.moves: list[str] = []

    def _apply(self, fn, recurse=True):
        self.moves.append(str(fn(torch.zeros(1)).device))
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.failures:
            raise torch.OutOfMemoryError("fake device is full")
        return super().forward(x)


def test_the_cpu_is_the_last_step_only_where_it_is_allowed() -> None:
    image = ball((8, 8, 8), (1.0, 1.0, 1.0))
    with pytest.raises(EnvironmentFault, match="allow-cpu-fallback"):
        predictor(Hungry(3)).predict(image)
    network = Hungry(3)
    patient = predictor(network, cpu_fallback=True)
    moves = len(network.moves)
    found = patient.restore(patient.infer(patient.prepare(image)))
    assert found.fallbacks == ("computed on the CPU",)
    assert len(network.moves) == moves + 2  # there and back, for the next case
    np.testing.assert_array_equal(found.labels, predictor(Bright()).predict(image))


def test_half_a_patch_is_tried_before_the_cpu_and_said() -> None:
    image = ball((8, 8, 8), (1.0, 1.0, 1.0))
    network = Hungry(3)
    sizes: list[tuple[int, ...]] = []
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    frugal = predictor(network, cpu_fallback=True, patch_multiple=(2, 2, 4))
    found = frugal.restore(frugal.infer(frugal.prepare(image)))
    assert found.fallbacks == ("computed in smaller patches",)
    # Half of 8 is twice 2, and only once 4.
    assert set(sizes[:3]) == {(8, 8, 8)}
    assert set(sizes[3:]) == {(4, 4, 8)}
    np.testing.assert_array_equal(found.labels, predictor(Bright()).predict(image))


def test_too_little_memory_for_anything_is_an_environment_fault() -> None:
    class Starving(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("fake device is full")

    model = predictor(Starving())
    with pytest.raises(EnvironmentFault, match="too little memory") as caught:
        model.predict(ball((8, 8, 8), (1.0, 1.0, 1.0)))
    assert caught.value.code == "E_MEM_GPU"


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        predictor(Broken()).predict(ball((8, 8, 8), (1.0, 1.0, 1.0)))


def test_logits_that_are_not_finite_are_never_a_mask() -> None:
    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, x / 0], dim=1)

    with pytest.raises(MedMambaError) as caught:
        predictor(Overflowing()).predict(ball((8, 8, 8), (1.0, 1.0, 1.0)))
    assert caught.value.code == "E_NUM_NONFINITE"


def test_reduced_precision_that_overflows_is_repeated_in_fp32() -> None:
    class OverflowingInHalf(Bright):
        def forward(self, x: Tensor) -> Tensor:
            scale = float("inf") if torch.is_autocast_enabled("cpu") else 1.0
            return super().forward(x) * scale

    image = ball((8, 8, 8), (1.0, 1.0, 1.0))
    model = predictor(OverflowingInHalf(), precision="bf16")
    found = model.restore(model.infer(model.prepare(image)))
    assert found.fallbacks == ("repeated in fp32",)
    np.testing.assert_array_equal(found.labels, predictor(Bright()).predict(image))


def test_parameters_name_everything_that_changes_labels() -> None:
    base = predictor(Bright()).parameters()
    changes = {"precision": "bf16", "mirror_axes": (0,), "step": 0.25, "compat": True}
    for name, value in changes.items():
        assert predictor(Bright(), **{name: value}).parameters() != base
    assert dataclasses.is_dataclass(PredictionSettings)
    assert predictor(Bright(), Bright()).parameters() != base
