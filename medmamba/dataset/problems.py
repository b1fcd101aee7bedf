"""What verification can say: one problem, and the report of all of them, both ready for JSON."""

from dataclasses import dataclass, field
from typing import Literal

from medmamba.files import RECORD_CONFIG

Severity = Literal["fatal", "warning"]

SUGGESTIONS: dict[str, str] = {
    "E_CHAN_COUNT": "Add or remove channel files, or correct 'channel_names' in dataset.json.",
    "E_CHAN_GRID": "Resample the channels onto one grid, or remove the case.",
    "E_DATA_COUNT": "Set 'numTraining' to the number of cases, or restore the missing ones.",
    "E_GEOM_AMBIGUOUS": "Delete the wrong transform (set its code to 0).",
    "E_GEOM_SPACING": "Repair the spacing in the header from the source of the image.",
    "E_IO_CORRUPT": "Copy the file again from its source.",
    "E_IO_EMPTY": "Copy the file again from its source.",
    "E_IO_MISSING": "Restore the file, or remove the case from dataset.json.",
    "E_IO_TRUNCATED": "Copy the file again from its source.",
    "E_LABEL_GRID": "Resample the labels onto the image with nearest neighbours, copy the image's "
    "header if only that is wrong, or remove the case.",
    "E_LABEL_MISSING": "Add the label file or remove the image from imagesTr.",
    "E_LABEL_UNDECLARED": "Declare the values under 'labels' in dataset.json or correct the file.",
    "E_SPLIT_CASES": "Correct splits_final.json, or delete it to get default folds.",
    "E_SPLIT_LEAK": "Keep a subject, and copies of an image, on one side of the fold.",
    "E_VAL_CONSTANT": "Export the image again, or remove the case.",
    "E_VAL_NONFINITE": "Replace NaN and Inf by the background value, or remove the case.",
    "W_CLASS_ABSENT": "Check the label values, or remove the class from dataset.json.",
    "W_DUPLICATE": "Remove copies: a case both trained on and validated on flatters the scores.",
    "W_GEOM_UNCODED": "Write the affine into the files, or predictions cannot be placed in space.",
    "W_HU_RANGE": "Export the image with its rescale slope and intercept.",
    "W_LABEL_EMPTY": "Make sure that the case holds nothing to segment.",
    "W_LABEL_STRAY": "Add the image or remove the label file.",
    "W_MODALITY": "Check that the channel is what 'channel_names' says.",
    "W_NAME_STRAY": "Name channel files CASE_0000, CASE_0001, ...",
    "W_ORIENTATION": "Nothing must be done; results are best when new images are stored alike.",
}
"""Code -> what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a dataset.

    Args:
        case: id of the case, or None for the dataset as a whole.
        severity: ``fatal`` stops planning, ``warning`` does not.
        code: stable identifier.
        message: what was found, with values.
        suggestion: what to do.
    """

    __pydantic_config__ = RECORD_CONFIG

    case: str | None
    severity: Severity
    code: str
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        where = f"case {self.case}: " if self.case else ""
        return f"{self.code} {where}{self.message} {self.suggestion}".strip()


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """Everything verification found, fatal problems first.

    Args:
        dataset: name of the dataset.
        cases: number of training cases looked at.
        problems: fatal ones first, then in order of cases.
        orientations: axis codes of the stored (x, y, z) axes, such as ``RAS`` -> number of cases.
        label_voxels: label value -> voxels over all cases.
        label_cases: label value -> cases in which it occurs.
    """

    __pydantic_config__ = RECORD_CONFIG

    dataset: str
    cases: int
    problems: tuple[Problem, ...] = ()
    orientations: dict[str, int] = field(default_factory=dict)
    label_voxels: dict[int, int] = field(default_factory=dict)
    label_cases: dict[int, int] = field(default_factory=dict)

    @property
    def fatal(self) -> tuple[Problem, ...]:
        """Problems that must be solved before planning."""
        return tuple(problem for problem in self.problems if problem.severity == "fatal")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems that planning can live with."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")


def make_problem(case: str | None, code: str, message: str) -> Problem:
    """Build a problem whose severity follows from its code (E_ is fatal)."""
    return Problem(
        case=case,
        severity="fatal" if code.startswith("E_") else "warning",
        code=code,
        message=message,
        suggestion=SUGGESTIONS.get(code, ""),
    )
