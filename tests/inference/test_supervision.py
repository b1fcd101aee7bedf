"""What a run does when its worker process dies, hangs, cannot start or is not wanted any more."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import MODEL, ThresholdPredictor, assign, image, predict_cases, tree

from medmamba.dataset import Rejection
from medmamba.errors import BundleError, EnvironmentFault
from medmamba.inference import supervision
from medmamba.inference.assignment import PredictionRun
from medmamba.inference.draining import DrainRequest, drain_on_signals
from medmamba.inference.supervision import predict_supervised
from medmamba.inference.worker import WorkerSetup
from medmamba.inference.worker_process import WorkerProcess

COMMAND = [sys.executable, str(Path(__file__).parent / "fake_worker.py")]


def run_fake(
    folder: Path,
    names: str = "abcd",
    *,
    drain: DrainRequest | None = None,
    grace_s: float = 20.0,
    orders: dict[str, str] | None = None,
    starts: list[int] | None = None,
    **options: Any,
) -> PredictionRun:
    """Predict cases a, b, ... (marks 0, 1, ...) in fake workers that obey ``orders`` by mark."""
    cases = [image(folder / "in", name, mark=i, seed=i) for i, name in enumerate(names)]
    setup = WorkerSetup(
        folder=folder / "out", model=MODEL, grace_s=grace_s,
        options={"spent": str(folder / "spent"), **(orders or {})},
    )  # fmt: skip

    def start() -> WorkerProcess:
        if starts is not None:
            starts.append(1)
        return WorkerProcess(COMMAND)

    return predict_supervised(
        assign(cases, options), setup, start, drain or DrainRequest(grace_s), **options
    )


def undisturbed(folder: Path, names: str = "abcd") -> dict[str, str]:
    cases = [image(folder / "in", name, mark=i, seed=i) for i, name in enumerate(names)]
    predict_cases(cases, folder / "alone", ThresholdPredictor(), model=MODEL)
    return tree(folder / "alone")


def statuses(run: PredictionRun) -> dict[str, str]:
    return {
        record.case_id: record.error.code if record.error else record.status
        for record in run.records
    }


def events(run: PredictionRun) -> list[str]:
    journal = run.folder / "run" / run.run_id / "journal-0.jsonl"
    return [json.loads(line)["event"] for line in journal.read_text().splitlines()]


def test_a_worker_gives_the_same_files_as_one_process(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    said: list[dict[str, Any]] = []
    bad = Rejection(id="z", code="E_PATH_UNSAFE", message="unsafe name")
    run = run_fake(
        tmp_path,
        rejected=[bad],
        on_case=lambda record, done, total, _: seen.append((record.case_id, done, total)),
        on_ready=said.append,
    )
    assert said == [{"settings": "as a fake"}]
    assert (run.exit_code, run.succeeded, run.total) == (4, 4, 5)
    assert seen == [("z", 1, 5), ("a", 2, 5), ("b", 3, 5), ("c", 4, 5), ("d", 5, 5)]
    (tmp_path / "out" / "z.json").unlink()
    assert tree(tmp_path / "out") == undisturbed(tmp_path)
    assert not list((tmp_path / "out").glob("run/*/running"))
    starts: list[int] = []
    again = run_fake(tmp_path, starts=starts)
    assert set(statuses(again).values()) == {"skipped"}
    assert len(starts) == 1


def test_a_case_that_kills_its_worker_costs_no_other(tmp_path: Path) -> None:
    starts: list[int] = []
    run = run_fake(tmp_path, orders={"1": "kill"}, starts=starts)
    assert statuses(run) == {"a": "ok", "b": "E_WORKER_DIED", "c": "ok", "d": "ok"}
    assert run.exit_code == 4
    assert len(starts) == 3, "one for all, one for the suspect, one for the rest"
    (error,) = [record.error for record in run.records if record.error]
    assert "SIGKILL" in error.message
    assert error.stage == "infer"
    assert events(run).count("worker_died") == 2
    (tmp_path / "out" / "b.json").unlink()
    whole = undisturbed(tmp_path)
    assert tree(tmp_path / "out") == {n: h for n, h in whole.items() if not n.startswith("b.")}
    # The same again: what is done is kept, the one that failed is tried again.
    assert statuses(run_fake(tmp_path)) == {
        "a": "skipped",
        "b": "ok",
        "c": "skipped",
        "d": "skipped",
    }
    assert tree(tmp_path / "out") == whole


def test_a_worker_that_dies_once_is_replaced_unnoticed(tmp_path: Path) -> None:
    begun = time.monotonic()
    run = run_fake(tmp_path, orders={"2": "once exit"})
    assert set(statuses(run).values()) <= {"ok", "skipped"}
    assert run.exit_code == 0
    assert tree(tmp_path / "out") == undisturbed(tmp_path)
    assert time.monotonic() - begun < 30


def test_a_worker_that_would_compute_otherwise_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new worker must not go on with other parameters, or another version, than the run began."""
    with pytest.raises(EnvironmentFault, match="level 70") as caught:
        run_fake(tmp_path, orders={"2": "once exit", "load": "drift"})
    assert caught.value.code == "E_VERSION_MIXED"
    monkeypatch.setattr(supervision, "__version__", "0.0.0")
    with pytest.raises(EnvironmentFault, match="medmamba"):
        run_fake(tmp_path)


def test_a_case_that_hangs_is_given_up_in_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    run = run_fake(tmp_path, orders={"1": "hang"}, timeout_s=1.0)
    assert time.monotonic() - begun < 30
    assert statuses(run) == {"a": "ok", "b": "E_TIMEOUT", "c": "ok", "d": "ok"}
    assert events(run).count("timeout") == 1


@pytest.mark.slow
def test_waiting_for_the_network_does_not_count(tmp_path: Path) -> None:
    orders = {str(mark): "slow 0.7" for mark in range(4)}
    run = run_fake(tmp_path, orders=orders, timeout_s=1.3)
    assert set(statuses(run).values()) == {"ok"}


@pytest.mark.slow
def test_a_case_without_progress_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "STALL_S", 1.0)
    run = run_fake(tmp_path, "ab", orders={"1": "hang"})
    assert statuses(run) == {"a": "ok", "b": "E_TIMEOUT"}


def test_a_read_that_never_ends_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDMAMBA_FAILPOINTS", "before_case:b=sleep")
    run = run_fake(tmp_path, timeout_s=1.0)
    assert statuses(run) == {"a": "ok", "b": "E_TIMEOUT", "c": "ok", "d": "ok"}
    (error,) = [record.error for record in run.records if record.error]
    assert error.stage == "read"


def test_host_memory_running_out_is_tried_once_more_alone(tmp_path: Path) -> None:
    run = run_fake(tmp_path, orders={"1": "memory", "2": "once memory"})
    assert statuses(run) == {"a": "ok", "b": "E_MEM_HOST", "c": "ok", "d": "ok"}
    assert len(run.records) == 4


@pytest.mark.slow
def test_a_worker_that_lost_its_device_is_replaced(tmp_path: Path) -> None:
    starts: list[int] = []
    run = run_fake(tmp_path, orders={"1": "once device", "2": "device"}, starts=starts)
    assert statuses(run) == {"a": "ok", "b": "ok", "c": "E_WORKER_DIED", "d": "ok"}
    (error,) = [record.error for record in run.records if record.error]
    assert "lost its device" in error.message
    assert len(starts) > 2


@pytest.mark.parametrize(
    ("order", "kind", "text"),
    [
        ("die", EnvironmentFault, "dies while it loads"),
        ("broken", BundleError, "weights are missing"),
        ("bug", RuntimeError, "a bug"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_run(
    tmp_path: Path, order: str, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        run_fake(tmp_path, orders={"load": order})
    assert not list((tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("run/*/running"))


@pytest.mark.slow
def test_failures_can_be_limited(tmp_path: Path) -> None:
    orders = {str(mark): "exit" for mark in range(6)}
    run = run_fake(tmp_path, "abcdef", orders=orders, max_failures=2)
    assert list(statuses(run).values()) == ["E_WORKER_DIED"] * 2
    assert run.exit_code == 5


@pytest.mark.parametrize("orders", [{"load": "hang"}, {"1": "hang"}])
def test_a_signal_ends_the_run_within_the_grace_period(
    tmp_path: Path, orders: dict[str, str]
) -> None:
    stopped: list[float] = []

    def stop(*_: object) -> None:
        stopped.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    loads = "load" in orders
    if loads:
        threading.Timer(2.0, stop).start()
    with drain_on_signals(1.0) as drain:
        run = run_fake(
            tmp_path, orders=orders, drain=drain, grace_s=1.0, on_case=None if loads else stop
        )
    assert len(stopped) == 1
    assert time.monotonic() - stopped[0] < 10
    assert run.exit_code == 143
    assert not list((tmp_path / "out").glob(".mm-tmp*"))
    done = {record.case_id for record in run.records}
    assert done == (set() if "load" in orders else {"a"})
    assert set(statuses(run_fake(tmp_path)).values()) <= {"ok", "skipped"}
    assert tree(tmp_path / "out") == undisturbed(tmp_path)


@pytest.mark.slow
def test_a_case_nearly_done_is_finished_after_a_signal(tmp_path: Path) -> None:
    timer = threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with drain_on_signals(20.0) as drain:
        run = run_fake(tmp_path, orders={"0": "slow 4"}, drain=drain)
    assert run.exit_code == 130
    assert statuses(run) == {"a": "ok"}


def test_a_worker_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    import subprocess

    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nfrom test_supervision import run_fake\n"
        f"run_fake(Path({str(tmp_path)!r}), orders={{'0': 'hang'}}, "
        "on_ready=lambda about: print('ready', flush=True))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.is_file():
        parent.kill()
        pytest.skip("the system does not tell of children")
    (child,) = children.read_text().split()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":
            return
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
