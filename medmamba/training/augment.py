"""What augmentation does to intensities, and mirroring. The only door for MONAI.

MONAI provides what can be made nnU-Net's distribution by passing drawn parameters: Gaussian
filtering, gamma with kept statistics, multiplicative brightness, flips. Its contrast transform is
a gamma and its noise draws inside, so those are ours. Samples are (C, *spatial), on any device.
"""

from collections.abc import Sequence

import torch
from monai.data.meta_tensor import MetaTensor  # noqa: TID251
from monai.networks.layers.convutils import gaussian_1d  # noqa: TID251
from monai.networks.layers.simplelayers import separable_filtering  # noqa: TID251
from monai.transforms.intensity.array import AdjustContrast, ScaleIntensity  # noqa: TID251
from monai.transforms.spatial.array import Flip  # noqa: TID251
from torch import Tensor
from torch.nn import functional

from medmamba.training.draws import IntensityDraw, Range

_UPSAMPLING = {2: "bilinear", 3: "trilinear"}


def augment_intensity(data: Tensor, draw: IntensityDraw, *, in_plane: bool) -> Tensor:
    """Apply what was drawn, in nnU-Net's order.

    Args:
        data: (C, *spatial).
        draw: the random choices.
        in_plane: simulated low resolution leaves the first axis alone ("dummy 2D").
    """
    if draw.noise_std > 0:
        data = data + draw.noise_std * _normal(data, draw.noise_seed)
    if draw.blur:
        data = _blur(data, draw.blur)
    if draw.brightness:
        data = _per_channel(data, [ScaleIntensity(None, None, f - 1) for f in draw.brightness])
    if draw.shift:
        data = data + _column(data, draw.shift)
    if draw.contrast:
        data = _contrast(data, draw.contrast)
    if draw.low_resolution:
        data = _low_resolution(data, draw.low_resolution, in_plane=in_plane)
    if draw.gamma_inverted:
        data = _gamma(data, draw.gamma_inverted, invert=True)
    if draw.gamma:
        data = _gamma(data, draw.gamma, invert=False)
    if draw.ramp:
        data = _ramp(data, draw.ramp)
    if draw.rectangles:
        data = _blank(data, draw.rectangles)
    return data


def mirror(data: Tensor, labels: Tensor, axes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flip both along the spatial ``axes``."""
    if not axes:
        return data, labels
    flip = Flip(spatial_axis=tuple(axes))
    return _plain(flip(data)), _plain(flip(labels))


def _plain(value: Tensor) -> Tensor:
    return value.as_tensor() if isinstance(value, MetaTensor) else value


def _per_channel(data: Tensor, transforms: Sequence[object]) -> Tensor:
    channels = [_plain(change(data[i : i + 1])) for i, change in enumerate(transforms)]  # type: ignore[operator]
    return torch.cat(channels)


def _column(data: Tensor, values: Sequence[float]) -> Tensor:
    column = torch.tensor(values, dtype=data.dtype, device=data.device)
    return column.reshape(-1, *[1] * (data.ndim - 1))


def _normal(data: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(data.device).manual_seed(seed)
    return torch.randn(data.shape, generator=generator, device=data.device, dtype=data.dtype)


def _blur(data: Tensor, sigmas: Sequence[tuple[float, ...] | None]) -> Tensor:
    channels = []
    for channel, sigma in zip(data, sigmas, strict=True):
        if sigma is None:
            channels.append(channel[None])
            continue
        kernels = [_gaussian(s).to(data) for s in sigma]
        # Reflection instead of MONAI's default zeros, which would darken the patch's faces.
        short = any(len(k) // 2 >= n for k, n in zip(kernels, channel.shape, strict=True))
        mode = "replicate" if short else "reflect"
        channels.append(separable_filtering(channel[None, None], kernels, mode=mode)[0])
    return torch.cat(channels)


def _gaussian(sigma: float) -> Tensor:
    # Sampled like nnU-Net's; MONAI's default integrates over voxels, which blurs more.
    kernel: Tensor = gaussian_1d(
        torch.tensor(sigma), truncated=4.0, approx="sampled", normalize=True
    )
    return kernel


def _contrast(data: Tensor, factors: Sequence[float]) -> Tensor:
    axes = tuple(range(1, data.ndim))
    mean = data.mean(axes, keepdim=True)
    low, high = data.amin(axes, keepdim=True), data.amax(axes, keepdim=True)
    return torch.clip((data - mean) * _column(data, factors) + mean, low, high)


def _low_resolution(data: Tensor, scales: Sequence[float | None], *, in_plane: bool) -> Tensor:
    shape = data.shape[1:]
    channels = []
    for channel, scale in zip(data, scales, strict=True):
        if scale is None:
            channels.append(channel[None])
            continue
        small = [max(1, round(size * scale)) for size in shape]
        if in_plane:
            small[0] = shape[0]
        down = functional.interpolate(channel[None, None], size=small, mode="nearest-exact")
        channels.append(
            functional.interpolate(down, size=tuple(shape), mode=_UPSAMPLING[len(shape)])[0]
        )
    return torch.cat(channels)


def _gamma(data: Tensor, gammas: Sequence[float], *, invert: bool) -> Tensor:
    return _per_channel(data, [AdjustContrast(g, invert, retain_stats=True) for g in gammas])


def _ramp(data: Tensor, slopes: Sequence[float]) -> Tensor:
    total = torch.zeros((), dtype=data.dtype, device=data.device)
    for axis, slope in enumerate(slopes):
        line = torch.linspace(-slope / 2, slope / 2, data.shape[1 + axis], device=data.device)
        shape = [1] * (data.ndim - 1)
        shape[axis] = -1
        total = total + line.reshape(shape)
    return data * total.exp()


def _blank(data: Tensor, boxes: Sequence[Sequence[Range]]) -> Tensor:
    data = data.clone()
    fill = data.mean(tuple(range(1, data.ndim)))
    for box in boxes:
        index = tuple(
            slice(int(start * size), max(int(start * size) + 1, int(stop * size)))
            for (start, stop), size in zip(box, data.shape[1:], strict=True)
        )
        region = data[(slice(None), *index)]
        region.copy_(_column(data, fill.tolist()).expand_as(region))
    return data
