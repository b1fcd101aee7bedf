"""Which patches are drawn: rules of position, class and case, and purity."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from scipy import stats

from medmamba.errors import TrainingError
from medmamba.preprocessing.store import CaseStore
from medmamba.training.draws import PRESETS
from medmamba.training.sampling import (
    PatchSampler,
    SamplingSettings,
    Stream,
    choose_region,
    is_forced_foreground,
    read_box,
)

from .conftest import PATCH, make_case

SHAPE = (10, 12, 14)


@dataclass
class MemoryCase:
    data: np.ndarray
    labels: np.ndarray
    class_locations: dict = field(default_factory=dict)


def numbered_case(shape=SHAPE, locations=None, offset: int = 0) -> MemoryCase:
    data = (np.arange(np.prod(shape)) + offset).reshape(1, *shape).astype(np.float32)
    labels = (np.arange(np.prod(shape)) % 3).reshape(1, *shape).astype(np.int16)
    return MemoryCase(data=data, labels=labels, class_locations=locations or {})


def settings_of(**changes) -> SamplingSettings:
    values = {
        "patch_size": (4, 6, 6),
        "batch_size": 3,
        "oversample_foreground": 0.33,
        "preset": PRESETS["none"],
    }
    return SamplingSettings(**{**values, **changes})


def sampler_of(cases: dict, seed: int = 0, stream=Stream.TRAINING, **changes) -> PatchSampler:
    return PatchSampler(
        cases.__getitem__, tuple(cases), settings_of(**changes), seed=seed, stream=stream
    )


@pytest.mark.parametrize(
    ("batch", "forced"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (9, 3), (12, 4)]
)
def test_the_last_samples_of_a_batch_are_forced(batch: int, forced: int) -> None:
    flags = [is_forced_foreground(sample, batch, 0.33) for sample in range(batch)]
    assert flags == [False] * (batch - forced) + [True] * forced


def test_free_patches_are_uniform_over_all_positions_with_the_margin() -> None:
    generator = np.random.default_rng(0)
    case = numbered_case()
    starts = [choose_region(case, (8, 7, 20), (4, 6, 6), False, generator)[0] for _ in range(4000)]
    # Margins: 4, 1 and 14 voxels (initial minus final patch); 20 > 14 needs no more.
    for axis, (low, high) in enumerate([(-2, 4), (-1, 6), (-7, 1)]):
        values = [start[axis] for start in starts]
        counts = np.bincount(np.array(values) - low, minlength=high - low + 1)
        assert len(counts) == high - low + 1
        assert stats.chisquare(counts).pvalue > 1e-5


def test_images_smaller_than_the_patch_are_padded_around() -> None:
    case = numbered_case(shape=(3, 12, 14))
    generator = np.random.default_rng(1)
    starts = {choose_region(case, (8, 6, 6), (8, 6, 6), False, generator)[0][0] for _ in range(50)}
    assert starts == {-3, -2}
    batch = sampler_of({"a": case}, patch_size=(8, 6, 6)).batch(0)
    assert (batch.data[:, 0, :2] == 0).all()
    assert (batch.data[:, 0, 6:] == 0).all()


def test_forced_patches_are_centred_on_a_class_drawn_uniformly() -> None:
    rare, common = np.array([[5, 6, 7]]), np.array([[0, 0, 0], [9, 11, 13]] * 500)
    case = numbered_case(locations={(1,): rare, (2,): common, (3,): np.zeros((0, 3), int)})
    generator = np.random.default_rng(2)
    starts = [choose_region(case, (4, 6, 6), (4, 6, 6), True, generator)[0] for _ in range(3000)]
    at_rare = sum(start == (3, 3, 4) for start in starts)
    assert stats.binomtest(at_rare, len(starts), 0.5).pvalue > 1e-5
    # The lower bound is clamped to the image, the upper one is not.
    assert set(starts) == {(3, 3, 4), (0, 0, 0), (7, 8, 10)}


def test_with_an_ignore_label_patches_are_centred_on_annotated_voxels() -> None:
    locations = {(1,): np.zeros((0, 3), int), (-1, 1, 2): np.array([[5, 6, 7]])}
    case = numbered_case(locations=locations)
    generator = np.random.default_rng(3)
    for forced in (False, True):
        assert choose_region(case, (4, 6, 6), (4, 6, 6), forced, generator)[0] == (3, 3, 4)


def test_2d_patches_are_slices() -> None:
    case = numbered_case(locations={(1,): np.array([[7, 6, 7]])})
    sampler = sampler_of({"a": case}, patch_size=(6, 8), batch_size=2)
    slices = set()
    for iteration in range(60):
        batch = sampler.batch(iteration)
        assert batch.data.shape == (2, 1, 6, 8)
        slices.add(int(batch.data[0].max()) // (12 * 14))
        assert int(batch.data[1].max()) // (12 * 14) == 7
    assert slices == set(range(10))


def test_a_batch_is_a_function_of_seed_stream_and_iteration() -> None:
    cases = {name: numbered_case(offset=k * 5000) for k, name in enumerate("abc")}
    options = {"preset": PRESETS["strong"], "mirror_axes": (0, 1, 2)}
    one, two = sampler_of(cases, **options), sampler_of(cases, **options)
    for iteration in (5, 0, 3):
        first = one.batch(iteration)
        one.batch(9)
        again = two.batch(iteration)
        assert torch.equal(first.data, again.data)
        assert torch.equal(first.labels, again.labels)
        assert first.cases == again.cases
    other = [
        sampler_of(cases, seed=1, **options).batch(5),
        sampler_of(cases, stream=Stream.VALIDATION, **options).batch(5),
        one.batch(6),
    ]
    assert all(not torch.equal(one.batch(5).data, batch.data) for batch in other)


def test_ranks_share_a_batch() -> None:
    cases = {name: numbered_case(offset=k * 5000) for k, name in enumerate("abc")}
    sampler = sampler_of(cases, batch_size=4, preset=PRESETS["default"])
    whole = sampler.batch(2)
    parts = [sampler.batch(2, samples) for samples in ((0, 1), (2, 3))]
    assert torch.equal(whole.data, torch.cat([part.data for part in parts]))
    assert whole.cases == parts[0].cases + parts[1].cases


def test_cases_are_drawn_uniformly_with_replacement() -> None:
    cases = {name: numbered_case() for name in "abcd"}
    sampler = sampler_of(cases, batch_size=4)
    drawn = [case for iteration in range(250) for case in sampler.batch(iteration).cases]
    counts = [drawn.count(name) for name in "abcd"]
    assert stats.chisquare(counts).pvalue > 1e-5


def test_masked_channels_are_zero_outside_and_labels_background() -> None:
    case = numbered_case()
    case.data = np.concatenate([case.data, case.data]) + 1
    case.labels[:, :5] = -1
    sampler = sampler_of({"a": case}, patch_size=SHAPE, outside_is_zero_channels=(1,))
    batch = sampler.batch(0)
    assert (batch.data[:, 0, :5] > 0).all()
    assert (batch.data[:, 1, :5] == 0).all()
    assert (batch.data[:, 1, 5:] > 0).all()
    assert batch.labels.min() == 0
    assert case.data[1].min() > 0


def test_only_the_patch_is_read(store_folder) -> None:
    case = CaseStore(store_folder).open("case_00")
    whole = case.data[:]
    box = ((-2, 6), (10, 30), (3, 9))
    part = read_box(case.data, box, None, fill=0)
    assert part.shape == (1, 8, 20, 6)
    np.testing.assert_array_equal(part[:, 2:, :10], whole[:, :6, 10:20, 3:9])
    assert (part[:, :2] == 0).all()
    assert (part[:, :, 10:] == 0).all()


def test_a_split_without_cases_is_an_error() -> None:
    with pytest.raises(TrainingError, match="validation has no cases"):
        sampler_of({}, stream=Stream.VALIDATION)


def test_labels_of_the_previous_stage_move_with_the_patch() -> None:
    case = make_case(3)
    moving = replace(PRESETS["default"], rotation=1.0, scaling=1.0, mirror=0.5)
    preset = replace(moving, previous_morphology=0.0, previous_removal=0.0)
    settings = SamplingSettings(
        patch_size=PATCH,
        batch_size=2,
        oversample_foreground=1.0,
        preset=preset,
        mirror_axes=(0, 1, 2),
        previous_values=(1, 2),
    )
    # A first stage that is always right: its channels must be the target's, wherever it went.
    sampler = PatchSampler(
        lambda name: case,
        ("a",),
        settings,
        seed=0,
        stream=Stream.TRAINING,
        open_previous=lambda name: case.labels,
    )
    for iteration in range(5):
        batch = sampler.batch(iteration)
        assert batch.data.shape == (2, 3, *PATCH)
        assert batch.labels.shape == (2, 1, *PATCH)
        for channel, value in enumerate((1, 2), start=1):
            expected = (batch.labels[:, 0] == value).float()
            assert expected.any()
            assert torch.equal(batch.data[:, channel], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dummy_2d", [False, True])
def test_a_gpu_makes_the_batch_that_a_cpu_makes(dummy_2d: bool) -> None:
    cases = {name: make_case(number) for number, name in enumerate("abc")}
    # Noise is left out: every device has numbers of its own.
    preset = replace(PRESETS["strong"], rotation=0.6, scaling=0.5, low_resolution=0.6, noise=0.0)
    settings = SamplingSettings(
        patch_size=PATCH,
        batch_size=6,
        oversample_foreground=0.5,
        preset=preset,
        mirror_axes=(0, 1, 2),
        dummy_2d=dummy_2d,
        outside_is_zero_channels=(0,),
        previous_values=(1, 2),
    )

    def batch(device: str, iteration: int):
        return PatchSampler(
            cases.__getitem__,
            tuple(cases),
            replace(settings, device=device),
            seed=0,
            stream=Stream.TRAINING,
            open_previous=lambda name: cases[name].labels,
        ).batch(iteration)

    for iteration in range(3):
        here, there = batch("cpu", iteration), batch("cuda", iteration)
        assert there.data.is_cuda
        assert there.labels.is_cuda
        assert there.cases == here.cases
        torch.testing.assert_close(there.data[:, :1].cpu(), here.data[:, :1], rtol=1e-3, atol=1e-3)
        # A tie of two labels may fall either way.
        assert (there.labels.cpu() != here.labels).float().mean() < 2e-3
