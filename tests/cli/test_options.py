"""Durations and spacings as people write them."""

import pytest

from medmamba.cli.options import format_duration, parse_duration
from medmamba.cli.plan import parse_spacing
from medmamba.cli.train import parse_fold
from medmamba.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400), ("2m5s", 125)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "ten", "5 m", "m", "1d"])
def test_other_durations_are_refused(text):
    with pytest.raises(UsageError, match="write it like"):
        parse_duration(text)


def test_durations_are_shown_in_the_unit_that_fits():
    assert format_duration(59.4) == "59 s"
    assert format_duration(61) == "1 min 01 s"
    assert format_duration(3720) == "1 h 02 min"


def test_spacing():
    assert parse_spacing("1,0.8,0.8") == (1.0, 0.8, 0.8)
    assert parse_spacing(None) is None
    for text in ("1,2", "1,2,x", "1,2,-3", "0,1,1"):
        with pytest.raises(UsageError):
            parse_spacing(text)


def test_folds():
    assert parse_fold("3") == 3
    assert parse_fold("all") == "all"
    for text in ("-1", "one", ""):
        with pytest.raises(UsageError):
            parse_fold(text)
