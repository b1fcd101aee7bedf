"""Runs of a comparison that go on at once keep to processors of their own."""

import os
import subprocess
import sys
import threading
import time

import pytest

from medmamba.errors import UsageError
from medmamba.files import to_json, write_atomic
from medmamba.pipeline.contest import RESULT_FILE, Conditions, ContestResult, ContestRun
from medmamba.pipeline.side_by_side import processor_shares, run_contests

PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def run_of(seed: int, tmp_path) -> tuple[str, ContestRun]:
    conditions = Conditions(work=tmp_path, configuration="3d_fullres", frame="plain_unet")
    run = ContestRun(conditions=conditions, network="plain_unet", mixer="mamba", fold=0, seed=seed)
    return "plain", run


def result_of(run: ContestRun, device: str) -> ContestResult:
    return ContestResult(
        key=run.key, dice={}, parameters=1, operations=1, steps=run.seed, seconds=1,
        prediction_s=1, memory_gb=1, precision="fp32", device=device,
    )  # fmt: skip


def test_shares_are_equal_and_no_processor_is_in_two() -> None:
    shares = processor_shares(len(PROCESSORS))
    assert [sorted(share) for share in shares] == [[number] for number in PROCESSORS]
    assert processor_shares(1) == (frozenset(),)


@pytest.mark.parametrize("jobs", [0, -1, 10**6])
def test_more_runs_than_processors_are_refused(jobs) -> None:
    with pytest.raises(UsageError, match=f"--jobs {jobs}: from 1 to the {len(PROCESSORS)} "):
        processor_shares(jobs)


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")
def test_runs_meet_on_processors_of_their_own(tmp_path) -> None:
    both = threading.Barrier(2, timeout=30)
    code = "import os; print(*os.sched_getaffinity(0))"

    def work(run: ContestRun, folder) -> ContestResult:
        both.wait()  # passes only if two runs are under way
        found = subprocess.check_output([sys.executable, "-c", code], text=True)
        return result_of(run, found.strip())

    shares = [frozenset(PROCESSORS[:1]), frozenset(PROCESSORS[1:2])]
    runs = [run_of(seed, tmp_path) for seed in range(4)]
    results = run_contests(runs, tmp_path, shares, work, None)
    assert [result.steps for result in results] == [0, 1, 2, 3]
    assert {result.device for result in results} == {str(p) for p in PROCESSORS[:2]}


@pytest.mark.skipif(len(PROCESSORS) < 2, reason="needs two processors")
def test_a_finished_run_is_not_done_again_and_a_failed_one_ends_the_rest(tmp_path) -> None:
    runs = [run_of(seed, tmp_path) for seed in range(6)]
    done = runs[0][1]
    place = tmp_path / "runs" / f"plain_unet-mamba-fold0-seed0-{done.key}"
    write_atomic(place / RESULT_FILE, to_json(result_of(done, "kept")))
    begun = []

    def work(run: ContestRun, folder) -> ContestResult:
        begun.append(run.seed)
        if run.seed == 1:
            raise UsageError("broken")
        time.sleep(0.5)
        return result_of(run, "new")

    with pytest.raises(UsageError, match="broken"):
        run_contests(runs, tmp_path, processor_shares(2), work, None)
    assert 0 not in begun
    assert 5 not in begun
