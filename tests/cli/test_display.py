"""Tables for people, at the widths that terminals have."""

from io import StringIO

import pytest
from rich.console import Console

from medmamba.cli import display

COLUMNS = ("network", "Dice", "seed spread", "difference", "95 % interval", "verdict")
ROWS = [
    ("lightm_unet_s (seeds 0, 2)", "0.8037", "0.0311", "-", "-", "reference"),
    ("umamba_enc:identity", "0.8502", "0.0079", "+0.0465", "+0.0207 to +0.0811", "no difference"),
]


def printed(monkeypatch, width: int, rows=ROWS) -> list[str]:
    out = StringIO()
    monkeypatch.setattr(display, "data", Console(file=out, width=width))
    display.print_table("Scores", COLUMNS, rows)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_word_and_no_number_is_broken(monkeypatch, width: int) -> None:
    lines = printed(monkeypatch, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for cell in [cell for row in ROWS for cell in row[1:]]:
        assert f" {cell} " in text
    for word in " ".join([*COLUMNS, *(row[0] for row in ROWS)]).split():
        assert f" {word} " in text


def test_what_does_not_fit_follows_beside_the_same_names(monkeypatch) -> None:
    wide, narrow = (printed(monkeypatch, width) for width in (200, 80))
    assert sum("umamba_enc:identity" in line for line in wide) == 1
    assert sum("umamba_enc:identity" in line for line in narrow) == 2
    assert sum("Scores" in line for line in narrow) == 1


def test_a_table_without_rows_has_a_header(monkeypatch) -> None:
    assert any("verdict" in line for line in printed(monkeypatch, 80, rows=[]))
