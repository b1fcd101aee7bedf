"""Streams give what the whole array gives, however it is cut into planes."""

from itertools import pairwise, permutations

import numpy as np
import pytest

from medmamba.labels import LabelMap
from medmamba.preprocessing.confidence import ConfidenceSums
from medmamba.preprocessing.pipeline import UndoRecord
from medmamba.preprocessing.recipe import (
    ChannelRecipe,
    Normalization,
    PreprocessingRecipe,
    ResamplingRecipe,
)
from medmamba.preprocessing.restore import (
    LabelStream,
    labels_from_probabilities,
    restore_labels,
    restore_probabilities,
    sigmoid,
    softmax,
)
from medmamba.preprocessing.restore_mean import MeanStream
from medmamba.volume import Geometry

CLASSES = LabelMap(values={"background": (0,), "one": (1,), "two": (2,)})
REGIONS = LabelMap(values={"background": (0,), "whole": (1, 2), "core": (2,)}, region_order=(1, 2))


def recipe(order: int = 1, order_z: int = 0, **changes: object) -> PreprocessingRecipe:
    return PreprocessingRecipe(
        channels=(ChannelRecipe(normalization=Normalization.ZSCORE),),
        transpose_forward=(0, 1, 2),
        probabilities=ResamplingRecipe(order=order, order_z=order_z, **changes),
    )


def record(
    working: tuple[int, int, int], axes: tuple[int, int, int] = (0, 1, 2), thick: float = 1.0
) -> UndoRecord:
    """A raw grid of 20 x 17 x 15 voxels, of which 18 x 15 x 15 are not cropped."""
    shape, spacing = (20, 17, 15), (thick, 1.0, 1.0)
    box = ((1, 19), (0, 15), (0, 15))
    cropped = tuple(stop - start for start, stop in box)
    turned = tuple(cropped[axis] for axis in axes)
    spacing_mm = tuple(spacing[axis] for axis in axes)
    return UndoRecord(
        geometry=Geometry.from_spacing(shape, spacing),
        transpose_forward=axes,
        spacing_mm=spacing_mm,
        shape=tuple(shape[axis] for axis in axes),
        crop_box=tuple(box[axis] for axis in axes),
        shape_after_crop=turned,
        working_spacing_mm=tuple(
            s * old / new for s, old, new in zip(spacing_mm, turned, working, strict=True)
        ),
        working_shape=working,
    )


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Smooth logits of three classes, background in most places."""
    from scipy.ndimage import gaussian_filter

    values = np.random.default_rng(seed).normal(size=(3, *shape))
    smooth = np.stack([gaussian_filter(part, 1.5) for part in values]) * 20
    smooth[0] += 1
    return smooth.astype(np.float32)


def cuts(size: int, seed: int) -> list[int]:
    inner = np.random.default_rng(seed).choice(np.arange(1, size), min(4, size - 1), replace=False)
    return [0, *sorted(int(cut) for cut in inner), size]


@pytest.mark.parametrize("label_map", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("axes", list(permutations((0, 1, 2))))
@pytest.mark.parametrize("working", [(11, 22, 9), (18, 15, 15), (30, 6, 15)])
def test_labels_do_not_depend_on_how_planes_arrive(working, axes, label_map) -> None:
    undo = record(working, axes)
    logits = blobs(working, seed=sum(working))[: label_map.output_channels]
    expected = restore_labels(logits, undo, recipe(), label_map)
    probabilities = restore_probabilities(logits, undo, recipe(), label_map)
    found = np.zeros_like(probabilities)
    stream = LabelStream(
        undo, recipe(), label_map,
        on_probabilities=lambda box, values: found.__setitem__((slice(None), *box), values),
    )  # fmt: skip
    for start, stop in pairwise(cuts(working[0], seed=1)):
        stream.feed(start, logits[:, start:stop])
    np.testing.assert_array_equal(stream.finish(), expected)
    assert expected.any()
    inside = np.zeros((20, 17, 15), dtype=bool)
    inside[1:19, :15] = True
    np.testing.assert_allclose(found[:, inside], probabilities[:, inside], atol=1e-6)
    soft = labels_from_probabilities(probabilities, label_map)
    assert (soft == expected).mean() > 0.999  # of equal logits only one order of rounding wins


@pytest.mark.parametrize("order", [0, 3])
@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("thick", [1.0, 5.0])
def test_every_kind_of_resampling_can_be_streamed(thick: float, compat: bool, order: int) -> None:
    undo = record((9, 11, 21), thick=thick)
    logits = blobs((9, 11, 21), seed=3)
    expected = restore_labels(logits, undo, recipe(order), CLASSES, compat=compat)
    stream = LabelStream(undo, recipe(order), CLASSES, compat=compat)
    for start in range(9):
        stream.feed(start, logits[:, start : start + 1])
    np.testing.assert_array_equal(stream.finish(), expected)


def test_a_stream_keeps_no_more_planes_than_it_needs() -> None:
    undo = record((180, 15, 15))
    stream = LabelStream(undo, recipe(), CLASSES)
    logits = blobs((180, 15, 15), seed=4)
    for start in range(0, 180, 6):
        stream.feed(start, logits[:, start : start + 6])
        assert sum(part.shape[1] for part in stream._window._parts) <= 12
    np.testing.assert_array_equal(stream.finish(), restore_labels(logits, undo, recipe(), CLASSES))


def test_missing_planes_are_no_result() -> None:
    stream = LabelStream(record((9, 9, 9)), recipe(), CLASSES)
    stream.feed(0, blobs((9, 9, 9), seed=5)[:, :8])
    with pytest.raises(ValueError, match="missing"):
        stream.finish()
    with pytest.raises(ValueError, match="plane 8 is next"):
        stream.feed(7, blobs((9, 9, 9), seed=5)[:, 7:])


@pytest.mark.parametrize("label_map", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("axes", [[(0, 1, 2), (0, 2, 1)], [(0, 1, 2), (2, 0, 1)]])
def test_members_of_any_grid_are_averaged(axes, label_map) -> None:
    working = [(11, 12, 9), (25, 15, 10)]
    records = [record(size, order) for size, order in zip(working, axes, strict=True)]
    logits = [blobs(size, seed=7)[: label_map.output_channels] for size in working]
    parts = [
        restore_probabilities(part, undo, recipe(), label_map)
        for part, undo in zip(logits, records, strict=True)
    ]
    mean = (parts[0] + parts[1]) / 2
    found = np.zeros_like(mean)
    stream = MeanStream(
        records, [recipe(), recipe()], label_map,
        on_probabilities=lambda box, values: found.__setitem__((slice(None), *box), values),
    )  # fmt: skip
    steps = [(m, a, b) for m in (0, 1) for a, b in pairwise(cuts(working[m][0], seed=m))]
    for member, start, stop in sorted(steps, key=lambda step: step[1] / working[step[0]][0]):
        stream.feed(member, start, logits[member][:, start:stop])
    labels = stream.finish()
    np.testing.assert_array_equal(labels, labels_from_probabilities(mean, label_map))
    assert labels.any()
    np.testing.assert_allclose(found[:, 1:19, :15], mean[:, 1:19, :15], atol=1e-6)
    assert set(stream.confidence) == set(label_map.foreground)


def test_confidence_is_the_mean_probability_where_a_label_won() -> None:
    logits = blobs((8, 8, 8), seed=8)
    probability = softmax(logits)
    winner = logits.argmax(0)
    sums = ConfidenceSums(CLASSES)
    for plane in range(8):
        sums.add(logits[:, plane], winner[plane] > 0)
    for name, value in (("one", 1), ("two", 2)):
        there = winner == value
        chosen = probability[:, there].astype(np.float64)
        entropy = -(chosen * np.log(chosen)).sum(0) / np.log(3)
        found = sums.result()[name]
        assert found.mean_probability == pytest.approx(chosen[value].mean(), abs=2e-5)
        assert found.mean_entropy == pytest.approx(entropy.mean(), abs=2e-5)


def test_confidence_of_regions_is_theirs_alone() -> None:
    logits = blobs((8, 8, 8), seed=9)[:2]
    sums = ConfidenceSums(REGIONS)
    sums.add(logits, (logits > 0).any(0))
    for channel, name in enumerate(REGIONS.foreground):
        chosen = sigmoid(logits[channel][logits[channel] > 0]).astype(np.float64)
        entropy = -(chosen * np.log(chosen) + (1 - chosen) * np.log1p(-chosen)) / np.log(2)
        assert sums.result()[name].mean_probability == pytest.approx(chosen.mean(), abs=2e-5)
        assert sums.result()[name].mean_entropy == pytest.approx(np.nanmean(entropy), abs=1e-3)
    assert ConfidenceSums(REGIONS).result() == {}
