"""Shares are disjoint, complete and stable; a Slurm array is recognised."""

import pytest

from medmamba.dataset.shards import Shard, parse_shard
from medmamba.errors import UsageError

NAMES = [f"case_{number:04d}" for number in range(400)]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_case_belongs_to_one_share(count: int) -> None:
    shares = [Shard(index=index, count=count) for index in range(count)]
    owners = [[share.index for share in shares if share.holds(name)] for name in NAMES]
    assert all(len(found) == 1 for found in owners)
    sizes = [sum(share.holds(name) for name in NAMES) for share in shares]
    assert min(sizes) > 0.6 * len(NAMES) / count


def test_shares_are_the_same_everywhere() -> None:
    assert [name for name in NAMES[:20] if Shard(index=1, count=4).holds(name)] == [
        name for name in NAMES[:20] if parse_shard("1/4").holds(name)
    ]


def test_a_slurm_array_says_its_share() -> None:
    array = {
        "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8",
    }  # fmt: skip
    assert parse_shard("auto", array) == Shard(index=4, count=8)


@pytest.mark.parametrize("text", ["8/8", "-1/4", "1", "a/b", "1/0", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="INDEX/COUNT"):
        parse_shard(text)


def slurm(task: int, first: int, last: int, step: int, count: int) -> dict[str, str]:
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    values = (task, first, last, step, count)
    return {
        f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, values, strict=True)
    }


def test_arrays_with_steps_and_single_tasks_again() -> None:
    shares = [parse_shard("auto", slurm(task, 2, 10, 2, 5)) for task in (2, 4, 6, 8, 10)]
    assert shares == [Shard(index=index, count=5) for index in range(5)]
    # Tasks 3 and 7 of eight, sent again by themselves, must not take halves of everything.
    with pytest.raises(UsageError, match=r"auto/COUNT"):
        parse_shard("auto", slurm(7, 3, 7, 1, 2))
    assert parse_shard("auto/8", slurm(7, 3, 7, 1, 2)) == Shard(index=7, count=8)


def test_an_indexed_job_of_kubernetes_says_its_share() -> None:
    job = {"JOB_COMPLETION_INDEX": "3"}
    assert parse_shard("auto/8", job) == Shard(index=3, count=8)
    assert parse_shard("auto", {**job, "MEDMAMBA_SHARDS": "8"}) == Shard(index=3, count=8)
    with pytest.raises(UsageError, match="auto/8"):
        parse_shard("auto", job)
    with pytest.raises(UsageError, match="INDEX/COUNT"):
        parse_shard("auto/3", job)


@pytest.mark.parametrize("text", ["auto", "auto/8"])
def test_auto_needs_a_scheduler(text: str) -> None:
    with pytest.raises(UsageError, match=r"SLURM_ARRAY_TASK_ID.*JOB_COMPLETION_INDEX"):
        parse_shard(text, {})
