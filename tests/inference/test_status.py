"""What journals and records tell: how far, how fast, what is missing; figures for Prometheus."""

import json
import os
import re
from pathlib import Path

import pytest
from test_engine import MODEL, ThresholdPredictor, image, predict_cases

from medmamba.dataset import find_cases
from medmamba.dataset.shards import Shard
from medmamba.errors import EnvironmentFault, UsageError
from medmamba.inference.completeness import missing_cases, unfinished_shards
from medmamba.inference.metrics import MetricsFile
from medmamba.inference.status import folder_status


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for index in range(8):
        image(tmp_path / "in", f"c{index}", mark=index, seed=index)
    (tmp_path / "in" / "c3.nii.gz").write_bytes(b"rubbish")
    return tmp_path


def run(place: Path, shard: Shard | None = None, **options):
    listing = find_cases(place / "in", channels=1)
    listing = listing if shard is None else shard.of(listing)
    return predict_cases(
        listing.cases, place / "out", ThresholdPredictor(), model=MODEL, shard=str(shard or ""),
        **options,
    )  # fmt: skip


def test_a_finished_run(place: Path) -> None:
    run(place)
    found = folder_status(place / "out")
    assert (found.total, found.done, found.rejected, found.failed, found.pending) == (8, 7, 1, 0, 0)
    assert (found.runs, found.running, found.eta_s) == (1, 0, None)
    (error,) = found.last_errors
    assert error.case_id == "c3"
    assert found.errors == {error.code: 1}
    assert found.cases_per_hour is not None
    assert found.cases_per_hour > 0


def test_a_run_under_way_and_one_that_mended(place: Path) -> None:
    seen = []

    def look(record, done, total, left_s) -> None:
        seen.append(folder_status(place / "out"))

    run(place, on_case=look)
    middle = seen[2]
    assert (middle.running, middle.total) == (1, 8)
    assert 3 <= middle.done + middle.rejected < 8
    assert middle.pending == 8 - middle.done - middle.rejected
    image(place / "in", "c3", seed=3)
    (place / "out" / "c1.json").unlink()
    assert folder_status(place / "out").pending == 1
    run(place)
    found = folder_status(place / "out")
    assert (found.done, found.pending, found.runs, found.last_errors) == (8, 0, 2, ())
    # Where journals are gone, records still tell.
    for journal in (place / "out" / "run").rglob("journal-0.jsonl"):
        first = journal.read_text().splitlines()[0]
        journal.write_text(first + "\n{torn")
    assert folder_status(place / "out").done == 8


def test_a_killed_run_is_not_going_on(place: Path) -> None:
    outcome = run(place)
    folder = place / "out" / "run" / outcome.run_id
    journal = folder / "journal-0.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    assert folder_status(place / "out").running == 0
    (folder / "running").write_text(f"{os.uname().nodename} {os.getpid()}")
    assert folder_status(place / "out").running == 1


def test_shares_that_are_missing_or_stopped_are_named(place: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        folder_status(place / "in")
    run(place, Shard(index=0, count=3))
    run(place, Shard(index=2, count=3))
    found = folder_status(place / "out")
    assert [shard.state for shard in found.shards] == ["ended", "missing", "ended"]
    assert found.total is None
    (missing,) = unfinished_shards(place / "out", 3)
    assert (missing.index, missing.state) == (1, "missing")
    absent = missing_cases(place / "out", place / "in", shards=3)
    expected = [f"c{n}" for n in range(8) if Shard(index=1, count=3).holds(f"c{n}")]
    assert sorted(case.case_id for case in absent) == expected != []
    assert {case.shard for case in absent} == {"1/3"}
    assert len(unfinished_shards(place / "out", 4)) == 4, "shares of another division do not count"
    share = Shard(index=1, count=3)
    stopped = run(place, share, max_failures=1)
    if stopped.counts.get("rejected") and sum(stopped.counts.values()) < len(expected):
        assert unfinished_shards(place / "out", 3)[0].state == "stopped"
    run(place, share)
    assert unfinished_shards(place / "out", 3) == ()
    assert missing_cases(place / "out", place / "in", shards=3) == []
    assert folder_status(place / "out").total == 8
    # Overlapping shares are harmless: what is done stays done.
    again = run(place, Shard(index=0, count=2))
    assert set(again.counts) <= {"skipped", "rejected"}


def test_a_share_that_was_stopped_is_not_complete(place: Path) -> None:
    outcome = run(place, Shard(index=0, count=1), max_failures=1)
    assert sum(outcome.counts.values()) < 8
    (shard,) = unfinished_shards(place / "out", 1)
    assert (shard.state, shard.cases) == ("stopped", 8)


def test_figures_for_prometheus(place: Path) -> None:
    path = place / "figures" / "medmamba.prom"
    with pytest.raises(EnvironmentFault, match="--metrics"):
        MetricsFile(path)
    path.parent.mkdir()
    figures = MetricsFile(path)
    assert "medmamba_running 1\n" in path.read_text()
    run(place, on_case=figures.report)
    figures.close()
    text = path.read_text()
    (code,) = folder_status(place / "out").errors
    assert "medmamba_cases_done 7\n" in text
    assert f'medmamba_cases_rejected{{code="{code}"}} 1\n' in text
    assert "medmamba_queue_depth 0\n" in text
    assert "medmamba_running 0\n" in text
    sample = re.compile(r'medmamba_[a-z_]+(\{code="[A-Z0-9_]+"\})? [0-9.e+]+')
    comment = re.compile(r"# (HELP|TYPE) medmamba_[a-z_]+ .+")
    assert all(sample.fullmatch(line) or comment.fullmatch(line) for line in text.splitlines())
    assert [entry.name for entry in path.parent.iterdir()] == ["medmamba.prom"]


def test_status_and_verify_through_the_program(place: Path) -> None:
    from typer.testing import CliRunner

    from medmamba.cli.app import app

    run(place, Shard(index=0, count=2))
    call = CliRunner().invoke
    out = str(place / "out")
    told = call(app, ["status", out])
    assert told.exit_code == 0, told.output
    assert "missing: 1 (of 2)" in told.output
    assert json.loads(call(app, ["status", out, "--json"]).stdout)["shards"][1]["state"] == (
        "missing"
    )
    assert call(app, ["verify", out]).exit_code == 0
    told = call(app, ["verify", out, "--expect-shards", "2", "-i", str(place / "in")])
    assert told.exit_code == 4
    assert "shard     1/2: missing" in told.output
    assert "(shard 1/2)" in told.output
    told = call(app, ["verify", out, "--expect-shards", "2", "-i", str(place / "in"), "--json"])
    content = json.loads(told.stdout)
    assert content["passed"] is False
    assert content["shards_unfinished"][0]["index"] == 1
    assert content["cases_missing"]
    run(place, Shard(index=1, count=2))
    told = call(app, ["verify", out, "--expect-shards", "2", "-i", str(place / "in")])
    assert told.exit_code == 0, told.output
