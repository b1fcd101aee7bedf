"""What label values mean: classes, overlapping regions, the ignore label (nnU-Net's rules)."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from medmamba.errors import DatasetError
from medmamba.files import RECORD_CONFIG

IGNORE_NAME = "ignore"
BACKGROUND_NAME = "background"

FEWEST_CASES = 10
"""Training cases below which their volumes do not tell what is usual."""


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Names and values of the labels of a dataset.

    Args:
        values: name -> tuple of label values; one value for a class, several for a region.
            Order is that of dataset.json. Background is (0,), ``ignore`` the highest value.
        region_order: the value written for each region, in order of ``regions``; later entries
            overwrite earlier ones. Empty unless ``has_regions``.
    """

    __pydantic_config__ = RECORD_CONFIG

    values: dict[str, tuple[int, ...]]
    region_order: tuple[int, ...] = ()

    @classmethod
    def from_dataset_json(cls, description: dict[str, Any]) -> "LabelMap":
        """Read the ``labels`` and ``regions_class_order`` entries of a dataset.json.

        Raises:
            DatasetError: no background 0, values with gaps, a misplaced ignore label, or regions
                without ``regions_class_order``.
        """
        labels = description.get("labels")
        if not isinstance(labels, dict) or not labels:
            raise DatasetError(
                f"dataset.json: 'labels' is {labels!r}; a map name -> value is needed."
            )
        values = {str(name): _as_values(name, value) for name, value in labels.items()}
        if values.get(BACKGROUND_NAME) != (0,):
            raise DatasetError(
                f"dataset.json: label 'background' is {labels.get(BACKGROUND_NAME)!r}; "
                "it must be 0."
            )
        order = tuple(int(value) for value in description.get("regions_class_order") or ())
        label_map = cls(values=values, region_order=order)
        label_map._check()
        return label_map

    @classmethod
    def declared_in(cls, description: dict[str, Any]) -> "LabelMap":
        """Take the values that a faulty ``labels`` entry declares, for a look at label files."""
        labels = description.get("labels")
        values: dict[str, tuple[int, ...]] = {}
        for name, value in labels.items() if isinstance(labels, dict) else ():
            with suppress(DatasetError):
                values[str(name)] = _as_values(name, value)
        return cls(values=values)

    def _check(self) -> None:
        found = self.all_values
        if found != tuple(range(len(found))):
            raise DatasetError(
                f"dataset.json: label values {list(found)} have gaps; "
                f"they must be 0 to {len(found) - 1}. Renumber the labels."
            )
        ignore = self.values.get(IGNORE_NAME)
        if ignore is not None and ignore != (found[-1],):
            raise DatasetError(
                f"dataset.json: label 'ignore' is {list(ignore)}; it must be the single highest "
                f"value, {found[-1]}."
            )
        if self.has_regions and len(self.region_order) != len(self.foreground):
            raise DatasetError(
                f"dataset.json: 'regions_class_order' has {len(self.region_order)} entries; "
                f"one for each of the {len(self.foreground)} regions is needed."
            )

    @property
    def all_values(self) -> tuple[int, ...]:
        """Every value that may occur in a label image, ascending."""
        return tuple(sorted({value for group in self.values.values() for value in group}))

    @property
    def has_regions(self) -> bool:
        """Whether outputs are overlapping regions (sigmoid) and not exclusive classes (softmax)."""
        return any(len(group) > 1 for group in self.values.values())

    @property
    def ignore_value(self) -> int | None:
        """The value of voxels without annotation, if there is one."""
        ignore = self.values.get(IGNORE_NAME)
        return None if ignore is None else ignore[0]

    @property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """Every class or region but background and ignore, in file order."""
        return {
            name: group
            for name, group in self.values.items()
            if name not in (BACKGROUND_NAME, IGNORE_NAME) and group != (0,)
        }

    @property
    def foreground_values(self) -> tuple[int, ...]:
        """Every label value but 0 and ignore, ascending."""
        return tuple(value for value in self.all_values if value not in (0, self.ignore_value))

    @property
    def output_channels(self) -> int:
        """Channels a network must produce: regions, or classes with background."""
        if self.has_regions:
            return len(self.foreground)
        return len(self.all_values) - (self.ignore_value is not None)


@dataclass(frozen=True, kw_only=True)
class UsualVolume:
    """How large a label or region was in the cases that a model was trained on.

    Args:
        low_ml: 1st percentile.
        high_ml: 99th percentile.
        cases: how many there were.
    """

    __pydantic_config__ = RECORD_CONFIG

    low_ml: float
    high_ml: float
    cases: int

    def judge(self, volume_ml: float) -> Literal["low", "high"] | None:
        """Say how a volume differs from what is usual; too few cases say nothing."""
        if self.cases < FEWEST_CASES:
            return None
        if volume_ml < self.low_ml:
            return "low"
        return "high" if volume_ml > self.high_ml else None


def _as_values(name: object, value: object) -> tuple[int, ...]:
    members: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not members or not all(_is_whole(member) for member in members):
        raise DatasetError(
            f"dataset.json: label '{name}' is {value!r}; "
            "a whole number or a list of them is needed."
        )
    return tuple(int(member) for member in members)


def _is_whole(value: object) -> bool:
    if isinstance(value, str):
        return value.lstrip("-").isdigit()
    return isinstance(value, int) and not isinstance(value, bool)
