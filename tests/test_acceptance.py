import dataclasses

import numpy as np
import pytest

from medmamba.acceptance import synthetic_image
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.plan import ConfigurationPlan
from medmamba.preprocessing.pipeline import preprocess_case
from medmamba.preprocessing.recipe import (
    ChannelRecipe,
    ChannelStatistics,
    Normalization,
    PreprocessingRecipe,
)
from medmamba.training.recipe import TrainingRecipe
from medmamba.volume import Grid

LABELS = LabelMap(values={"background": (0,), "a": (1,)})


def branch(
    patch_size: tuple[int, ...], spacing_mm: tuple[float, ...], order: tuple[int, int, int]
) -> ConfigurationPlan:
    dimension = len(patch_size)
    return ConfigurationPlan(
        grid=Grid(spacing_mm=spacing_mm, patch_size=patch_size),
        preprocessing=PreprocessingRecipe(
            channels=(
                ChannelRecipe(normalization=Normalization.ZSCORE),
                ChannelRecipe(normalization=Normalization.ZSCORE, use_mask=True),
            ),
            transpose_forward=order,
        ),
        network=NetworkSpec(
            name="plain_unet",
            in_channels=2,
            out_channels=2,
            patch_size=patch_size,
            features=(4,),
            strides=((1,) * dimension,),
            kernel_sizes=((3,) * dimension,),
            encoder_blocks=(1,),
            decoder_blocks=(),
        ),
        training=TrainingRecipe(batch_size=2),
        median_shape=patch_size,
        data_identifier="x",
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize(
    ("patch_size", "spacing_mm"),
    [((16, 24, 20), (3.0, 0.8, 1.0)), ((32, 24), (0.5, 0.7))],
)
def test_the_image_fills_one_patch_and_passes_every_step(
    patch_size: tuple[int, ...], spacing_mm: tuple[float, ...], order: tuple[int, int, int]
) -> None:
    configuration = branch(patch_size, spacing_mm, order)
    image = synthetic_image(configuration)
    assert image.array.shape[0] == 2
    prepared = preprocess_case(
        image,
        None,
        grid=configuration.grid,
        recipe=configuration.preprocessing,
        label_map=LABELS,
    )
    working = prepared.data.shape[-len(patch_size) :]
    assert prepared.record.shape_after_crop != prepared.record.shape, "cropping takes part"
    assert prepared.record.shape_after_crop != prepared.record.working_shape, "so does resampling"
    for size, patch in zip(working, patch_size, strict=True):
        assert 0.7 * patch <= size <= patch


def test_the_image_follows_the_datasets_intensities() -> None:
    configuration = branch((16, 16, 16), (1.0, 1.0, 1.0), (0, 1, 2))
    statistics = ChannelStatistics(
        mean=-50.0, median=-50.0, std=80.0, min=-1000.0, max=1000.0,
        percentile_00_5=-900.0, percentile_99_5=900.0,
    )  # fmt: skip
    plain = synthetic_image(configuration, [statistics]).array[0]
    inside = plain[plain != 0]
    assert abs(inside.mean() + 50) < 60
    assert 40 < inside.std() < 160
    steps = plain / (80.0 / 64)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
    again = synthetic_image(dataclasses.replace(configuration), [statistics]).array[0]
    np.testing.assert_array_equal(plain, again)
