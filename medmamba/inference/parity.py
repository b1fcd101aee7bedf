"""Whether a model says the same in reduced precision: a gate that it passes before it may.

Judged by labels on one image, since errors of logits matter where they decide. A rate of changed
voxels is judged by a count, which varies: a model is turned down where it changes more voxels than
one that just keeps a Dice of 0.999 would by chance, one time in `CHANCE`.
"""

from collections.abc import Iterator
from math import exp, sqrt

import torch
from torch import Tensor

from medmamba.inference.course import Course
from medmamba.inference.predictor import Predictor
from medmamba.inference.records import Parity
from medmamba.labels import LabelMap
from medmamba.volume import Volume

REQUIRED_DICE = 0.999
CHANCE = 0.00135
"""Of a normal variable beyond three standard deviations; counts are small, and Poisson's."""

EXACT_BELOW = 500.0
"""Rates from which the normal approximation says the same."""

LEAST_CHANGES = 3
"""Changes that are no sign of anything, however small a structure is."""

LARGEST_ERROR = 0.05
"""Of logits, in their standard deviations; in bfloat16 sound networks show 0.002 to 0.01."""


def compare_precisions(full: Predictor, reduced: Predictor, image: Volume) -> Parity:
    """Compare two predictors of one model that differ in precision, on one image."""
    prepared = full.prepare(image)
    course = Course()
    expected = torch.cat([planes for _, planes in full.planes(prepared, Course())], dim=1)
    found = torch.cat([planes for _, planes in reduced.planes(prepared, course)], dim=1)
    error = float((found - expected).square().mean().sqrt() / expected.std().clamp_min(1e-12))
    dice, changed, alike = {}, torch.zeros(expected.shape[1:], dtype=torch.bool), True
    for name, one, other in _masks(full.label_map, expected, found):
        flips = int((one ^ other).sum())
        voxels = int(one.sum()) + int(other.sum())
        changed |= one ^ other
        if voxels:
            dice[name] = round(1 - flips / voxels, 6)
            alike &= flips <= most_by_chance((1 - REQUIRED_DICE) * voxels)
    return Parity(
        precision=reduced.settings.precision,
        # What had to be repeated in float32 was not finite.
        passed=alike and error <= LARGEST_ERROR and not course.fallbacks,
        dice=dice,
        voxels=changed.numel(),
        changed=int(changed.sum()),
        logits_error=round(error, 5),
    )


def most_by_chance(usual: float) -> int:
    """Return the largest count that is no sign of a rate above ``usual`` (Poisson, `CHANCE`)."""
    if usual > EXACT_BELOW:
        return int(usual + 3 * sqrt(usual))
    probability = beyond = exp(-usual)
    count = 0
    while 1 - beyond > CHANCE:
        count += 1
        probability *= usual / count
        beyond += probability
    return max(LEAST_CHANGES, count)


def _masks(
    label_map: LabelMap, expected: Tensor, found: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Per label or region its voxels in both."""
    for channel, name in enumerate(label_map.foreground):
        if label_map.has_regions:
            yield name, expected[channel] > 0, found[channel] > 0
        else:
            yield name, expected.argmax(0) == channel + 1, found.argmax(0) == channel + 1
