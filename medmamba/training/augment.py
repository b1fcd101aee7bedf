"""What augmentation does to the intensities of a batch, and mirroring. The only door for MONAI.

Each transform is applied once a batch, to the rows (channels of samples) it was drawn for, with a
parameter per row, on the device where the batch is. MONAI provides what takes such parameters and
has nnU-Net's distribution: multiplicative brightness, Gaussian kernels, flips. Its contrast is a
gamma, its gamma takes statistics over all rows, its filters have one kernel for all, and its noise
draws inside, so those are ours. A row's result depends on the other rows by rounding alone.
Legend: B batch, C channels, P patch, R rows, n rows that a transform was drawn for.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from monai.data.meta_tensor import MetaTensor  # noqa: TID251
from monai.networks.layers.convutils import gaussian_1d  # noqa: TID251
from monai.transforms.intensity.array import ScaleIntensity  # noqa: TID251
from monai.transforms.spatial.array import Flip  # noqa: TID251
from torch import Tensor
from torch.nn import functional

from medmamba.training.draws import IntensityDraw, Range

GAMMA_EPSILON = 1e-7
"""Keeps a constant row's range from being divided by."""

_CONVOLUTION: dict[int, Callable[..., Tensor]] = {2: functional.conv2d, 3: functional.conv3d}

Change = Callable[[Tensor, list[Any]], Tensor]
"""Takes rows (n, *P) and a parameter for each, and returns the changed rows."""


def augment_intensity(data: Tensor, draws: Sequence[IntensityDraw], *, in_plane: bool) -> Tensor:
    """Apply what was drawn, in nnU-Net's order.

    Args:
        data: (B, C, *P), contiguous; changed in place.
        draws: the random choices of each sample.
        in_plane: simulated low resolution leaves the first axis alone ("dummy 2D").

    Returns:
        ``data``.
    """
    rows = data.view(-1, *data.shape[2:])
    for change, parameters in _changes(draws, data, in_plane=in_plane):
        chosen = [row for row, value in enumerate(parameters) if value is not None]
        if chosen:
            _replace(rows, chosen, change, [parameters[row] for row in chosen])
    return data


def _changes(
    draws: Sequence[IntensityDraw], data: Tensor, *, in_plane: bool
) -> Iterator[tuple[Change, list[Any]]]:
    """Yield each transform with a parameter per row, None where it does not happen."""
    channels = data.shape[1]

    def of_channels(name: str) -> list[Any]:
        nothing = (None,) * channels
        return [value for draw in draws for value in getattr(draw, name) or nothing]

    def of_samples(name: str) -> list[Any]:
        return [getattr(draw, name) or None for draw in draws for _ in range(channels)]

    noise = [
        (draw.noise_std, draw.noise_seed, channel) if draw.noise_std > 0 else None
        for draw in draws
        for channel in range(channels)
    ]
    yield partial(_add_noise, channels=channels), noise
    yield _blur, of_channels("blur")
    yield _brighten, of_channels("brightness")
    yield _shift, of_channels("shift")
    yield _contrast, of_channels("contrast")
    yield partial(_low_resolution, in_plane=in_plane), of_channels("low_resolution")
    yield partial(_gamma, invert=True), of_channels("gamma_inverted")
    yield partial(_gamma, invert=False), of_channels("gamma")
    yield _ramp, of_samples("ramp")
    yield _blank, of_samples("rectangles")


def mirror(data: Tensor, labels: Tensor, axes: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Flip each sample of both, (B, C, *P) and (B, L, *P), along its spatial ``axes``.

    Both are changed in place.
    """
    for chosen in sorted(set(axes) - {()}):
        places = [place for place, own in enumerate(axes) if own == chosen]
        flip = Flip(spatial_axis=chosen)
        for batch in (data, labels):
            _replace(batch, places, _flip, flip)
    return data, labels


def _flip(part: Tensor, flip: Flip) -> Tensor:
    return _plain(flip(part.flatten(0, 1))).view(part.shape)


def _replace(whole: Tensor, places: list[int], change: Callable[..., Tensor], how: Any) -> None:
    """Change some entries of the first axis in place, neighbours without copying them out."""
    if places[-1] - places[0] + 1 == len(places):
        part = whole.narrow(0, places[0], len(places))
        part.copy_(change(part, how))
        return
    index = torch.tensor(places, device=whole.device)
    whole.index_copy_(0, index, change(whole.index_select(0, index), how))


def _plain(value: Any) -> Tensor:
    plain: Tensor = value.as_tensor() if isinstance(value, MetaTensor) else value
    return plain


def _column(rows: Tensor, values: Sequence[float]) -> Tensor:
    column = torch.tensor(values, dtype=rows.dtype, device=rows.device)
    return column.reshape(-1, *[1] * (rows.ndim - 1))


def _along(axis: int, lines: Tensor, dimensions: int) -> Tensor:
    """Shape (n, size) so that it is broadcast over all axes of rows but ``axis``."""
    shape = [1] * dimensions
    shape[0], shape[axis] = lines.shape
    return lines.reshape(shape)


def _add_noise(rows: Tensor, values: list[tuple[float, int, int]], *, channels: int) -> Tensor:
    # A generator per sample: what a sample gets does not depend on its place in the batch.
    shape = (channels, *rows.shape[1:])
    noise = []
    for _, seed, channel in values:
        if channel == 0:
            generator = torch.Generator(rows.device).manual_seed(seed)
            noise.append(torch.randn(shape, generator=generator, device=rows.device))
    return rows + _column(rows, [std for std, _, _ in values]) * torch.cat(noise)


def _blur(rows: Tensor, sigmas: list[tuple[float, ...]]) -> Tensor:
    for axis in range(1, rows.ndim):
        kernels = [_gaussian(sigma[axis - 1]) for sigma in sigmas]
        reach = max(len(kernel) // 2 for kernel in kernels)
        # A tap too many has weight 0, so a row is the same whatever its neighbours need.
        weights = torch.stack(
            [functional.pad(kernel, (reach - len(kernel) // 2,) * 2) for kernel in kernels]
        )
        shape = [len(rows), 1, *[1] * (rows.ndim - 1)]
        shape[1 + axis] = weights.shape[1]
        wider = _extend(rows, axis, reach)
        convolve = _CONVOLUTION[rows.ndim - 1]
        rows = convolve(wider[None], weights.to(rows).reshape(shape), groups=len(rows))[0]
    return rows


def _extend(rows: Tensor, axis: int, reach: int) -> Tensor:
    """Let an axis go on ``reach`` beyond its ends as in a mirror, in two mirrors if it is short."""
    size = rows.shape[axis]
    if reach < size:
        after = rows.ndim - 1 - axis
        pads = [0, 0] * after + [reach, reach] + [0, 0] * (axis - 1)
        return functional.pad(rows[None], pads, mode="reflect")[0]
    period = max(1, 2 * (size - 1))
    places = torch.arange(-reach, size + reach, device=rows.device) % period
    return rows.index_select(axis, torch.where(places < size, places, period - places))


def _gaussian(sigma: float) -> Tensor:
    # Sampled like nnU-Net's; MONAI's default integrates over voxels, which blurs more.
    kernel: Tensor = gaussian_1d(
        torch.tensor(sigma), truncated=4.0, approx="sampled", normalize=True
    )
    return kernel


def _brighten(rows: Tensor, factors: list[float]) -> Tensor:
    return _plain(ScaleIntensity(None, None, _column(rows, factors) - 1)(rows))


def _shift(rows: Tensor, values: list[float]) -> Tensor:
    return rows + _column(rows, values)


def _contrast(rows: Tensor, factors: list[float]) -> Tensor:
    mean, (low, high) = _mean(rows), _range(rows)
    return torch.clip((rows - mean) * _column(rows, factors) + mean, low, high)


def _mean(rows: Tensor) -> Tensor:
    return rows.mean(tuple(range(1, rows.ndim)), keepdim=True)


def _range(rows: Tensor) -> tuple[Tensor, Tensor]:
    axes = tuple(range(1, rows.ndim))
    return rows.amin(axes, keepdim=True), rows.amax(axes, keepdim=True)


def _low_resolution(rows: Tensor, scales: list[float], *, in_plane: bool) -> Tensor:
    # Each row has a coarse grid of its own. Along an axis, going there and back is a matrix, and
    # products for all rows take a CPU as long as torch's interpolation of one row after another.
    shape = rows.shape
    for axis in range(1 + in_plane, rows.ndim):
        size = shape[axis]
        matrices = torch.stack([_there_and_back(size, scale) for scale in scales]).to(rows)
        if axis == rows.ndim - 1:
            rows = rows.flatten(1, -2) @ matrices.mT
        else:
            between = [1] * (axis - 1)
            rows = matrices.reshape(-1, *between, size, size) @ rows.flatten(axis + 1)
        rows = rows.reshape(shape)
    return rows


def _there_and_back(size: int, scale: float) -> Tensor:
    """Return what takes a line to its coarser grid, nearest, and back, linear: (size, size)."""
    units = torch.eye(size)[None]
    coarse = functional.interpolate(units, size=max(1, round(size * scale)), mode="nearest-exact")
    return functional.interpolate(coarse, size=size, mode="linear")[0].T


def _gamma(rows: Tensor, gammas: list[float], *, invert: bool) -> Tensor:
    sign = -1 if invert else 1
    rows = rows * sign
    low, high = _range(rows)
    extent = high - low
    bent = ((rows - low) / (extent + GAMMA_EPSILON)) ** _column(rows, gammas) * extent
    mean, centred = _mean(rows), bent - _mean(bent)
    deviation = (rows - mean).square().mean(tuple(range(1, rows.ndim)), keepdim=True).sqrt()
    bent_deviation = centred.square().mean(tuple(range(1, rows.ndim)), keepdim=True).sqrt()
    return (centred / (bent_deviation + 1e-8) * deviation + mean) * sign


def _ramp(rows: Tensor, slopes: list[tuple[float, ...]]) -> Tensor:
    total = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for axis in range(1, rows.ndim):
        line = torch.linspace(-0.5, 0.5, rows.shape[axis], device=rows.device)
        steep = torch.tensor([own[axis - 1] for own in slopes]).to(line)
        total = total + _along(axis, steep[:, None] * line, rows.ndim)
    return rows * total.exp()


def _blank(rows: Tensor, boxes: list[Sequence[Sequence[Range]]]) -> Tensor:
    rows, fill = rows.clone(), _mean(rows)
    for row, mean, own in zip(rows, fill, boxes, strict=True):
        for box in own:
            index = tuple(
                slice(int(start * size), max(int(start * size) + 1, int(stop * size)))
                for (start, stop), size in zip(box, row.shape, strict=True)
            )
            row[index] = mean
    return rows
