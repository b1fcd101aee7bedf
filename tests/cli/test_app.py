"""The command line as a user meets it: help, exit codes, one line per error, nothing partial."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "import sys; from medmamba.cli.app import main; sys.exit(main())"
HELP_PAGES = Path(__file__).resolve().parents[2] / "cli" / "help"
HEAVY = ("torch", "monai", "nibabel", "SimpleITK", "matplotlib", "scipy", "skimage")


def medmamba(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "100", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip


def one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error ["), result.stderr
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("page", sorted(HELP_PAGES.glob("*.txt")), ids=lambda page: page.stem)
def test_help_pages_are_up_to_date(page):
    # A command of a group has the page "group-command"; its own name may hold more hyphens.
    arguments = [] if page.stem == "medmamba" else page.stem.split("-", 1)
    assert medmamba(*arguments, "--help").stdout == page.read_text(), "run `make golden`"


def test_every_command_has_a_help_page():
    from medmamba.cli.app import app

    names = {command.callback.__name__ for command in app.registered_commands}
    for group in app.registered_groups:
        name = group.typer_instance.info.name
        commands = group.typer_instance.registered_commands
        names |= {name} | {f"{name}-{command.name}" for command in commands}
    assert names | {"medmamba"} == {page.stem for page in HELP_PAGES.glob("*.txt")}


def test_help_imports_nothing_heavy():
    check = (
        "import sys; sys.argv = ['medmamba', '--help']\n"
        "from medmamba.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert result.stderr.strip() == "[]"


def test_unknown_command_and_option_are_usage_errors():
    assert medmamba("segment").returncode == 2
    assert medmamba("plan", "--nonsense").returncode == 2


def test_unknown_network_names_those_that_exist(ellipsoids, tmp_path):
    result = medmamba("plan", ellipsoids, "-o", tmp_path / "work", "-n", "unet9000")
    assert result.returncode == 2
    one_line_error(result, "unet9000", "lightm_unet_s", "plain_unet")
    assert not (tmp_path / "work").exists()


def test_a_folder_that_is_no_dataset(tmp_path):
    result = medmamba("plan", tmp_path, "-o", tmp_path / "work")
    assert result.returncode == 3
    one_line_error(result, str(tmp_path), "dataset.json")


def test_every_problem_of_a_dataset_is_listed_at_once(ellipsoids, tmp_path):
    (ellipsoids / "labelsTr" / "case_001.nii.gz").unlink()
    broken = ellipsoids / "imagesTr" / "case_002_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    shutil.copy(
        ellipsoids / "imagesTr" / "case_003_0000.nii.gz",
        ellipsoids / "imagesTr" / "case_003_0001.nii.gz",
    )
    result = medmamba("plan", ellipsoids, "-o", tmp_path / "work")
    assert result.returncode == 3
    for case in ("case_001", "case_002", "case_003"):
        assert f"case {case}" in result.stderr
    report = json.loads((tmp_path / "work" / "verification.json").read_text())
    fatal = {entry["case"] for entry in report["problems"] if entry["severity"] == "fatal"}
    assert {"case_001", "case_002", "case_003"} <= fatal
    assert not (tmp_path / "work" / "plans").exists()
    assert not (tmp_path / "work" / "preprocessed").exists()


def test_training_without_a_plan_names_the_command(tmp_path):
    result = medmamba("train", tmp_path)
    assert result.returncode == 3
    one_line_error(result, "medmamba plan")


def test_a_model_folder_without_weights(ellipsoids, tmp_path):
    result = medmamba(
        "predict", "-i", ellipsoids / "imagesTs", "-o", tmp_path / "out", "-m", tmp_path
    )
    assert result.returncode == 3
    one_line_error(result, str(tmp_path), "manifest.json")
    assert not (tmp_path / "out").exists()


def test_durations_must_be_understood(ellipsoids):
    result = medmamba("train", ellipsoids, "--max-time", "soon")
    assert result.returncode == 2
    one_line_error(result, "soon", "20m")


def test_an_output_below_a_file(ellipsoids, tmp_path):
    (tmp_path / "file").write_text("")
    result = medmamba("plan", ellipsoids, "-o", tmp_path / "file" / "work")
    assert result.returncode == 6
    one_line_error(result, "file")


def test_doctor_prints_one_json_document():
    result = medmamba("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["fit"] else 6)
    topics = {finding["topic"] for finding in report["findings"]}
    assert {"medmamba", "CPU", "GPU", "scan native", "scan reference"} <= topics


def test_a_cache_folder_that_cannot_be_used_makes_the_machine_unfit(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDMAMBA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = medmamba("doctor", "--quick")
    assert result.returncode == 6
    assert "not writable" in result.stdout
    monkeypatch.setenv("MEDMAMBA_CACHE_DIR", str(tmp_path / "cache"))
    assert medmamba("doctor", "--quick").returncode == 0


def test_version():
    assert medmamba("--version").stdout.startswith("medmamba 0.")


def test_a_closed_pipe_is_no_error():
    command = f'{sys.executable} -c "{PROGRAM}" doctor --json | head -c 1'
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in result.stderr
    assert "error" not in result.stderr


def test_an_error_that_nobody_can_hear_keeps_its_exit_code(tmp_path):
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "medmamba", "evaluate", tmp_path / "none", tmp_path / "none"],
            stderr=full,
            check=False,
        )
    heard = medmamba("evaluate", tmp_path / "none", tmp_path / "none")
    assert result.returncode == heard.returncode != 0


def test_a_bug_leaves_its_traceback_in_a_file(tmp_path, monkeypatch, capsys):
    from medmamba.cli import app

    def fail(arguments: list[str], **named: str) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(sys, "argv", ["medmamba", "plan"])
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 1
    text = capsys.readouterr().err
    log = Path(text.split("traceback is in ")[1].split(" (")[0])
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()
