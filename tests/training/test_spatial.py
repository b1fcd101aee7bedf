"""Regions to read, and rotation and scaling against a direct computation."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medmamba.training.draws import PRESETS, Rotations, draw_matrix, rotation_matrix
from medmamba.training.sampling import read_box
from medmamba.training.spatial import (
    Region,
    inner_box,
    loader_patch_size,
    make_patches,
    source_box,
)

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
    moved, parts = patches([region_of(data, labels, box, inner, matrix)], outer)
    return moved[0], parts[0]


def region_of(data, labels, box, inner, matrix) -> Region:
    return Region(
        data=torch.from_numpy(read_box(data, box, None, fill=0)),
        labels=torch.from_numpy(read_box(labels, box, None, fill=-1)),
        box=box,
        inner=inner,
        matrix=matrix,
    )


def patches(regions, outer, device: str = "cpu", in_plane: bool = False):
    return make_patches(regions, outer, in_plane=in_plane, device=torch.device(device))


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
    region = region_of(data, labels, box, inner, matrix)
    turned, turned_parts = (found[0] for found in patches([region], (14, 19, 17), in_plane=True))
    either = [torch.rot90(region.data, k, (2, 3)) for k in (1, 3)]
    match = [torch.allclose(turned, one, atol=1e-4) for one in either]
    assert sum(match) == 1
    expected = torch.rot90(region.labels, (1, 3)[match.index(True)], (2, 3))
    assert torch.equal(turned_parts, expected)


def drawn_regions(in_plane: bool, samples: int = 7) -> list[Region]:
    """Samples of two channels and two label maps with six labels, most of which move."""
    generator = np.random.default_rng(5)
    rotations, outer = rotations_and_outer(in_plane)
    preset = replace(PRESETS["default"], rotation=0.6, scaling=0.6)
    coarse, parts = case_arrays(6)
    data, labels = np.concatenate([coarse, -coarse]), np.concatenate([parts, parts[:, ::-1]])
    regions = []
    for _ in range(samples):
        start = tuple(int(first) for first in generator.integers(-3, 3, 3))
        inner = inner_box(start, outer, PATCH)
        matrix = draw_matrix(preset, rotations, 3, generator)
        box = inner if matrix is None else source_box(inner, start, outer, matrix)
        regions.append(region_of(data, labels, box, inner, matrix))
    assert 0 < sum(region.matrix is None for region in regions) < samples - 1
    return regions


def rotations_and_outer(in_plane: bool) -> tuple[Rotations, tuple[int, ...]]:
    rotations = Rotations(limit=math.pi / (1 if in_plane else 6), in_plane=in_plane)
    return rotations, loader_patch_size(PATCH, rotations)


@pytest.mark.parametrize("in_plane", [False, True])
def test_a_patch_is_the_same_in_any_batch(in_plane: bool) -> None:
    regions, outer = drawn_regions(in_plane), rotations_and_outer(in_plane)[1]
    data, labels = patches(regions, outer, in_plane=in_plane)
    assert data.shape == (7, 2, *PATCH)
    assert labels.shape == (7, 2, *PATCH)
    assert labels.dtype == torch.int16
    for region, own, parts in zip(regions, data, labels, strict=True):
        alone, alone_parts = patches([region], outer, in_plane=in_plane)
        assert torch.equal(own, alone[0])
        assert torch.equal(parts, alone_parts[0])


def test_only_samples_that_were_drawn_are_resampled(monkeypatch) -> None:
    counted = []
    sample = torch.nn.functional.grid_sample
    monkeypatch.setattr(
        torch.nn.functional,
        "grid_sample",
        lambda boxes, *rest, **named: (counted.append(len(boxes)), sample(boxes, *rest, **named))[
            1
        ],
    )
    regions = drawn_regions(False)
    patches(regions, rotations_and_outer(False)[1])
    assert set(counted) == {sum(region.matrix is not None for region in regions)}
    counted.clear()
    patches([region for region in regions if region.matrix is None], rotations_and_outer(False)[1])
    assert not counted


@pytest.mark.gpu
@pytest.mark.parametrize("in_plane", [False, True])
def test_a_gpu_moves_a_batch_as_a_cpu_does(in_plane: bool) -> None:
    regions, outer = drawn_regions(in_plane), rotations_and_outer(in_plane)[1]
    here, parts = patches(regions, outer, in_plane=in_plane)
    there, parts_there = patches(regions, outer, "cuda", in_plane=in_plane)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)
    # A tie of two labels may fall either way.
    assert (parts_there.cpu() != parts).float().mean() < 2e-3


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
