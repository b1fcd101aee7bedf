"""Dividing cases among independent processes by name alone; nobody keeps a list of shares."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from medmamba.dataset.inputs import CaseListing
from medmamba.errors import UsageError

AUTO = "auto"
SLURM_INDEX = "SLURM_ARRAY_TASK_ID"
KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"
COUNT_VARIABLE = "MEDMAMBA_SHARDS"
"""Says how many shares there are, where the scheduler does not."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of ``count`` shares, numbered from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

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
    """Read ``2/8``; or ``auto`` and ``auto/8`` inside a Slurm array or an indexed Kubernetes job.

    ``auto`` asks the scheduler for the number of shares too; Slurm knows it, for Kubernetes
    ``MEDMAMBA_SHARDS`` may say it. With ``auto/8`` tasks are numbered from 0 and some may be run
    alone again.

    Raises:
        UsageError: it is none of these, or no scheduler is there.
    """
    name, _, count = text.strip().partition("/")
    if name == AUTO:
        return _scheduled_shard(count, environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(
            f"shard '{text}': INDEX/COUNT with INDEX from 0 to COUNT - 1, such as 2/8, or auto."
        )
    return Shard(index=int(match[1]), count=int(match[2]))


def _scheduled_shard(count: str, environment: Mapping[str, str]) -> Shard:
    task, index = environment.get(SLURM_INDEX, ""), environment.get(KUBERNETES_INDEX, "")
    if task.isdecimal() and not count:
        return _whole_slurm_array(int(task), environment)
    number = task if task.isdecimal() else index
    if not number.isdecimal():
        raise UsageError(
            f"shard 'auto': no scheduler here says which share this is (neither {SLURM_INDEX} nor "
            f"{KUBERNETES_INDEX} is set). Give INDEX/COUNT instead, such as 2/8."
        )
    count = count or environment.get(COUNT_VARIABLE, "")
    if not count:
        raise UsageError(
            "shard 'auto': Kubernetes says which share this is and not of how many. Write "
            f"auto/COUNT with the job's completions, such as auto/8, or set {COUNT_VARIABLE}."
        )
    return parse_shard(f"{number}/{count}")


def _whole_slurm_array(task: int, environment: Mapping[str, str]) -> Shard:
    names = ("MIN", "MAX", "STEP", "COUNT")
    values = [environment.get(f"SLURM_ARRAY_TASK_{name}", "") for name in names]
    first, last, step, count = (int(value) if value.isdecimal() else 0 for value in values)
    step = max(step, 1)
    regular = count > 0 and (not values[1] or (last - first) // step + 1 == count)
    if not regular or (task - first) % step:
        raise UsageError(
            f"shard 'auto': this Slurm array ({count} tasks from {first} to {last}) is no regular "
            "range, so that its tasks do not say their shares. Number it from 0 and write "
            "auto/COUNT with the number of all shares, such as auto/8."
        )
    return parse_shard(f"{(task - first) // step}/{count}")
