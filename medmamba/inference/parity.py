"""Whether a model says the same in reduced precision: a gate that it passes before it may.

Judged by labels on one image, since errors of logits matter where they decide. A rate of changed
voxels is judged by a count, which varies: a model is turned down where it changes more voxels than
one that just keeps a Dice of 0.999 would by chance, one time in `CHANCE`.
"""

from math import exp, sqrt

import numpy as np
import torch
from numpy.typing import NDArray

from medmamba.errors import BundleError
from medmamba.inference.course import Course
from medmamba.inference.predictor import Predictor
from medmamba.inference.probe import Expected, decide, expect, masks, sampled
from medmamba.inference.records import Parity
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
    logits = full.logits(full.prepare(image)).numpy()
    return compare_with(expect(logits, full.label_map), reduced, image)


def compare_with(expected: Expected, reduced: Predictor, image: Volume) -> Parity:
    """Compare a predictor in reduced precision with what float32 said of an image.

    Raises:
        BundleError: that was said of another grid than the image has here.
    """
    course, label_map = Course(), reduced.label_map
    planes = [part for _, part in reduced.planes(reduced.prepare(image), course)]
    logits = torch.cat(planes, dim=1).numpy()
    found = decide(logits, label_map)
    if found.shape != expected.decided.shape:
        raise BundleError(
            f"parity probe: made on a grid of {expected.decided.shape}, the plan makes "
            f"{found.shape}. Make the model folder anew."
        )
    error = _deviation(sampled(logits, expected.stride), expected)
    dice, changed, alike = {}, np.zeros(logits.shape[1:], dtype=bool), True
    pairs = zip(masks(expected.decided, label_map), masks(found, label_map), strict=True)
    for (name, one), (_, other) in pairs:
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
        voxels=changed.size,
        changed=int(changed.sum()),
        logits_error=round(error, 5),
    )


def _deviation(logits: NDArray[np.float32], expected: Expected) -> float:
    """Root mean square of the difference, in standard deviations."""
    difference = logits - expected.logits
    return float(np.sqrt(np.square(difference).mean()) / max(expected.std, 1e-12))


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
