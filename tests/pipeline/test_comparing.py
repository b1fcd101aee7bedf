"""compare() as a user runs it, on tiny ellipsoids."""

import csv
import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import pytest

import medmamba
from medmamba.errors import UsageError
from medmamba.pipeline.comparing import compare, parse_contestant
from medmamba.pipeline.contest import Conditions, ContestRun, with_plan

NETWORK = "lightm_unet_s"
SMALL = f"{NETWORK},learning_rate=0.001"


@pytest.fixture(scope="module")
def work(tmp_path_factory, write_raw_ellipsoids):
    root = tmp_path_factory.mktemp("compared")
    raw = write_raw_ellipsoids(root / "Dataset901_Ellipsoids")
    for network in (NETWORK, "plain_unet"):
        medmamba.plan(raw, root / "work", workers=1, network=network)
    return root / "work"


@pytest.mark.slow
def test_a_network_equals_itself_and_a_crippled_one_does_not(work, tmp_path) -> None:
    small = "plain_unet,features=0.25"
    crippled = f"{small},learning_rate=0,warmup_fraction=0,final_learning_rate=0,name=crippled"
    outcome = compare(
        work, [small, small, crippled], tmp_path, recipe="short", epochs=2, iterations=25,
        isolate=False,
    )  # fmt: skip
    itself, other = outcome.pairs
    assert outcome.entries[0].dice > 0.5  # it has learned, or nothing could be lost
    assert itself.verdict == "no difference"
    assert other.verdict == "difference"
    assert other.difference < 0
    assert outcome.entries[1].contestant.seeds == (3, 4, 5)


@pytest.mark.slow
def test_a_comparison_leaves_a_report_and_goes_on(work, tmp_path) -> None:
    says: list[str] = []

    def run(networks, seeds):
        says.clear()
        return compare(
            work, networks, tmp_path, seeds=seeds, epochs=1, iterations=1, isolate=False,
            on_message=says.append, command="medmamba compare",
        )  # fmt: skip

    outcome = run([SMALL], (0, 1))
    assert outcome.pairs[0].verdict == "no difference"
    page = (tmp_path / "report.html").read_text()
    assert "supports no claim" in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "![Dice of every case](paired.png)" in (tmp_path / "report.md").read_text()
    rows = list(csv.DictReader((tmp_path / "cases.csv").read_text().splitlines()))
    assert {row["label"] for row in rows} == {"shell", "core"}
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored["comparisons"][0]["verdict"] == "no difference"
    again = run([SMALL], (0, 1))
    assert all("is there" in text for text in says)
    assert repr(again.pairs) == repr(outcome.pairs)  # a spread of one seed is NaN


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_that_ends_early_leaves_no_run_behind_and_goes_on(
    number, work, tmp_path
) -> None:
    command = [
        sys.executable, "-m", "medmamba", "compare", str(work), f"{NETWORK}:identity", SMALL,
        "--seeds", "0", "--epochs", "3", "--iterations", "6", "-o", str(tmp_path),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:
            if "mamba seed 0 epoch 1/3" in line:  # the second run is at work
                first.send_signal(number)
                break
        rest = first.stderr.read()  # ends when nobody writes there any more
    assert first.returncode == (128 + number if number == signal.SIGTERM else -number)
    assert "epoch 3/3" not in rest
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "fold 0, seed 0 is there" in again.stderr
    assert "epoch 1/3" not in again.stderr  # it goes on
    assert "difference" in again.stdout


def test_contestants_are_read() -> None:
    found = parse_contestant(f"{NETWORK}:dwconv,learning_rate=0.1,seeds=3/4,name=x")
    assert (found.name, found.mixer, found.seeds) == ("x", "dwconv", (3, 4))
    assert found.changes == {"learning_rate": 0.1}


@pytest.mark.parametrize(
    ("text", "word"),
    [("none", "does not exist"), (f"{NETWORK}:conv", "mixer"), (f"{NETWORK},x", "key=value")],
)
def test_what_cannot_be_read_is_named(text: str, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        parse_contestant(text)


def test_a_run_of_a_changed_plan_is_another_run(work, tmp_path) -> None:
    conditions = Conditions(work=work, configuration="3d_fullres", frame=NETWORK, epochs=1)
    run = ContestRun(conditions=conditions, network=NETWORK, mixer="mamba", fold=0, seed=0)
    before = with_plan(run).key
    assert before == with_plan(run).key
    copy = tmp_path / "work"
    shutil.copytree(work, copy)
    plan = copy / "plans" / f"{NETWORK}.json"
    content = json.loads(plan.read_text())
    content["configurations"]["3d_fullres"]["batch_size"] += 1
    plan.write_text(json.dumps(content))
    moved = dataclasses.replace(run, conditions=dataclasses.replace(conditions, work=copy))
    assert with_plan(moved).key != before


def test_options_that_cannot_be_compared(work, tmp_path) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(work, [NETWORK], tmp_path, seeds=(0,))
    with pytest.raises(UsageError, match="exclude"):
        compare(work, [NETWORK], tmp_path, epochs=1, max_time=3)
    for options in ({"twins": True}, {}):
        names = ["plain_unet"] if options else ["plain_unet", "plain_unet:identity"]
        with pytest.raises(UsageError, match="no Mamba layers"):
            compare(work, names, tmp_path, **options)
    with pytest.raises(UsageError, match="surprise"):
        compare(work, [f"{NETWORK},surprise=1"], tmp_path, epochs=1, iterations=1, isolate=False)
