"""Regions to read, and rotation and scaling against a direct computation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medmamba.training.draws import Rotations, rotation_matrix
from medmamba.training.sampling import read_box
from medmamba.training.spatial import inner_box, loader_patch_size, resample, source_box

SHAPE = (14, 18, 16)
PATCH = (8, 10, 8)
OUTER = (14, 18, 15)


def case_arrays(labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    coarse = generator.normal(size=tuple(size // 2 for size in SHAPE))
    data = ndimage.zoom(coarse, 2, order=3).astype(np.float32)
    parts = np.digitize(data, np.quantile(data, np.linspace(0, 1, labels + 1)[1:-1]))
    return data[None], parts[None].astype(np.int16)


def transformed(matrix, start=(0, 0, 0), outer=OUTER, whole: bool = False):
    data, labels = case_arrays()
    inner = inner_box(start, outer, PATCH)
    box = source_box(inner, start, outer, matrix)
    if whole:
        box = tuple((first, first + size) for first, size in zip(start, outer, strict=True))
    return resample(
        torch.from_numpy(read_box(data, box, None, fill=0)),
        torch.from_numpy(read_box(labels, box, None, fill=-1)),
        box=box,
        inner=inner,
        matrix=matrix,
        in_plane=False,
    )


def direct(matrix, start=(0, 0, 0), outer=OUTER):
    """The definition: sample each channel and label indicator at M (o - centre) + centre."""
    data, labels = case_arrays()
    inner = inner_box(start, outer, PATCH)
    centre = np.array([(a + b - 1) / 2 for a, b in inner])
    offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in PATCH], indexing="ij"))
    points = np.tensordot(matrix, offsets, 1) + centre[:, None, None, None]

    def sample(values):
        # Outside of what may be read is zero, faded over one voxel as grid_sample does.
        padded = np.pad(values.astype(np.float64), 40)
        return ndimage.map_coordinates(padded, points + 40, order=1)

    scores = np.stack([sample(labels[0] == k) for k in range(3)])
    scores = np.concatenate([scores, 1 - scores.sum(0, keepdims=True)])
    winner = np.where(scores.argmax(0) == 3, -1, scores.argmax(0))
    margin = np.sort(scores, axis=0)[-1] - np.sort(scores, axis=0)[-2]
    return sample(data[0]), winner, margin


@pytest.mark.parametrize("start", [(0, 0, 0), (-4, -3, 2)])
@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        0.8 * np.eye(3),
        1.3 * rotation_matrix(np.array([0.3, -0.4, 0.2]), 3),
        rotation_matrix(np.array([0.5, 0.1, -0.5]), 3),
    ],
)
def test_resampling_equals_its_definition(matrix, start) -> None:
    # A region as large as the transform needs, so that its edge plays no part.
    outer = (40, 40, 40)
    start = tuple(s - 12 for s in start)
    data, labels = transformed(matrix, start, outer)
    expected, winner, margin = direct(matrix, start, outer)
    np.testing.assert_allclose(data[0].numpy(), expected, atol=2e-5)
    clear = margin > 1e-4
    assert clear.mean() > 0.9
    assert (labels[0].numpy()[clear] == winner[clear]).all()
    assert labels.dtype == torch.int16


def test_the_identity_is_a_crop() -> None:
    data, labels = transformed(np.eye(3))
    source, parts = case_arrays()
    crop = tuple(slice(a, b) for a, b in inner_box((0, 0, 0), OUTER, PATCH))
    np.testing.assert_allclose(data[0].numpy(), source[0][crop], atol=1e-5)
    assert (labels[0].numpy() == parts[0][crop]).all()


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(*[st.floats(-math.pi / 6, math.pi / 6)] * 3),
    st.floats(0.7, 1.4),
    st.tuples(*[st.integers(-6, 6)] * 3),
)
def test_reading_less_changes_nothing(angles, scale, start) -> None:
    matrix = scale * rotation_matrix(np.array(angles), 3)
    small, small_labels = transformed(matrix, start)
    large, large_labels = transformed(matrix, start, whole=True)
    np.testing.assert_allclose(small.numpy(), large.numpy(), atol=2e-4)
    assert (small_labels != large_labels).float().mean() < 0.01


def test_outside_the_image_is_zero_and_unlabelled() -> None:
    data, labels = transformed(rotation_matrix(np.array([0.2, 0.1, 0.3]), 3), (-100, 0, 0))
    assert data.abs().max() == 0
    assert (labels == -1).all()


def test_in_plane_transforms_leave_slices_where_they_are() -> None:
    data, labels = case_arrays()
    matrix = rotation_matrix(np.array([math.pi / 2]), 3)
    box = inner = ((0, 14), (1, 15), (1, 15))
    read = torch.from_numpy(read_box(data, box, None, fill=0))
    parts = torch.from_numpy(read_box(labels, box, None, fill=-1))
    turned, turned_parts = resample(read, parts, box=box, inner=inner, matrix=matrix, in_plane=True)
    either = [torch.rot90(read, k, (2, 3)) for k in (1, 3)]
    match = [torch.allclose(turned, one, atol=1e-4) for one in either]
    assert sum(match) == 1
    assert torch.equal(turned_parts, torch.rot90(parts, (1, 3)[match.index(True)], (2, 3)))


def test_loader_patch_sizes_equal_the_golden_ones(fixtures_dir: Path) -> None:
    path = fixtures_dir / "preprocess" / "rules" / "geometry.json"
    if not path.exists():
        pytest.skip("no golden geometry in the fixtures folder")
    cases = json.loads(path.read_text())["initial_patch_size"]
    assert cases
    for case in cases:
        rotations = Rotations(limit=math.radians(case["rotation_deg"]), in_plane=False)
        assert loader_patch_size(tuple(case["patch"]), rotations) == tuple(case["initial"])


def test_loader_patch_in_plane_keeps_the_first_axis() -> None:
    rotations = Rotations(limit=math.pi, in_plane=True)
    assert loader_patch_size((16, 256, 256), rotations) == (16, 301, 301)
    assert loader_patch_size((16, 256, 256), None) == (16, 256, 256)
