"""What the numbers of an image or a label map must be before anything is computed from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError
from medmamba.io.header import Finding

NONFINITE_LIMIT = 0.5
"""Above this share of NaN and Inf an image is refused."""
WHOLE_TOLERANCE = 1e-3
"""Labels stored as floats may miss a whole number by this much."""
FLOAT32_WHOLE_LIMIT = 2.0**24
"""Whole numbers beyond this are not all representable in float32."""
FEW_LEVELS = 2
_SAMPLE = 1 << 16

LARGEST_HU = 32767.0
"""CT numbers are stored with 12 to 16 bits; above is a negative number read without its sign."""
SHIFTED_TISSUE = (900.0, 1200.0)
"""Fat to muscle, -124 to 176 HU, plus 1024."""
SHIFTED_SHARE = 0.05


def as_image(stored: NDArray[np.generic], name: str) -> tuple[NDArray[np.float32], list[Finding]]:
    """Convert to finite float32 and say what that changed.

    NaN and Inf become the background: 0, or the smallest finite value if that is negative (air
    in CT).

    Raises:
        InputError: more than half of the values are not finite.
    """
    findings = _precision_findings(stored)
    with np.errstate(over="ignore", invalid="ignore"):
        array = stored.astype(np.float32, copy=False)
    if np.issubdtype(stored.dtype, np.floating):
        count = count_nonfinite(array)
        if count:
            array = _replace_nonfinite(array, count, name)
            findings.append(
                Finding(
                    code="W_VAL_NONFINITE",
                    message=f"{count} of {array.size} values are NaN or infinite; "
                    "replaced by the background.",
                )
            )
    return array, findings


def count_nonfinite(array: NDArray[np.generic]) -> int:
    """Number of NaN and infinite values."""
    if not np.issubdtype(array.dtype, np.floating):
        return 0
    # One sum decides the usual case without a mask as large as the image.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):
            return 0
    return sum(int(part.size - np.isfinite(part).sum()) for part in array.reshape(len(array), -1))


def _replace_nonfinite(array: NDArray[np.float32], count: int, name: str) -> NDArray[np.float32]:
    if count > NONFINITE_LIMIT * array.size:
        raise InputError(
            f"{name}: {count} of {array.size} values are NaN or infinite. "
            "Export the image again from its source.",
            code="E_VAL_NONFINITE",
        )
    finite = np.isfinite(array)
    background = min(0.0, float(array.min(where=finite, initial=np.inf)))
    return np.where(finite, array, np.float32(background))


def _precision_findings(stored: NDArray[np.generic]) -> list[Finding]:
    if stored.dtype.itemsize < 4 or stored.dtype == np.float32 or stored.size == 0:
        return []
    with np.errstate(all="ignore"):
        largest = max(abs(float(stored.max())), abs(float(stored.min())))
    if not largest > FLOAT32_WHOLE_LIMIT:
        return []
    return [
        Finding(
            code="W_VAL_PRECISION",
            message=f"values up to {largest:g} are rounded to single precision.",
        )
    ]


def judge_image(array: NDArray[np.float32]) -> list[Finding]:
    """Findings about the values of a finite image (C, D, H, W): constant, or hardly an image."""
    findings = []
    for index, channel in enumerate(array):
        which = f"channel {index}: " if len(array) > 1 else ""
        low, high = float(channel.min()), float(channel.max())
        if low == high:
            message = f"{which}every value is {low:g}; there is nothing to see in it."
            findings.append(Finding(code="E_VAL_CONSTANT", message=message))
        elif _has_few_levels(channel, low, high):
            message = f"{which}only the values {low:g} and {high:g} occur; is it a mask?"
            findings.append(Finding(code="W_VAL_FEWLEVELS", message=message))
    return findings


def judge_modality(array: NDArray[np.float32], names: Sequence[str]) -> list[Finding]:
    """Findings about values (C, D, H, W) that no image of the channel's kind has.

    Args:
        array: finite values.
        names: of the channels, as the model calls them; ``CT`` promises Hounsfield units.
    """
    findings = []
    for name, channel in zip(names, array, strict=False):
        low, high = float(channel.min()), float(channel.max())
        if name.strip().upper() != "CT":
            continue
        reach = f"channel {name}: values reach from {low:g} to {high:g}"
        if high > LARGEST_HU or (low >= 0 and _is_shifted(channel)):
            message = f"{reach}; Hounsfield units begin at -1024. Was the rescaling lost?"
            findings.append(Finding(code="W_HU_RANGE", message=message))
        elif low >= 0:
            message = f"{reach}, without air or fat; is it a CT?"
            findings.append(Finding(code="W_MODALITY", message=message))
    return findings


def _is_shifted(channel: NDArray[np.float32]) -> bool:
    """Tell whether a part of the values lies where soft tissue is when 1024 was added to it."""
    tissue = (channel > SHIFTED_TISSUE[0]) & (channel < SHIFTED_TISSUE[1])
    return float(tissue.mean()) > SHIFTED_SHARE


def _has_few_levels(channel: NDArray[np.float32], low: float, high: float) -> bool:
    flat = channel.reshape(-1)
    step = max(1, flat.size // _SAMPLE)
    sample = flat[::step]
    if np.any((sample != low) & (sample != high)):
        return False
    return bool(np.all((flat == low) | (flat == high)))


def as_labels(
    stored: NDArray[np.generic], name: str
) -> tuple[NDArray[np.integer[Any]], list[Finding]]:
    """Convert to int16, or int32 where values need it, and say whether values were rounded.

    Raises:
        InputError: values are not finite, not whole within a thousandth, or too large.
    """
    array, findings = stored, []
    if np.issubdtype(stored.dtype, np.floating):
        array = _rounded(stored, name)
        changed = int(np.count_nonzero(array != stored))
        if changed:
            message = f"{changed} label values were rounded to whole numbers."
            findings.append(Finding(code="W_VAL_ROUNDED", message=message))
    low, high = int(array.min()), int(array.max())
    for kind in (np.int16, np.int32):
        limits = np.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            return array.astype(kind, copy=False), findings
    raise InputError(
        f"{name}: label values reach from {low} to {high}. Labels are small whole numbers; "
        "is this an image?",
        code="E_VAL_LABELS",
    )


def _rounded(stored: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    nonfinite = count_nonfinite(stored)
    if nonfinite:
        raise InputError(
            f"{name}: {nonfinite} label values are NaN or infinite. Write the labels again.",
            code="E_VAL_NONFINITE",
        )
    whole = np.rint(stored)
    wrong = np.abs(stored - whole) > WHOLE_TOLERANCE
    if wrong.any():
        examples = ", ".join(f"{value:g}" for value in np.unique(stored[wrong])[:3])
        raise InputError(
            f"{name}: {int(wrong.sum())} label values are not whole numbers ({examples}, ...). "
            "Resample labels with nearest neighbours, or give the label file.",
            code="E_VAL_FRACTIONS",
        )
    if np.abs(whole).max() > np.iinfo(np.int32).max:
        raise InputError(
            f"{name}: label values reach {np.abs(whole).max():g}. Is this an image?",
            code="E_VAL_LABELS",
        )
    return np.asarray(whole)
