from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medmamba.inference.sliding_window import (
    MOST_CONSTANT_TILES,
    PlaneStream,
    TileSource,
    predict_logits,
    tile_batch_size,
)
from medmamba.inference.tiling import importance_map, tile_starts


class Pointwise(nn.Module):
    """Logits that depend on the voxel alone, so that tiling must not be visible at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] * 2 - 1, x.square().sum(1, keepdim=True)], dim=1)


def position_dependent(axes: int) -> nn.Module:
    """A convolution with zero padding: its results depend on where the tile ends."""
    torch.manual_seed(7)
    layer = (nn.Conv3d, nn.Conv2d)[axes == 2](1, 2, 3, padding=1)
    return layer.eval()


@pytest.mark.parametrize("batch", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", [(9, 20, 17), (4, 5, 30), (8, 8, 8)])
def test_a_pointwise_network_is_unchanged(shape: tuple[int, ...], batch: int) -> None:
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    tiling = {"patch_size": (8, 8, 8), "mirror_axes": (0, 2), "tile_batch": batch}
    logits = predict_logits(Pointwise(), image, **tiling)
    expected = Pointwise()(image[None])[0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mirror_axes", [(), (0,), (0, 1, 2)])
def test_equals_the_plain_sum_over_tiles_and_flips(mirror_axes: tuple[int, ...]) -> None:
    network = position_dependent(3)
    patch = (6, 8, 4)
    image = torch.randn(1, 11, 13, 9, generator=torch.Generator().manual_seed(2))
    logits = predict_logits(network, image, patch_size=patch, mirror_axes=mirror_axes, tile_batch=5)
    flips = [[]]
    for axis in mirror_axes:
        flips += [[*flip, axis + 1] for flip in flips]
    total, weights = np.zeros((2, 11, 13, 9)), np.zeros((11, 13, 9))
    importance = importance_map(patch).astype(np.float64)
    for z in tile_starts(11, 6, 0.5):
        for y in tile_starts(13, 8, 0.5):
            for x in tile_starts(9, 4, 0.5):
                at = (slice(z, z + 6), slice(y, y + 8), slice(x, x + 4))
                tile = image[(slice(None), *at)]
                with torch.no_grad():
                    outputs = [network(tile.flip(f)[None])[0].flip(f) for f in flips]
                total[(slice(None), *at)] += torch.stack(outputs).mean(0).numpy() * importance
                weights[at] += importance
    np.testing.assert_allclose(logits.numpy(), total / weights, rtol=1e-5, atol=1e-5)


def test_a_2d_network_sees_every_slice() -> None:
    network = position_dependent(2)
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    logits = predict_logits(network, image, patch_size=(8, 8), tile_batch=2)
    with torch.no_grad():
        expected = torch.stack([network(image[:, z][None])[0] for z in range(3)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dimension", [2, 3])
def test_sums_take_no_more_memory_in_longer_images(dimension: int) -> None:
    from medmamba.inference.accumulating import Accumulator

    patch = (4, 8, 8)[-dimension:]
    held = []
    for length in (8, 80):
        sums = Accumulator((length, 8, 8), patch, dtype=torch.float32, device=torch.device("cpu"))
        starts = range(length) if dimension == 2 else tile_starts(length, 4, 0.5)
        for start, following in pairwise([*starts, length]):
            sums.add((start, 0, 0), torch.full((2, *patch), float(start % 2)))
            assert torch.isfinite(sums.mean(0, following - start)).all()
            sums.forget(following - start)
        held.append(sums._weights.nbytes + sums._logits.nbytes)
    assert held[0] == held[1]


@pytest.mark.parametrize("compat", [False, True])
def test_planes_come_in_order_and_networks_are_averaged(compat: bool) -> None:
    networks = [position_dependent(3), Pointwise()]
    image = torch.randn(1, 21, 9, 10, generator=torch.Generator().manual_seed(11))
    tiling = {"patch_size": (6, 8, 8), "tile_batch": 3, "compat": compat}
    starts, parts = zip(*PlaneStream(networks, TileSource(image=image), **tiling), strict=True)
    assert list(starts) == [0, *np.cumsum([part.shape[1] for part in parts])[:-1].tolist()]
    assert len(parts) > 2
    single = [predict_logits(network, image, **tiling) for network in networks]
    expected = (single[0] + single[1]) / 2
    torch.testing.assert_close(
        torch.cat(parts, 1), expected, **({"rtol": 0, "atol": 0} if compat else {})
    )


def test_planes_are_handed_out_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.randn(1, 21, 5, 10, generator=torch.Generator().manual_seed(12))
    whole = predict_logits(position_dependent(3), image, patch_size=(8, 8, 8))
    monkeypatch.setattr("medmamba.inference.sliding_window.EMITTED_BYTES", 3 * 8 * 10 * 4 * 2)
    stream = PlaneStream([position_dependent(3)], TileSource(image=image), patch_size=(8, 8, 8))
    parts = [planes for _, planes in stream]
    assert max(planes.shape[1] for planes in parts) <= 3
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)


def test_gradients_are_as_before_where_a_stream_pauses() -> None:
    image = torch.zeros(1, 20, 8, 8)
    stream = iter(PlaneStream([Pointwise()], TileSource(image=image), patch_size=(8, 8, 8)))
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_tiles_of_one_value_are_computed_once() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = 0
            self.layer = position_dependent(3)

        def forward(self, x: Tensor) -> Tensor:
            self.inputs += len(x)
            return self.layer(x)

    image = torch.full((1, 40, 8, 8), -1.0)
    image[:, 30:] = torch.randn(10, 8, 8, generator=torch.Generator().manual_seed(12))
    logits, networks, streams = [], [], []
    for reuse in (True, False):
        networks.append(Counting())
        streams.append(
            PlaneStream(
                [networks[-1]],
                TileSource(image=image),
                patch_size=(8, 8, 8),
                tile_batch=2,
                reuse_constant=reuse,
            )
        )
        logits.append(torch.cat([planes for _, planes in streams[-1]], 1))
    assert streams[1].reused == 0
    assert streams[0].reused > 3
    assert streams[0].tiles == networks[1].inputs == networks[0].inputs + streams[0].reused
    torch.testing.assert_close(*logits)


def test_many_different_constant_tiles_are_not_all_remembered() -> None:
    image = torch.arange(20.0).repeat_interleave(8).view(1, -1, 1, 1).expand(1, 160, 8, 8)
    stream = PlaneStream([Pointwise()], TileSource(image=image), patch_size=(8, 8, 8), step=1.0)
    planes = torch.cat([part for _, part in stream], 1)
    torch.testing.assert_close(planes, Pointwise()(image[None])[0])
    assert len(stream._constant) <= MOST_CONSTANT_TILES


@pytest.mark.parametrize("patch", [(6, 8, 8), (8, 8)])
def test_labels_of_an_earlier_stage_become_channels_of_each_tile(patch: tuple[int, ...]) -> None:
    class Channels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    generator = torch.Generator().manual_seed(13)
    image = torch.randn(1, 11, 9, 7, generator=generator)
    labels = torch.randint(0, 4, (11, 9, 7), generator=generator, dtype=torch.int16)
    source = TileSource(image=image, labels=labels, values=(1, 3))
    planes = torch.cat([part for _, part in PlaneStream([Channels()], source, patch_size=patch)], 1)
    expected = torch.cat([image, (labels == 1)[None].float(), (labels == 3)[None].float()])
    torch.testing.assert_close(planes, expected)


def test_small_images_are_padded_and_cropped_back() -> None:
    network = position_dependent(3)
    image = torch.randn(1, 5, 7, 8, generator=torch.Generator().manual_seed(4))
    logits = predict_logits(network, image, patch_size=(8, 8, 8))
    padded = nn.functional.pad(image, [0, 0, 0, 1, 1, 2])
    with torch.no_grad():
        expected = network(padded[None])[0, :, 1:6, 0:7]
    assert logits.shape == (2, 5, 7, 8)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


def test_compat_rounds_as_fp16_accumulation_does() -> None:
    network = position_dependent(3)
    image = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(5))
    found = predict_logits(network, image, patch_size=(8, 8, 8), compat=True)
    importance = torch.from_numpy(importance_map((8, 8, 8)).copy())
    sums = torch.zeros(2, 12, 8, 8, dtype=torch.float16)
    weights = torch.zeros(12, 8, 8, dtype=torch.float16)
    for start in (0, 4):
        at = slice(start, start + 8)
        with torch.no_grad():
            tile = network(image[None, :, at])[0]
        tile *= importance
        sums[:, at] += tile
        weights[at] += importance
    torch.testing.assert_close(found, sums / weights, rtol=0, atol=0)


def test_the_first_output_of_deep_supervision_counts() -> None:
    class Deep(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, x[..., ::2, ::2, ::2]]

    image = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(6))
    logits = predict_logits(Deep(), image, patch_size=(8, 8, 8))
    torch.testing.assert_close(logits, image)


def test_progress_reaches_the_end_and_can_abandon() -> None:
    seen: list[tuple[int, int]] = []
    image = torch.zeros(1, 16, 8, 8)
    tiling = {"patch_size": (8, 8, 8), "tile_batch": 2}
    predict_logits(Pointwise(), image, **tiling, on_tiles=lambda *now: seen.append(now))
    assert seen == [(2, 3), (3, 3)]

    def stop(done: int, total: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        predict_logits(Pointwise(), image, **tiling, on_tiles=stop)


def test_autocast_keeps_float32_results() -> None:
    image = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(8))
    tiling = {"patch_size": (8, 8, 8), "mirror_axes": (1,)}
    full = predict_logits(position_dependent(3), image, **tiling)
    reduced = predict_logits(position_dependent(3), image, **tiling, autocast=torch.bfloat16)
    assert reduced.dtype == torch.float32
    assert not torch.equal(full, reduced)
    torch.testing.assert_close(full, reduced, rtol=5e-2, atol=5e-2)


def test_batch_size_follows_from_model_and_device_alone() -> None:
    assert tile_batch_size((128, 128, 128), features=32, device_class="cpu") == 1
    assert tile_batch_size((64, 48), features=32, device_class="cpu") > 8
    assert tile_batch_size((40, 56, 40), features=32, device_class="cpu") == 2
    gib = 2**30
    small = tile_batch_size((96, 96, 96), features=32, device_class="cuda", memory_bytes=8 * gib)
    large = tile_batch_size((96, 96, 96), features=32, device_class="cuda", memory_bytes=80 * gib)
    assert 1 <= small < large
