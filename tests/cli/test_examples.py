"""Every help page ends with lines that can be typed as they stand."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from medmamba.cli.app import app
from medmamba.cli.examples import EXAMPLES, EXIT_CODES

CLI = Path(__file__).resolve().parents[2] / "cli"
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
LINES = [line for examples in EXAMPLES.values() for _, line in examples]


def find(words: list[str]):
    """The command that a line calls, its name, and what follows the name."""
    command, name = COMMANDS[words[0]], words[0]
    rest = words[1:]
    if hasattr(command, "commands") and rest[0] in command.commands:
        command, name, rest = command.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    return command, name, rest


def all_commands() -> list[str]:
    groups = [
        f"{name} {inner}"
        for name, group in COMMANDS.items()
        for inner in getattr(group, "commands", ())
    ]
    return [*COMMANDS, *groups]


@pytest.mark.parametrize("name", all_commands())
def test_every_command_shows_examples_of_itself(name):
    assert len(EXAMPLES[name]) >= 2
    for purpose, line in EXAMPLES[name]:
        assert purpose
        assert line == name or line.startswith(f"{name} ")
    page = (CLI / "help" / f"{name.replace(' ', '-')}.txt").read_text()
    assert all(f"medmamba {line}" in page for _, line in EXAMPLES[name])


def test_no_example_is_of_a_command_that_is_gone():
    assert EXAMPLES.keys() == set(all_commands())


@pytest.mark.parametrize("line", dict.fromkeys(LINES))
def test_examples_are_understood(line):
    command, _, rest = find(shlex.split(line))
    command.make_context("medmamba", rest)


def test_exit_codes_are_those_of_the_documentation():
    table = (CLI / "README.md").read_text().partition("## Exit codes")[2]
    documented = re.findall(r"^\| (\d[\d, ]*) \|", table, re.MULTILINE)
    assert list(EXIT_CODES) == documented
