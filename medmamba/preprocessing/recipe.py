"""The knobs of preprocessing, as one value that its results are keyed by."""

from dataclasses import dataclass, field
from enum import StrEnum

from medmamba.files import RECORD_CONFIG


class Normalization(StrEnum):
    """How the intensities of a channel are brought to a common scale."""

    ZSCORE = "zscore"
    CT = "ct"
    RESCALE_0_1 = "rescale_to_0_1"
    RGB_0_1 = "rgb_to_0_1"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Foreground intensities of one channel over the training set (used by CT normalisation)."""

    __pydantic_config__ = RECORD_CONFIG

    mean: float
    median: float
    std: float
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


@dataclass(frozen=True, kw_only=True)
class ChannelRecipe:
    """What happens to one channel: its scheme, and whether only the non-zero region counts."""

    __pydantic_config__ = RECORD_CONFIG

    normalization: Normalization
    use_mask: bool = False
    statistics: ChannelStatistics | None = None


@dataclass(frozen=True, kw_only=True)
class ResamplingRecipe:
    """Spline orders of resampling; ``order_z`` applies along a separately resampled axis.

    Args:
        separate_z: None decides by anisotropy (ratio above 3), True and False force it.
        method: ``spline`` (nnU-Net's default), ``torch`` (linear) or ``none``.
    """

    __pydantic_config__ = RECORD_CONFIG

    order: int
    order_z: int = 0
    separate_z: bool | None = None
    method: str = "spline"


@dataclass(frozen=True, kw_only=True)
class PreprocessingRecipe:
    """Everything between a raw case and the array a network sees, but for the grid.

    Args:
        channels: one recipe per image channel, in channel order.
        transpose_forward: permutation of (D, H, W) that puts the coarsest axis first.
        data, labels, probabilities: resampling of each kind of array.
    """

    __pydantic_config__ = RECORD_CONFIG

    channels: tuple[ChannelRecipe, ...]
    transpose_forward: tuple[int, int, int]
    data: ResamplingRecipe = field(default_factory=lambda: ResamplingRecipe(order=3))
    labels: ResamplingRecipe = field(default_factory=lambda: ResamplingRecipe(order=1))
    probabilities: ResamplingRecipe = field(default_factory=lambda: ResamplingRecipe(order=1))

    @property
    def transpose_backward(self) -> tuple[int, int, int]:
        """The inverse permutation."""
        first, second, third = (self.transpose_forward.index(axis) for axis in range(3))
        return (first, second, third)
