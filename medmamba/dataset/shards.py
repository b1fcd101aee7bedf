"""Dividing cases among independent processes by name alone; nobody keeps a list of shares."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from medmamba.dataset.inputs import CaseListing
from medmamba.errors import UsageError

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of ``count`` shares, numbered from 0."""

    index: int
    count: int

    def holds(self, case_id: str) -> bool:
        """Whether a case belongs to this share; the same on every machine and in every version."""
        digest = hashlib.sha256(case_id.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index

    def of(self, listing: CaseListing) -> CaseListing:
        """The cases of a listing that belong to this share, rejected ones too."""
        return replace(
            listing,
            cases=tuple(case for case in listing.cases if self.holds(case.id)),
            rejected=tuple(item for item in listing.rejected if self.holds(item.id)),
        )


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """Read ``2/8``, or ``auto`` inside a Slurm array.

    Raises:
        UsageError: it is neither, or no array is there.
    """
    if text == AUTO:
        return _slurm_shard(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(
            f"shard '{text}': INDEX/COUNT with INDEX from 0 to COUNT - 1, such as 2/8, or auto."
        )
    return Shard(index=int(match[1]), count=int(match[2]))


def _slurm_shard(environment: Mapping[str, str]) -> Shard:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    values = [environment.get(name, "") for name in names]
    if not all(value.isdecimal() for value in values):
        raise UsageError(
            "shard 'auto': no Slurm array here (SLURM_ARRAY_TASK_ID, _MIN and _COUNT are needed). "
            "Give INDEX/COUNT instead, such as 2/8."
        )
    number, first, count = map(int, values)
    return parse_shard(f"{number - first}/{count}")
