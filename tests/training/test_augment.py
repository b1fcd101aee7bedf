"""What each transform does to voxels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from monai.transforms.intensity.array import AdjustContrast
from scipy import ndimage
from torch.nn import functional

from medmamba.training.augment import augment_intensity, mirror
from medmamba.training.draws import PRESETS, IntensityDraw, draw_intensity


@pytest.fixture
def data() -> torch.Tensor:
    return torch.randn((2, 12, 14, 10), generator=torch.Generator().manual_seed(0)) + 3


def change(data: torch.Tensor, in_plane: bool = False, **values) -> torch.Tensor:
    return augment_intensity(data[None].clone(), [IntensityDraw(**values)], in_plane=in_plane)[0]


def test_nothing_drawn_changes_nothing(data) -> None:
    assert torch.equal(change(data, noise_seed=5), data)


def test_noise_has_the_drawn_deviation_and_seed(data) -> None:
    noise = change(data, noise_std=0.1, noise_seed=1) - data
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(noise.mean().item()) < 0.01
    assert torch.equal(noise, change(data, noise_std=0.1, noise_seed=1) - data)
    assert not torch.equal(noise, change(data, noise_std=0.1, noise_seed=2) - data)


def test_blur_is_gaussian_per_channel_and_axis(data) -> None:
    blurred = change(data, blur=((0.6, 0.9, 0.5), None))
    assert torch.equal(blurred[1], data[1])
    expected = ndimage.gaussian_filter(data[0].numpy(), (0.6, 0.9, 0.5), mode="mirror")
    assert np.abs(blurred[0].numpy() - expected).max() < 1e-5
    flat = torch.full_like(data, 2.5)
    torch.testing.assert_close(change(flat, blur=((0.6, 0.9, 0.5), (1.0, 1.0, 1.0))), flat)


def test_brightness_multiplies_and_contrast_keeps_mean_and_range(data) -> None:
    torch.testing.assert_close(
        change(data, brightness=(0.8, 1.2)), data * torch.tensor([0.8, 1.2]).reshape(2, 1, 1, 1)
    )
    changed = change(data, contrast=(1.25, 0.75))
    wide = (data[0] - data[0].mean()) * 1.25 + data[0].mean()
    torch.testing.assert_close(changed[0], wide.clip(data[0].min(), data[0].max()))
    assert changed[1].mean().item() == pytest.approx(data[1].mean().item(), abs=1e-4)
    assert changed[1].std().item() == pytest.approx(0.75 * data[1].std().item(), rel=1e-3)


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_keeps_mean_and_deviation_and_bends_the_right_way(data, inverted: bool) -> None:
    name = "gamma_inverted" if inverted else "gamma"
    changed = change(data, **{name: (1.5, 0.7)})
    for before, after in zip(data, changed, strict=True):
        assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-3)
        assert after.std().item() == pytest.approx(before.std().item(), rel=1e-3)
        order = before.flatten().argsort()
        assert (after.flatten()[order].diff() >= -1e-5).all()

    def skew(values) -> float:
        centred = values - values.mean()
        return (centred**3).mean().item()

    bend = skew(changed[0]) - skew(data[0])
    assert bend < 0 if inverted else bend > 0


def test_low_resolution_loses_detail_and_keeps_flat_images(data) -> None:
    changed = change(data, low_resolution=(None, 0.5))
    assert torch.equal(changed[0], data[0])
    assert changed[1].std() < data[1].std()
    flat = torch.full_like(data, 1.5)
    torch.testing.assert_close(change(flat, low_resolution=(0.5, 0.7)), flat)


def test_low_resolution_in_plane_leaves_slices_apart(data) -> None:
    other = data.clone()
    other[:, 3] += 10
    one = change(data, in_plane=True, low_resolution=(0.5, 0.5))
    two = change(other, in_plane=True, low_resolution=(0.5, 0.5))
    differs = (one != two).any(dim=(0, 2, 3))
    assert differs.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("shape", [(12, 14, 10), (13, 9)])
def test_low_resolution_is_nearest_down_and_linear_up(shape) -> None:
    data = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0))
    changed = change(data, low_resolution=(0.5, 0.73, None))
    upward = {2: "bilinear", 3: "trilinear"}[len(shape)]
    for row, before, scale in zip(changed, data, (0.5, 0.73, 1.0), strict=True):
        small = [round(size * scale) for size in shape]
        down = functional.interpolate(before[None, None], size=small, mode="nearest-exact")
        expected = functional.interpolate(down, size=shape, mode=upward)[0, 0]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_mirroring_moves_data_and_labels_together(data) -> None:
    labels = (data[:1] > 3).to(torch.int16)
    batch, label_batch = torch.stack([data] * 4), torch.stack([labels] * 4)
    moved, moved_labels = mirror(batch, label_batch, [(0, 2), (), (1,), (0, 2)])
    for place, axes in enumerate(((1, 3), (), (2,), (1, 3))):
        assert torch.equal(moved[place], data.flip(axes))
        assert torch.equal(moved_labels[place], labels.flip(axes))
    assert type(moved) is torch.Tensor


def test_flat_patches_and_2d_stay_finite() -> None:
    generator = np.random.default_rng(11)
    for shape in ((1, 6, 7), (1, 1, 6, 7), (2, 4, 5, 6)):
        for _ in range(40):
            draw = draw_intensity(PRESETS["strong"], shape[0], len(shape) - 1, generator)
            changed = augment_intensity(torch.zeros((1, *shape)), [draw], in_plane=False)
            assert changed.shape == (1, *shape)
            assert changed.isfinite().all()
            assert type(changed) is torch.Tensor


def test_rectangles_and_ramps(data) -> None:
    blank = change(data, rectangles=(((0.0, 0.5), (0.0, 0.5), (0.0, 0.5)),))
    torch.testing.assert_close(blank[0, :6, :7, :5], data[0].mean().expand(6, 7, 5))
    assert torch.equal(blank[:, 6:], data[:, 6:])
    sloped = change(data, ramp=(0.4, 0.0, 0.0))
    ratio = (sloped / data).mean(dim=(0, 2, 3))
    assert ratio[0].item() == pytest.approx(np.exp(-0.2), rel=1e-4)
    assert ratio[-1].item() == pytest.approx(np.exp(0.2), rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 11, 9), (2, 7, 3, 8)])
def test_a_sample_is_the_same_in_any_batch(shape) -> None:
    generator = np.random.default_rng(3)
    data = torch.randn((6, *shape), generator=torch.Generator().manual_seed(0)) + 3
    often = replace(PRESETS["strong"], noise=0.5, blur=0.5, gamma=0.5, low_resolution=0.5)
    draws = [draw_intensity(often, shape[0], len(shape) - 1, generator) for _ in data]
    together = augment_intensity(data.clone(), draws, in_plane=False)
    for number, draw in enumerate(draws):
        alone = augment_intensity(data[number : number + 1].clone(), [draw], in_plane=False)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-5, atol=1e-5)


def test_gamma_is_monai_s_with_statistics_of_each_row(data) -> None:
    for invert, name in ((False, "gamma"), (True, "gamma_inverted")):
        changed = change(data, **{name: (0.8, 1.4)})
        for row, before, gamma in zip(changed, data, (0.8, 1.4), strict=True):
            expected = AdjustContrast(gamma, invert, retain_stats=True)(before)
            torch.testing.assert_close(row, expected.as_tensor(), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_gpu_augments_a_batch_as_a_cpu_does() -> None:
    generator = np.random.default_rng(3)
    data = torch.randn((6, 2, 12, 9, 10), generator=torch.Generator().manual_seed(0)) + 3
    # Noise is left out: every device has numbers of its own.
    quiet = replace(PRESETS["strong"], noise=0.0, blur=0.5, gamma=0.5, low_resolution=0.5)
    draws = [draw_intensity(quiet, 2, 3, generator) for _ in data]
    here = augment_intensity(data.clone(), draws, in_plane=False)
    there = augment_intensity(data.cuda(), draws, in_plane=False)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)
