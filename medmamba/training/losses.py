"""What training minimises: overlap and voxel losses, their sums, and deep supervision.

Legend: B batch, K classes (with background) or regions, R annotated cells of a grid. Logits are
(B, K, *spatial). Targets are (B, 1, *spatial) label values for classes, and (B, K, *spatial)
zeros and ones for regions, with one more channel (1 = ignored) where there is an ignore label.
Everything is computed in float32 or wider, whatever autocast does around it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.errors import UsageError
from medmamba.labels import LabelMap
from medmamba.training.recipe import LossOption
from medmamba.training.tversky import region_tversky_score, tversky_score

DICE_SMOOTH = 1e-5
"""nnU-Net's smoothing, in numerator and denominator."""

TVERSKY_ALPHA, TVERSKY_BETA = 0.3, 0.7
"""Weights of false positives and false negatives (Salehi et al. 2017, best of their table 1)."""

FOCAL_GAMMA = 0.75
"""Exponent of (1 - T): 1 / (4/3) (Abraham and Khan 2019, equation 4)."""

REGION_GRID = (8, 8, 14)
"""Cells per axis of MambaClinix's region-specific loss (its trainer, not its class default)."""

REGION_WEIGHT = 0.8
"""Weight of the region-specific term beside CE and Dice (MambaClinix)."""


Total = Callable[[Tensor], Tensor]


def itself(value: Tensor) -> Tensor:
    """Return the value: the sum over the only process there is."""
    return value


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What a loss must know of data, recipe and the other processes.

    Args:
        regions: targets are region channels and outputs are independent (sigmoid).
        ignore_value: the label value without annotation (classes).
        has_ignore: the last target channel marks voxels without annotation (regions).
        batch_dice: sum over the batch before dividing.
        options: the loss's own options; an unknown one is an error.
        total: sums a tensor over the processes that share the batch; the tensor itself when
            there is one process.
    """

    regions: bool = False
    ignore_value: int | None = None
    has_ignore: bool = False
    batch_dice: bool = False
    options: Mapping[str, LossOption] = field(default_factory=dict)
    total: Total = itself

    @classmethod
    def of(
        cls,
        label_map: LabelMap,
        *,
        batch_dice: bool = False,
        options: Mapping[str, LossOption] | None = None,
        total: Total = itself,
    ) -> "LossSettings":
        """Read the settings off a label map."""
        return cls(
            regions=label_map.has_regions,
            ignore_value=label_map.ignore_value,
            has_ignore=label_map.ignore_value is not None,
            batch_dice=batch_dice,
            options=options or {},
            total=total,
        )

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all values of all processes."""
        if self.total is itself:
            return values.mean()
        count = torch.tensor(values.numel(), dtype=values.dtype, device=values.device)
        summed, counted = self.total(torch.stack([values.sum(), count])).unbind()
        return summed / counted.detach()

    def ratio(self, numerator: Tensor, count: Tensor) -> Tensor:
        """Return sums of all processes divided by a count of all processes, at least 1."""
        summed, counted = self.total(torch.stack([numerator, count.to(numerator.dtype)])).unbind()
        return summed / counted.detach().clip(min=1)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Logits and targets brought to one form, shared by the terms of a sum.

    Args:
        log_probabilities: (B, K, *spatial) for classes; None for regions.
        probabilities: softmax or sigmoid of the logits.
        target: (B, K, *spatial) bool, one-hot or region membership.
        labels: (B, *spatial) int64 with ignored voxels set to 0; None for regions.
        mask: (B, 1, *spatial), true where annotated; None where everything is.
    """

    logits: Tensor
    log_probabilities: Tensor | None
    probabilities: Tensor
    target: Tensor
    labels: Tensor | None
    mask: Tensor | None


def score(logits: Tensor, target: Tensor, settings: LossSettings) -> Scores:
    """Compute what every term needs, once."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if settings.regions:
        return _score_regions(wide, target, settings)
    labels, mask = target[:, 0].long(), None
    if settings.ignore_value is not None:
        mask = labels != settings.ignore_value
        labels = labels * mask
        mask = mask[:, None]
    log_probabilities = wide.log_softmax(1)
    one_hot = torch.zeros(wide.shape, dtype=torch.bool, device=wide.device)
    one_hot.scatter_(1, labels[:, None], True)
    return Scores(
        logits=wide,
        log_probabilities=log_probabilities,
        probabilities=log_probabilities.exp(),
        target=one_hot,
        labels=labels,
        mask=mask,
    )


def _score_regions(logits: Tensor, target: Tensor, settings: LossSettings) -> Scores:
    mask = None
    if settings.has_ignore:
        mask = target[:, -1:] == 0
        target = target[:, :-1]
    return Scores(
        logits=logits,
        log_probabilities=None,
        probabilities=logits.sigmoid(),
        target=target.bool(),
        labels=None,
        mask=mask,
    )


Term = Callable[[Scores, LossSettings], Tensor]


def soft_dice(scores: Scores, settings: LossSettings) -> Tensor:
    """Return minus the mean soft Dice, without background for classes (nnU-Net's form)."""
    probabilities, target = _foreground(scores, settings)
    axes = tuple(range(2, probabilities.ndim))
    if scores.mask is None:
        predicted, annotated = probabilities.sum(axes), target.sum(axes)
    else:
        target = target & scores.mask
        predicted, annotated = (probabilities * scores.mask).sum(axes), target.sum(axes)
    overlap = (probabilities * target).sum(axes)
    if not settings.batch_dice:
        return -settings.mean(_dice(predicted, annotated, overlap))
    sums = torch.stack([predicted.sum(0), annotated.sum(0).to(predicted.dtype), overlap.sum(0)])
    return -_dice(*settings.total(sums).unbind()).mean()


def _dice(predicted: Tensor, annotated: Tensor, overlap: Tensor) -> Tensor:
    return (2 * overlap + DICE_SMOOTH) / (predicted + annotated + DICE_SMOOTH).clip(min=1e-8)


def cross_entropy(scores: Scores, settings: LossSettings) -> Tensor:
    """Return CE over annotated voxels, or BCE for regions; 0 where nothing is annotated."""
    if scores.log_probabilities is None or scores.labels is None:
        return _binary_cross_entropy(scores, settings)
    picked = scores.log_probabilities.gather(1, scores.labels[:, None])
    if scores.mask is None:
        return -settings.mean(picked)
    return -settings.ratio((picked * scores.mask).sum(), scores.mask.sum())


def _binary_cross_entropy(scores: Scores, settings: LossSettings) -> Tensor:
    # With an ignore label nnU-Net divides the sum over all regions by annotated voxels only,
    # so that its value grows with the number of regions. Kept, the recipe's balance depends on it.
    target = scores.target.to(scores.logits.dtype)
    values = functional.binary_cross_entropy_with_logits(scores.logits, target, reduction="none")
    if scores.mask is None:
        return settings.mean(values)
    return settings.ratio((values * scores.mask).sum(), scores.mask.sum())


def tversky(scores: Scores, settings: LossSettings) -> Tensor:
    """Return 1 minus the mean Tversky index (Salehi et al. 2017, equation 5)."""
    return 1 - _mean_over_batch(_tversky(scores, settings), settings)


def focal_tversky(scores: Scores, settings: LossSettings) -> Tensor:
    """Return the mean of (1 - T) ** gamma (Abraham and Khan 2019, equation 4)."""
    gamma = _number(settings, "gamma", FOCAL_GAMMA)
    # The slope of x ** gamma is infinite at 0, where a perfect prediction ends.
    focused = (1 - _tversky(scores, settings)).clip(min=1e-6).pow(gamma)
    return _mean_over_batch(focused, settings)


def region_tversky(scores: Scores, settings: LossSettings) -> Tensor:
    """Return minus the mean Tversky score of a grid of cells (MambaClinix, networks.md 5.1)."""
    probabilities, target = _foreground(scores, settings)
    official = bool(settings.options.get("official_ignore", False))
    score = region_tversky_score(
        probabilities,
        target,
        grid=_grid(settings, probabilities.ndim - 2),
        batch=settings.total if settings.batch_dice else None,
        mask=None if official else scores.mask,
    )
    return -_mean_over_batch(score, settings)


def _mean_over_batch(values: Tensor, settings: LossSettings) -> Tensor:
    # Over the batch already, values are those of all processes and equal everywhere.
    return values.mean() if settings.batch_dice else settings.mean(values)


def _tversky(scores: Scores, settings: LossSettings) -> Tensor:
    probabilities, target = _foreground(scores, settings)
    return tversky_score(
        probabilities,
        target,
        weights=(
            _number(settings, "alpha", TVERSKY_ALPHA),
            _number(settings, "beta", TVERSKY_BETA),
        ),
        batch=settings.total if settings.batch_dice else None,
        mask=scores.mask,
    )


def _foreground(scores: Scores, settings: LossSettings) -> tuple[Tensor, Tensor]:
    if settings.regions:
        return scores.probabilities, scores.target
    return scores.probabilities[:, 1:], scores.target[:, 1:]


class SumLoss(nn.Module):
    """A weighted sum of terms over one evaluation of the probabilities."""

    def __init__(self, settings: LossSettings, terms: Sequence[tuple[float, Term]]) -> None:
        super().__init__()
        self.settings = settings
        self.terms = tuple(terms)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (B, K, *spatial) as a scalar."""
        with torch.autocast(logits.device.type, enabled=False):
            scores = score(logits, target, self.settings)
            values = [weight * term(scores, self.settings) for weight, term in self.terms]
        return torch.stack(values).sum() if len(values) > 1 else values[0]


class DeepSupervision(nn.Module):
    """A loss summed over outputs of falling resolution, targets resized nearest-exact."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Sequence[Tensor], target: Tensor) -> Tensor:
        """Return the weighted loss of ``outputs``, highest resolution first."""
        total: Tensor | None = None
        weights = deep_supervision_weights(len(outputs))
        for weight, output in zip(weights, outputs, strict=True):
            if weight == 0.0:
                continue
            value = weight * self.loss(output, resize_nearest_exact(target, output.shape[2:]))
            total = value if total is None else total + value
        assert total is not None
        return total


def deep_supervision_weights(outputs: int) -> tuple[float, ...]:
    """Return nnU-Net's weights: 1, 1/2, 1/4, ..., the lowest resolution 0, with sum 1."""
    if outputs == 1:
        return (1.0,)
    raw = [0.5**level for level in range(outputs - 1)] + [0.0]
    return tuple(value / sum(raw) for value in raw)


def resize_nearest_exact(target: Tensor, shape: Sequence[int]) -> Tensor:
    """Pick, per output voxel, the input voxel that holds its centre; any dtype, any dimension."""
    for axis, size in enumerate(shape, start=2):
        length = target.shape[axis]
        if length != size:
            centres = torch.arange(size, dtype=torch.float64, device=target.device) + 0.5
            index = (centres * (length / size)).floor().long().clip(max=length - 1)
            target = target.index_select(axis, index)
    return target


def region_targets(labels: Tensor, label_map: LabelMap) -> Tensor:
    """Turn label values (B, 1, *spatial) into region channels, plus one for the ignore label."""
    groups = list(label_map.foreground.values())
    if label_map.ignore_value is not None:
        groups.append((label_map.ignore_value,))
    channels = []
    for group in groups:
        member = labels == group[0]
        for value in group[1:]:
            member = member | (labels == value)
        channels.append(member)
    return torch.cat(channels, dim=1)


def _region_tversky_terms(settings: LossSettings) -> list[tuple[float, Term]]:
    if settings.regions:
        raise UsageError(
            "loss 'region_tversky': the labels are overlapping regions, for which it is not "
            "defined. Use 'dice_ce' or 'tversky'."
        )
    weight = _number(settings, "weight", REGION_WEIGHT)
    return [(1.0, cross_entropy), (1.0, soft_dice), (weight, region_tversky)]


def _dice_bce_terms(settings: LossSettings) -> list[tuple[float, Term]]:
    if not settings.regions:
        raise UsageError(
            "loss 'dice_bce': the labels are exclusive classes; it is for overlapping regions. "
            "Use 'dice_ce'."
        )
    return [(1.0, cross_entropy), (1.0, soft_dice)]


def _fixed(*terms: tuple[float, Term]) -> Callable[[LossSettings], list[tuple[float, Term]]]:
    return lambda settings: list(terms)


def _builder(
    name: str, terms: Callable[[LossSettings], list[tuple[float, Term]]], known: tuple[str, ...]
) -> Callable[[LossSettings], nn.Module]:
    def build(settings: LossSettings) -> nn.Module:
        unknown = sorted(set(settings.options) - set(known))
        if unknown:
            raise UsageError(
                f"loss '{name}': unknown option '{unknown[0]}'. "
                f"Its options are: {', '.join(known) or 'none'}."
            )
        return SumLoss(settings, terms(settings))

    return build


_TVERSKY_OPTIONS = ("alpha", "beta")

LOSSES: dict[str, Callable[[LossSettings], nn.Module]] = {
    "dice": _builder("dice", _fixed((1.0, soft_dice)), ()),
    "ce": _builder("ce", _fixed((1.0, cross_entropy)), ()),
    "dice_ce": _builder("dice_ce", _fixed((1.0, cross_entropy), (1.0, soft_dice)), ()),
    "dice_bce": _builder("dice_bce", _dice_bce_terms, ()),
    "tversky": _builder("tversky", _fixed((1.0, tversky)), _TVERSKY_OPTIONS),
    "tversky_ce": _builder(
        "tversky_ce", _fixed((1.0, cross_entropy), (1.0, tversky)), _TVERSKY_OPTIONS
    ),
    "focal_tversky": _builder(
        "focal_tversky", _fixed((1.0, focal_tversky)), (*_TVERSKY_OPTIONS, "gamma")
    ),
    "region_tversky": _builder(
        "region_tversky", _region_tversky_terms, ("grid", "weight", "official_ignore")
    ),
}
"""Every loss by name; ``ce`` means binary cross entropy where the labels are regions."""


def build_loss(name: str, settings: LossSettings) -> nn.Module:
    """Build the loss ``name``.

    Raises:
        UsageError: no such loss, an unknown option, or a loss that does not fit the labels.
    """
    require_loss(name)
    return LOSSES[name](settings)


def require_loss(name: str) -> None:
    """Refuse a loss that does not exist.

    Raises:
        UsageError: naming those that do.
    """
    if name not in LOSSES:
        raise UsageError(f"loss '{name}' does not exist. Choose one of: {', '.join(LOSSES)}.")


def _number(settings: LossSettings, name: str, default: float) -> float:
    value = settings.options.get(name, default)
    if not isinstance(value, int | float):
        raise UsageError(f"loss option '{name}' is {value!r}; a number is needed.")
    return float(value)


def _grid(settings: LossSettings, dimension: int) -> tuple[int, ...]:
    value = settings.options.get("grid", REGION_GRID[-dimension:])
    if isinstance(value, int | float) or len(value) != dimension:
        raise UsageError(
            f"loss option 'grid' is {value!r}; {dimension} numbers of cells are needed."
        )
    return tuple(int(cells) for cells in value)
