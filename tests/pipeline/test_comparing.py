"""compare() as a user runs it, on tiny ellipsoids."""

import csv
import json

import pytest

import medmamba
from medmamba.errors import UsageError
from medmamba.pipeline.comparing import compare, parse_contestant

NETWORK = "lightm_unet_s"
SMALL = f"{NETWORK},learning_rate=0.001"


@pytest.fixture(scope="module")
def work(tmp_path_factory, write_raw_ellipsoids):
    root = tmp_path_factory.mktemp("compared")
    raw = write_raw_ellipsoids(root / "Dataset901_Ellipsoids")
    medmamba.plan(raw, root / "work", workers=1)
    return root / "work"


@pytest.mark.slow
def test_a_network_equals_itself_and_a_crippled_one_does_not(work, tmp_path) -> None:
    crippled = f"{NETWORK},learning_rate=0,warmup_fraction=0,final_learning_rate=0,name=crippled"
    outcome = compare(
        work, [NETWORK, NETWORK, crippled], tmp_path, epochs=2, iterations=25, isolate=False
    )
    itself, other = outcome.pairs
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
    rows = list(csv.DictReader((tmp_path / "cases.csv").read_text().splitlines()))
    assert {row["label"] for row in rows} == {"shell", "core"}
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert stored["comparisons"][0]["verdict"] == "no difference"
    again = run([SMALL], (0, 1))
    assert all("is there" in text for text in says)
    assert repr(again.pairs) == repr(outcome.pairs)  # a spread of one seed is NaN


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


def test_options_that_cannot_be_compared(work, tmp_path) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(work, [NETWORK], tmp_path, seeds=(0,))
    with pytest.raises(UsageError, match="exclude"):
        compare(work, [NETWORK], tmp_path, epochs=1, max_time=3)
    with pytest.raises(UsageError, match="surprise"):
        compare(work, [f"{NETWORK},surprise=1"], tmp_path, epochs=1, iterations=1, isolate=False)
