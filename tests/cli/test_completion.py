"""The shell completes commands, options and the names of networks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPLETIONS = Path(__file__).resolve().parents[2] / "cli" / "completions"
TOOLS = str(Path(sys.executable).parent)


def bash(script: str, home: Path) -> str:
    environment = {**os.environ, "HOME": str(home), "PATH": f"{TOOLS}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def completed(words: str, home: Path) -> list[str]:
    """What bash offers for the last of the words, by the script of the repository."""
    script = f"""
    source {COMPLETIONS / "medmamba.bash"}
    COMP_WORDS=({words}) COMP_CWORD=$(( $(set -- {words}; echo $#) - 1 ))
    _medmamba_completion medmamba
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return bash(script, home).split()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_up_to_date(shell, tmp_path):
    printed = bash(f"_MEDMAMBA_COMPLETE=source_{shell} medmamba", tmp_path)
    assert printed == (COMPLETIONS / f"medmamba.{shell}").read_text(), "run `make golden`"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("medmamba pre", ["preprocess", "predict"]),
        ("medmamba convert import-n", ["import-nnunet"]),
        ("medmamba train --max", ["--max-time"]),
        ("medmamba plan data --network umamba_e", ["umamba_enc", "umamba_enc_v1"]),
        ("medmamba train work --recipe sho", ["short"]),
        ("medmamba predict --device cu", ["cuda"]),
    ],
)
def test_bash_completes(words, offered, tmp_path):
    assert sorted(completed(words, tmp_path)) == sorted(offered)


def test_it_can_be_installed(tmp_path):
    # The shell that calls is the one that is set up, so it must outlive the call.
    bash("medmamba --install-completion; true", tmp_path)
    script = "source ~/.bashrc; complete -p medmamba"
    assert "_medmamba_completion" in bash(script, tmp_path)
