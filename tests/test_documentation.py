"""Links in the documentation lead somewhere, and commands it shows exist."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from medmamba.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build", "node_modules"} & set(path.relative_to(ROOT).parts)
)
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def shown_commands() -> list[tuple[str, str, str]]:
    """(page, command, rest of the line) for every command in code of the documentation."""
    found = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        text = page.read_text()
        code = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
        for block in code:
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"\s*(?:\$ )?(medmamba )?([a-z][a-z-]*)( .*|$)", line)
                # `train --resume` in a sentence is a command too.
                if match and (match[1] or (match[2] in COMMANDS and " --" in match[3])):
                    found.append((str(page.relative_to(ROOT)), match[2], match[3]))
    return found


@pytest.mark.parametrize(("page", "command", "rest"), shown_commands())
def test_commands_and_options_exist(page: str, command: str, rest: str) -> None:
    assert command in COMMANDS, f"{page}: medmamba {command}"
    chosen = COMMANDS[command]
    first = rest.split()[0] if rest.split() else ""
    if hasattr(chosen, "commands") and first in chosen.commands:
        chosen = chosen.commands[first]
    options = {name for item in chosen.params for name in (*item.opts, *item.secondary_opts)} | {
        "--help",
        "-h",
        "--debug",
    }
    used = re.findall(r"(?<![\w-])(--?[a-z][a-z0-9-]*)", rest.split("#")[0])
    assert not [name for name in used if name not in options], f"{page}: medmamba {command}{rest}"
