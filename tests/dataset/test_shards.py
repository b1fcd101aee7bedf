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


def test_auto_needs_an_array() -> None:
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_ID"):
        parse_shard("auto", {})
