"""The door to Ray: meeting a cluster, and running jobs on it until all have ended.

Whether a job is run again is decided here, not by Ray: a process or machine that was lost is not
the job's fault and the job goes on elsewhere; an error that the job raised is final.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from medmamba.errors import EnvironmentFault

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = ("local", "ray")

LOSSES_ALLOWED = 3
"""Processes a job may lose before it is taken for the cause."""

POLL_S = 1.0
STOP_S = 60.0
"""How long jobs that are told to stop may take to save."""

LOCAL = "local"
"""Address that stands for a cluster made of this machine alone, for the time of the call."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one job takes of a machine."""

    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended: with a value, or with a message saying why there is none."""

    value: Any = None
    problem: str = ""
    losses: int = 0


@contextmanager
def ray_cluster(address: str | None) -> Iterator[ModuleType]:
    """Join a running cluster.

    Args:
        address: of its head; the one ``RAY_ADDRESS`` or this machine knows when None; ``local``
            starts one on this machine.

    Raises:
        EnvironmentFault: Ray is not installed, or there is no cluster.
    """
    # Read when Ray is imported; nothing leaves the machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # noqa: TID251
    except ImportError as error:
        raise EnvironmentFault(
            "engine 'ray': Ray is not installed. Install it with `pip install medmamba[ray]`.",
            code="E_NO_RAY",
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        ray.init(address=address or "auto", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentFault(
            f"engine 'ray': no cluster at address '{address or 'auto'}' ({error}). Start one with "
            "`ray start --head` and join machines to it, or use --address local.",
            code="E_NO_CLUSTER",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_jobs(
    ray: ModuleType,
    jobs: Mapping[str, Callable[[int], Any]],
    *,
    needs: Needs,
    stopping: Callable[[], bool],
    on_poll: Callable[[], None],
    on_event: Callable[[str], None],
) -> dict[str, Ended]:
    """Run every job, each in a process of its own.

    Args:
        ray: from ``ray_cluster``.
        jobs: name -> function of the number of processes lost before; it must be importable
            where it runs.
        needs: of each job.
        stopping: asked now and then; once true, jobs are interrupted and waited for.
        on_poll: called now and then while waiting.
        on_event: called with what happened to a job.

    Returns:
        How each ended; those that had not begun when it was stopped are left out.
    """
    remote = ray.remote(_call).options(
        max_retries=0, num_cpus=needs.cpus, num_gpus=needs.gpus, name="medmamba"
    )
    losses = dict.fromkeys(jobs, 0)
    running = {remote.remote(job, 0): name for name, job in jobs.items()}
    ended: dict[str, Ended] = {}
    while running:
        if stopping():
            _interrupt(ray, running)
            return ended
        ready, _ = ray.wait(list(running), timeout=POLL_S)
        on_poll()
        for reference in ready:
            name = running.pop(reference)
            try:
                ended[name] = Ended(value=ray.get(reference), losses=losses[name])
            except ray.exceptions.RayTaskError as error:
                ended[name] = Ended(problem=str(error), losses=losses[name])
            except ray.exceptions.RayError as error:
                losses[name] += 1
                what = f"{name}: its process was lost ({type(error).__name__})"
                if losses[name] > LOSSES_ALLOWED:
                    ended[name] = Ended(problem=f"{what} {losses[name]} times", losses=losses[name])
                    continue
                on_event(f"{what}; it goes on elsewhere from what it saved")
                running[remote.remote(jobs[name], losses[name])] = name
    return ended


def largest_node(ray: ModuleType) -> Needs:
    """Return what the machine with most of everything offers."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Needs(
        cpus=max((found.get("CPU", 0.0) for found in resources), default=0.0),
        gpus=max((found.get("GPU", 0.0) for found in resources), default=0.0),
    )


def _call(job: Callable[[int], Any], losses: int) -> Any:
    return job(losses)


def _interrupt(ray: ModuleType, running: Mapping[Any, str]) -> None:
    for reference in running:
        # Raises KeyboardInterrupt where it runs, as Ctrl-C does.
        ray.cancel(reference, force=False)
    ray.wait(list(running), num_returns=len(running), timeout=STOP_S)
