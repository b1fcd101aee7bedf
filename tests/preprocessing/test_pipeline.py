import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medmamba.errors import GeometryError, InputError
from medmamba.files import from_plain, to_plain
from medmamba.labels import LabelMap
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord, preprocess_case
from medmamba.preprocessing.recipe import ChannelRecipe, Normalization, PreprocessingRecipe
from medmamba.preprocessing.restore import (
    labels_from_probabilities,
    restore_labels,
    restore_probabilities,
)
from medmamba.volume import Geometry, Grid, Volume, VolumeKind

CLASSES = LabelMap(values={"background": (0,), "a": (1,), "b": (2,)})
ORDERS = [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1)]


def phantom(
    shape: tuple[int, int, int], spacing: tuple[float, ...], margin: int = 2
) -> tuple[Volume, Volume]:
    """Two boxes of known labels in a body with a zero margin."""
    geometry = Geometry.from_spacing(shape, spacing)
    image = np.zeros((1, *shape), np.float32)
    body = (0, *[slice(margin, size - margin) for size in shape])
    image[body] = np.random.default_rng(0).normal(100, 10, image[body].shape)
    labels = np.zeros((1, *shape), np.uint8)
    half = shape[0] // 2
    labels[0, margin + 1 : half, margin + 1 : -margin - 1, margin + 1 : -margin - 1] = 1
    labels[0, half : -margin - 1, margin + 1 : -margin - 1, margin + 1 : -margin - 1] = 2
    return (
        Volume(array=image, geometry=geometry),
        Volume(array=labels, geometry=geometry, kind=VolumeKind.LABELS),
    )


def recipe(order: tuple[int, int, int] = (0, 1, 2)) -> PreprocessingRecipe:
    channel = ChannelRecipe(normalization=Normalization.ZSCORE)
    return PreprocessingRecipe(channels=(channel,), transpose_forward=order)


def run(image: Volume, labels: Volume | None, spacing: tuple[float, ...],
        order: tuple[int, int, int] = (0, 1, 2)) -> PreprocessedCase:  # fmt: skip
    grid = Grid(spacing_mm=spacing, patch_size=(8,) * len(spacing))
    return preprocess_case(image, labels, grid=grid, recipe=recipe(order), label_map=CLASSES)


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    return 10.0 * np.stack([labels == k for k in range(classes)]).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(
    order=st.sampled_from(ORDERS),
    spacing=st.tuples(*[st.floats(0.6, 1.6)] * 3),
    flat=st.booleans(),
)
def test_preprocess_then_restore_gives_the_labels_back(
    order: tuple[int, int, int], spacing: tuple[float, ...], flat: bool
) -> None:
    image, labels = phantom((22, 26, 24), (1.0, 1.0, 1.0))
    made = run(image, labels, spacing[1:] if flat else spacing, order)
    assert made.labels is not None
    logits = one_hot(made.labels[0], 3)
    restored = restore_labels(logits, made.record, recipe(order), CLASSES)
    truth = labels.array[0]
    assert restored.shape == truth.shape
    # Nothing may change farther from a boundary than a working voxel reaches.
    for label in (1, 2):
        inner = ndimage.binary_erosion(truth == label, np.ones((3, 3, 3)), iterations=2)
        outer = ndimage.binary_dilation(truth == label, np.ones((3, 3, 3)), iterations=2)
        assert np.all(restored[inner] == label)
        assert np.all(outer[restored == label])


def test_restoring_without_resampling_is_exact_for_every_axis_order() -> None:
    image, labels = phantom((12, 14, 16), (2.0, 1.0, 1.5))
    for order in ORDERS:
        spacing = tuple((2.0, 1.0, 1.5)[axis] for axis in order)
        made = run(image, labels, spacing, order)
        logits = one_hot(np.maximum(made.labels[0], 0), 3)
        restored = restore_labels(logits, made.record, recipe(order), CLASSES)
        np.testing.assert_array_equal(restored, labels.array[0])


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels = phantom((30, 20, 18), (1.0, 1.0, 1.0))
    for spacing in ((1.7, 0.9, 1.1), (3.5, 0.9, 1.1), (1.0, 1.3, 1.3)):
        made = run(image, labels, spacing)
        shape = (3, *made.record.working_shape)
        logits = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        whole = restore_labels(logits, made.record, recipe(), CLASSES)
        soft = restore_probabilities(logits, made.record, recipe(), CLASSES)
        with monkeypatch.context() as patch:
            patch.setattr("medmamba.preprocessing.class_fields.SLAB_BYTES", 1)
            sliced = restore_labels(logits, made.record, recipe(), CLASSES)
            np.testing.assert_array_equal(sliced, whole)
        np.testing.assert_array_equal(labels_from_probabilities(soft, CLASSES), whole)
        np.testing.assert_allclose(soft.sum(axis=0), 1, atol=1e-5)


def test_regions_are_painted_in_their_order() -> None:
    regions = LabelMap(
        values={"background": (0,), "whole": (1, 2), "core": (2,)}, region_order=(1, 2)
    )
    image, labels = phantom((12, 12, 12), (1.0, 1.0, 1.0))
    made = run(image, labels, (1.0, 1.0, 1.0))
    turned = made.labels[0]
    logits = np.stack([np.where(turned > 0, 3.0, -3.0), np.where(turned == 2, 3.0, -3.0)])
    restored = restore_labels(logits.astype(np.float32), made.record, recipe(), regions)
    np.testing.assert_array_equal(restored, labels.array[0])
    soft = restore_probabilities(logits.astype(np.float32), made.record, recipe(), regions)
    assert not soft[:, 0].any()
    np.testing.assert_array_equal(labels_from_probabilities(soft, regions), restored)


def test_tensors_are_taken_as_logits() -> None:
    torch = pytest.importorskip("torch")
    image, labels = phantom((12, 12, 12), (1.0, 1.0, 1.0))
    made = run(image, labels, (1.3, 1.3, 1.3))
    logits = one_hot(np.maximum(made.labels[0], 0), 3)
    expected = restore_labels(logits, made.record, recipe(), CLASSES)
    for kind in (torch.float32, torch.bfloat16):
        tensor = torch.from_numpy(logits).to(kind)
        found = restore_labels(tensor, made.record, recipe(), CLASSES)
        np.testing.assert_array_equal(found, expected)


def test_the_image_is_not_changed_and_prediction_sees_the_same_data() -> None:
    image, labels = phantom((12, 14, 16), (1.0, 1.0, 1.0))
    before = image.array.copy()
    trained = run(image, labels, (1.2, 1.0, 0.8))
    predicted = run(image, None, (1.2, 1.0, 0.8))
    np.testing.assert_array_equal(image.array, before)
    np.testing.assert_array_equal(trained.data, predicted.data)
    assert predicted.labels is None
    assert predicted.record == trained.record


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_an_image_that_may_go_gives_the_same_and_its_memory(order, margin: int) -> None:
    image, _ = phantom((12, 14, 16), (1.0, 1.0, 1.0))
    if not margin:
        image = Volume(array=image.array + 1, geometry=image.geometry)
    kept = run(image, None, (1.0, 1.0, 1.0), order)
    grid = Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=(8, 8, 8))
    taken = preprocess_case(
        image, None, grid=grid, recipe=recipe(order), label_map=CLASSES, consume=True
    )
    np.testing.assert_array_equal(taken.data, kept.data)
    fits = not margin and order == (0, 1, 2)
    assert np.shares_memory(taken.data, image.array) == fits
    assert taken.data.flags.c_contiguous


def test_a_2d_configuration_keeps_the_slices() -> None:
    image, labels = phantom((9, 20, 24), (5.0, 1.0, 1.0), margin=1)
    made = run(image, labels, (2.0, 1.5))
    assert made.data.shape == (1, 7, 9, 15)
    assert made.record.working_spacing_mm == (5.0, 2.0, 1.5)


def test_the_record_goes_to_json_and_back() -> None:
    image, labels = phantom((12, 14, 16), (1.0, 1.1, 1.2))
    record = run(image, labels, (1.2, 1.0, 0.8), (2, 0, 1)).record
    assert from_plain(UndoRecord, to_plain(record), what="record", error=GeometryError) == record


def test_an_image_of_zeros_is_kept_whole() -> None:
    geometry = Geometry.from_spacing((4, 5, 6), (1.0, 1.0, 1.0))
    image = Volume(array=np.zeros((1, 4, 5, 6), np.float32), geometry=geometry)
    made = run(image, None, (1.0, 1.0, 1.0))
    assert made.data.shape == (1, 4, 5, 6)
    assert np.isfinite(made.data).all()


def test_unusable_cases_are_errors() -> None:
    image, labels = phantom((12, 14, 16), (1.0, 1.0, 1.0))
    other = phantom((12, 14, 15), (1.0, 1.0, 1.0))[1]
    with pytest.raises(GeometryError, match="12, 14, 15"):
        run(image, other, (1.0, 1.0, 1.0))
    with pytest.raises(GeometryError, match="spacing in the file is probably wrong"):
        run(image, labels, (100.0, 1.0, 1.0))


def test_a_spacing_that_makes_a_small_image_huge_is_refused() -> None:
    """30 mm instead of 0.3: 20 voxels along an axis would become 6,000."""
    image = Volume(
        array=np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32),
        geometry=Geometry.from_spacing((20, 20, 20), (30.0, 30.0, 30.0)),
    )
    with pytest.raises(InputError, match=r"6000x6000x6000.*GiB") as refused:
        run(image, None, (0.1, 0.1, 0.1))
    assert refused.value.code == "E_LIMIT_RAM"


@settings(max_examples=20, deadline=None)
@given(
    spacing=st.tuples(*[st.sampled_from([0.7, 1.0, 1.6, 3.6])] * 3),
    corner=st.tuples(*[st.floats(0, 0.8)] * 3),
    regions=st.booleans(),
    compat=st.booleans(),
)
def test_only_where_something_can_win_is_looked_at(
    spacing: tuple[float, ...], corner: tuple[float, ...], regions: bool, compat: bool
) -> None:
    label_map = CLASSES
    if regions:
        label_map = LabelMap(
            values={"background": (0,), "x": (1, 2), "y": (2,)}, region_order=(1, 2)
        )
    image, _ = phantom((17, 15, 16), (1.0, 1.0, 1.0))
    record = run(image, None, spacing).record
    random = np.random.default_rng(0)
    shape = record.working_shape
    logits = random.normal(size=(label_map.output_channels, *shape)).astype(np.float32) - 4
    if not regions:
        logits[0] = 0
    start = [int(size * part) for size, part in zip(shape, corner, strict=True)]
    lump = tuple(slice(first, first + 3) for first in start)
    logits[(1, *lump)] += 8 * random.random()
    found = restore_labels(logits, record, recipe(), label_map, compat=compat)
    soft = restore_probabilities(logits, record, recipe(), label_map, compat=compat)
    np.testing.assert_array_equal(found, labels_from_probabilities(soft, label_map))
