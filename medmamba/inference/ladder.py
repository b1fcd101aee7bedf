"""What a case is computed with when a device's memory runs out: less and less of it, step by step.

The first steps change no number. Which one was needed is told in the case's record.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder: where to compute and add tiles up, and whether one by one.

    All steps give the same numbers but those on the CPU (the last digits) and with a smaller patch
    (less context, other means in instance normalisation).
    """

    accumulate_on_host: bool
    single: bool
    name: str
    on_cpu: bool = False
    smaller: bool = False


LADDER = (
    Rung(accumulate_on_host=False, single=False, name=""),
    Rung(accumulate_on_host=True, single=False, name="accumulated in host memory"),
    Rung(accumulate_on_host=True, single=True, name="accumulated in host memory, one tile a pass"),
)


SMALLER = Rung(
    accumulate_on_host=True, single=True, smaller=True, name="computed in smaller patches"
)

LEAST_PATCH_MULTIPLES = 2
"""Of the total stride, or the deepest stage would be a single voxel, which has no deviation."""

ON_CPU = Rung(accumulate_on_host=True, single=True, on_cpu=True, name="computed on the CPU")
"""The last step, for those who allow it: it takes long, and may differ in the last digits."""


def rungs(*, smaller: bool, cpu: bool) -> Iterator[Rung]:
    """Give the steps in their order; a smaller patch and the CPU only where they may be tried."""
    yield from LADDER
    if smaller:
        yield SMALLER
    if cpu:
        yield ON_CPU


def smaller_patch(patch_size: tuple[int, ...], multiple: tuple[int, ...]) -> tuple[int, ...]:
    """Return half of a patch along every axis that allows it.

    Args:
        patch_size: the whole one.
        multiple: what sizes must be multiples of; empty where none may change.
    """
    multiples = multiple or patch_size
    halves = (size // 2 // each * each for size, each in zip(patch_size, multiples, strict=True))
    return tuple(
        half if half >= LEAST_PATCH_MULTIPLES * each else size
        for half, size, each in zip(halves, patch_size, multiples, strict=True)
    )
