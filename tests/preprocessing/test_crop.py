from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from medmamba.preprocessing.crop import fill_holes, mark_outside, nonzero_region

MASKS = arrays(bool, st.tuples(*[st.integers(1, 7)] * 3))


@given(MASKS)
def test_holes_are_filled_as_scipy_does(mask: np.ndarray) -> None:
    expected = ndimage.binary_fill_holes(mask)
    np.testing.assert_array_equal(fill_holes(mask.copy()), expected)


@given(MASKS, st.integers(1, 60))
def test_slabs_of_labelled_background_do_not_show(mask: np.ndarray, voxels: int) -> None:
    expected = ndimage.binary_fill_holes(mask)
    with mock.patch("medmamba.preprocessing.crop.SLAB_VOXELS", voxels):
        np.testing.assert_array_equal(fill_holes(mask.copy()), expected)


def test_a_hole_that_opens_in_another_slab_is_no_hole() -> None:
    mask = np.ones((9, 5, 5), bool)
    mask[1:8, 2, 2] = False  # a tunnel, closed at both ends
    open_mask = mask.copy()
    open_mask[8, 2, 2] = False
    with mock.patch("medmamba.preprocessing.crop.SLAB_VOXELS", 50):
        assert fill_holes(mask).all()
        np.testing.assert_array_equal(fill_holes(open_mask.copy()), open_mask)


@given(MASKS)
def test_the_box_is_tight_and_its_mask_that_of_the_whole(mask: np.ndarray) -> None:
    image = np.stack([mask * 3.0, np.zeros(mask.shape)]).astype(np.float32)
    box, inside = nonzero_region(image)
    cut = tuple(slice(start, stop) for start, stop in box)
    np.testing.assert_array_equal(inside, ndimage.binary_fill_holes(mask)[cut])
    if not mask.any():
        assert box == tuple((0, size) for size in mask.shape)
        return
    assert mask.sum() == mask[cut].sum()
    for axis in range(3):
        faces = inside.take([0, -1], axis=axis)
        assert faces.any(axis=tuple(a for a in range(3) if a != axis)).all()


def test_only_unlabelled_voxels_are_marked() -> None:
    labels = np.array([[[0, 1, 0, 2]]], dtype=np.int16)
    mark_outside(labels, np.array([[[True, True, False, False]]]))
    assert labels.tolist() == [[[0, 1, -1, 2]]]
