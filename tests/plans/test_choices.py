import pytest

from medmamba.plans.budget import Budget
from medmamba.plans.choices import (
    choose_channels,
    choose_reader,
    choose_spacing,
    choose_transpose,
    median_resampled_shape,
)
from medmamba.plans.fingerprint import Fingerprint
from medmamba.preprocessing.recipe import ChannelStatistics, Normalization

STATISTICS = ChannelStatistics(
    mean=1.0, median=1.0, std=1.0, min=0.0, max=2.0, percentile_00_5=0.0, percentile_99_5=2.0
)


def fingerprint(
    *cases: tuple[tuple[float, ...], tuple[int, ...]], channels: int = 1, kept: float = 1.0
) -> Fingerprint:
    return Fingerprint(
        dataset_name="Dataset001_Made",
        spacings_mm=tuple(spacing for spacing, _ in cases),  # type: ignore[arg-type]
        shapes_after_crop=tuple(shape for _, shape in cases),  # type: ignore[arg-type]
        intensities=(STATISTICS,) * channels,
        median_relative_size_after_cropping=kept,
    )


def test_spacing_is_the_median() -> None:
    found = fingerprint(*[((1.0 + i, 1.0, 0.5), (100, 100, 100)) for i in range(3)])
    spacing, reason = choose_spacing(found, Budget())
    assert spacing == (2.0, 1.0, 0.5)
    assert reason.value == "2 x 1 x 0.5 mm"


def test_a_coarse_and_short_axis_takes_a_fine_case() -> None:
    found = fingerprint(*[((3.0 + i, 0.8, 0.8), (20, 300, 300)) for i in range(11)])
    spacing, reason = choose_spacing(found, Budget())
    assert spacing == pytest.approx((4.0, 0.8, 0.8))
    assert "10th percentile" in reason.why
    # As long as the others, it is no thick-slice acquisition.
    long = fingerprint(*[((3.0 + i, 0.8, 0.8), (120, 300, 300)) for i in range(11)])
    assert choose_spacing(long, Budget())[0] == pytest.approx((8.0, 0.8, 0.8))


def test_the_fine_case_never_undercuts_the_other_axes() -> None:
    spacings = [0.5, 0.5, 5.0, 5.0, 5.0]
    found = fingerprint(*[((s, 1.0, 1.0), (20, 300, 300)) for s in spacings])
    assert choose_spacing(found, Budget())[0] == pytest.approx((1.00001, 1.0, 1.0))


def test_what_the_user_asks_for_wins() -> None:
    found = fingerprint(((5.0, 1.0, 1.0), (20, 300, 300)))
    spacing, reason = choose_spacing(found, Budget(spacing_mm=(1, 2, 3)))
    assert spacing == (1.0, 2.0, 3.0)
    assert reason.why == "asked for"


@pytest.mark.parametrize(
    ("spacing", "order"),
    [
        ((1, 1, 5), (2, 0, 1)),
        ((1, 5, 1), (1, 0, 2)),
        ((5, 1, 1), (0, 1, 2)),
        ((2, 2, 1), (0, 1, 2)),
    ],
)
def test_the_coarsest_axis_comes_first(spacing: tuple[float, ...], order: tuple[int, ...]) -> None:
    assert choose_transpose(spacing) == order


def test_median_shape_may_lie_between_voxels() -> None:
    found = fingerprint(((2.0, 1.0, 1.0), (10, 20, 30)), ((2.0, 1.0, 1.0), (11, 20, 31)))
    assert median_resampled_shape(found, (1.0, 1.0, 2.0)) == (21.0, 20.0, 15.5)


def test_normalisation_follows_the_channels_name() -> None:
    names = ("ct", "noNorm", "RESCALE_TO_0_1", "rgb_to_0_1", "zScore", "T2 FLAIR")
    found = fingerprint(((1, 1, 1), (9, 9, 9)), channels=6, kept=0.7499)
    channels, reasons = choose_channels(found, names)
    assert [channel.normalization for channel in channels] == [
        Normalization.CT,
        Normalization.NONE,
        Normalization.RESCALE_0_1,
        Normalization.RGB_0_1,
        Normalization.ZSCORE,
        Normalization.ZSCORE,
    ]
    # Cropping removes a quarter: z-scores are taken of the rest, other schemes ignore that.
    assert [channel.use_mask for channel in channels] == [False] * 4 + [True] * 2
    assert [channel.statistics is not None for channel in channels] == [True] + [False] * 5
    assert "cropping keeps 75%" in reasons[5].why
    whole, _ = choose_channels(fingerprint(((1, 1, 1), (9, 9, 9)), channels=6, kept=0.75), names)
    assert not any(channel.use_mask for channel in whole)


@pytest.mark.parametrize(
    ("description", "depth", "reader"),
    [
        ({"file_ending": ".nii.gz"}, 30, "SimpleITKIO"),
        ({"file_ending": ".png"}, 1, "NaturalImage2DIO"),
        ({"file_ending": ".tif"}, 1, "NaturalImage2DIO"),
        ({"file_ending": ".tif"}, 30, "Tiff3DIO"),
        ({"file_ending": ".nii"}, 30, "NibabelIO"),
        ({"file_ending": ".nii.gz", "overwrite_image_reader_writer": "NibabelIO"}, 9, "NibabelIO"),
        ({"file_ending": ".mha", "overwrite_image_reader_writer": "None"}, 9, "SimpleITKIO"),
    ],
)
def test_which_reader_nnunet_would_use(
    description: dict[str, str], depth: int, reader: str
) -> None:
    assert choose_reader(fingerprint(((1, 1, 1), (depth, 9, 9))), description) == reader
