"""What clusters are given: files that parse, call commands that exist, follow the exit codes."""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from medmamba.cli.app import app
from medmamba.dataset.shards import Shard, parse_shard

DOCKER = Path(__file__).resolve().parent.parent / "docker"
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
NOT_TO_BE_REPEATED = {2, 3, 7}
ABOUT_CASES = {4, 5}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((DOCKER / name).read_text())


def understood(arguments: list[str]) -> None:
    COMMANDS[arguments[0]].make_context("medmamba", list(arguments[1:]))


def test_the_kubernetes_job_repeats_what_can_be_mended_by_that() -> None:
    spec = load("k8s-job.yaml")["spec"]
    assert spec["completionMode"] == "Indexed"
    rules = spec["podFailurePolicy"]["rules"]
    by_action = {
        rule["action"]: set(rule["onExitCodes"]["values"])
        for rule in rules
        if "onExitCodes" in rule
    }
    assert by_action == {"FailJob": NOT_TO_BE_REPEATED, "FailIndex": ABOUT_CASES}
    names = {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule}
    assert names == {container["name"] for container in spec["template"]["spec"]["containers"]}
    # Kubernetes accepts a job with these rules only if a pod is never restarted in place.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_the_kubernetes_job_runs_hardened_and_shares_the_cases_out() -> None:
    job = load("k8s-job.yaml")["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    arguments = container["args"]
    understood(arguments)
    shard = parse_shard(arguments[arguments.index("--shard") + 1], {"JOB_COMPLETION_INDEX": "3"})
    assert shard == Shard(index=3, count=job["completions"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_slurm_array_parses_and_calls_a_command_that_exists() -> None:
    script = DOCKER / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    (line,) = re.findall(r"^exec medmamba (.*)$", script.read_text(), re.MULTILINE)
    understood(shlex.split(line))


def test_the_compose_service_watches_hardened() -> None:
    (service,) = load("compose.yaml")["services"].values()
    assert service["read_only"] is True
    assert service["network_mode"] == "none"
    assert service["cap_drop"] == ["ALL"]
    assert service["user"] == "${MEDMAMBA_USER:-10001:10001}"
    assert service["healthcheck"]["test"][:2] == ["CMD", "medmamba"]
    understood(service["healthcheck"]["test"][2:])
    command = [text.replace("${MEDMAMBA_SETTLE:-10}", "10") for text in service["command"]]
    understood(command)
    writable = {entry["target"] for entry in service["volumes"] if not entry.get("read_only")}
    assert writable == {command[2]} == {"/out"}


@pytest.mark.parametrize("name", ["check.sh", "entrypoint.sh", "slurm_check.sh"])
def test_scripts_of_the_image_parse(name: str) -> None:
    subprocess.run(["bash", "-n", DOCKER / name], check=True)


def test_the_image_ends_as_another_user_than_root() -> None:
    stages = re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    last = {
        stage.split()[2]: re.findall(r"^USER (\d+)", stage, re.MULTILINE)
        for stage in stages
        if " AS " in stage
    }
    assert last["runtime"][-1] == "10001"
    assert last["cuda"][-1] == "10001"
    assert last["cpu"] == []


@pytest.fixture
def entry_point():
    """The image's entry point, with a program that shows what it was called with."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        place = Path(folder)
        place.chmod(0o755)
        shutil.copy(DOCKER / "entrypoint.sh", place)
        (place / "medmamba").write_text('#!/bin/sh\necho "$(umask) $*"\n')
        (place / "medmamba").chmod(0o755)

        def run(*arguments: str, user: int) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                ["/bin/sh", place / "entrypoint.sh", *arguments],
                capture_output=True, text=True, check=False, cwd="/",
                user=user if os.geteuid() == 0 else None, env={"PATH": f"{place}:/usr/bin:/bin"},
            )  # fmt: skip

        yield run


def test_the_image_runs_for_any_user_and_shows_masks_to_nobody_else(entry_point) -> None:
    result = entry_point("predict", "-i", "/in", user=12345)
    assert (result.returncode, result.stdout) == (0, "0077 predict -i /in\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be refused for being root")
def test_the_image_refuses_root_unless_told_otherwise(entry_point) -> None:
    result = entry_point("predict", user=0)
    assert result.returncode == 6
    assert "root" in result.stderr
    assert entry_point("--allow-root", "predict", user=0).stdout == "0077 predict\n"
