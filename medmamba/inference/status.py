"""How far the runs on an output folder are, from journals and records alone. No torch.

A record says that a case is decided; the journals say as what, when, and how many cases there are.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from medmamba.errors import UsageError
from medmamba.files import RECORD_CONFIG
from medmamba.inference.history import DECIDED, events, run_folders
from medmamba.inference.journal import is_live
from medmamba.inference.records import DONE, read_record, records_folder

LAST_ERRORS = 10


@dataclass(frozen=True, kw_only=True)
class LastError:
    """A case without a mask, and when that was found."""

    __pydantic_config__ = RECORD_CONFIG

    case_id: str
    code: str
    time: str


@dataclass(frozen=True, kw_only=True)
class ShardState:
    """What is known of one share of the work.

    Args:
        index: of the share, from 0.
        state: ``ended`` when its last run worked through all of its cases.
        run_id: its last run; empty without one.
        cases: of the share; None where no run has said.
        exit_code: of the last run; None while it runs, or when it was killed.
    """

    __pydantic_config__ = RECORD_CONFIG

    index: int
    state: str
    run_id: str = ""
    cases: int | None = None
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True)
class FolderStatus:
    """Cases of an output folder by what became of them.

    Args:
        folder: the output folder.
        total: cases asked for by the last runs; None where nobody knows.
        done: cases that have a mask.
        with_warnings: of these, how many have warnings.
        rejected: cases whose input cannot be trusted.
        failed: cases that could not be done.
        pending: cases of the total that are not decided.
        runs: runs so far.
        running: runs that go on now.
        cases_per_hour: decided by the runs that go on, or by the last one; None before the first.
        eta_s: seconds until all are decided, while a run goes on.
        errors: error code -> cases.
        last_errors: the newest first.
        shards: where the last run was a share, all shares of its count.
    """

    __pydantic_config__ = RECORD_CONFIG

    folder: str
    total: int | None
    done: int
    with_warnings: int
    rejected: int
    failed: int
    pending: int | None
    runs: int
    running: int
    cases_per_hour: float | None
    eta_s: float | None
    errors: dict[str, int]
    last_errors: tuple[LastError, ...]
    shards: tuple[ShardState, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _RunState:
    """What the journals of one run say of it."""

    run_id: str
    live: bool
    cases: int | None
    shard: str
    exit_code: int | None
    decided: int
    worked: int
    begun: float
    last: float


def folder_status(folder: Path) -> FolderStatus:
    """Sum up an output folder.

    Raises:
        UsageError: nobody has predicted there.
    """
    named, folder = folder, records_folder(folder)
    runs = run_folders(folder)
    if not runs:
        raise UsageError(f"{named}: holds no run. Give a folder that `medmamba predict` wrote.")
    known: dict[str, tuple[str, str]] = {}
    errors: deque[LastError] = deque(maxlen=LAST_ERRORS)
    states = [_read_run(path, known, errors) for path in runs]
    counts: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    for case_id in _recorded(folder):
        status, code = known.get(case_id) or _from_record(folder / f"{case_id}.json")
        counts[status] += 1
        if code:
            codes[code] += 1
    shards = shard_states(states)
    total = _total(states[-1], shards)
    done = sum(counts[status] for status in DONE)
    decided = done + counts["rejected"] + counts["failed"]
    pending = None if total is None else max(0, total - decided)
    running = [state for state in states if state.live]
    rate = _rate(running or states[-1:])
    return FolderStatus(
        folder=str(named),
        total=total,
        done=done,
        with_warnings=counts["ok_with_warnings"],
        rejected=counts["rejected"],
        failed=counts["failed"],
        pending=pending,
        runs=len(states),
        running=len(running),
        cases_per_hour=None if rate is None else round(3600 * rate, 3),
        eta_s=pending / rate if rate and pending is not None and running else None,
        errors=dict(sorted(codes.items(), key=lambda item: (-item[1], item[0]))),
        last_errors=tuple(
            error
            for error in sorted(errors, key=lambda item: item.time, reverse=True)
            if known[error.case_id][1] == error.code  # not mended since
        ),
        shards=shards,
    )


def run_shards(folder: Path, count: int) -> tuple[ShardState, ...]:
    """Return what is known of every one of ``count`` shares."""
    nothing: dict[str, tuple[str, str]] = {}
    runs = run_folders(records_folder(folder))
    states = [_read_run(path, nothing, deque(maxlen=1)) for path in runs]
    return _shards_of(states, count)


def shard_states(states: list[_RunState]) -> tuple[ShardState, ...]:
    """Return the shares that the last run is one of; empty when it took all cases."""
    _, _, count = states[-1].shard.partition("/")
    return _shards_of(states, int(count)) if count else ()


def _shards_of(states: list[_RunState], count: int) -> tuple[ShardState, ...]:
    last = {state.shard: state for state in states}  # the newest of each
    return tuple(_shard(index, last.get(f"{index}/{count}")) for index in range(count))


def _shard(index: int, state: _RunState | None) -> ShardState:
    if state is None:
        return ShardState(index=index, state="missing")
    if state.exit_code in (0, 4, 5):
        name = "ended" if state.cases is not None and state.decided >= state.cases else "stopped"
    elif state.exit_code is not None:
        name = "stopped"
    else:
        name = "running" if state.live else "killed"
    return ShardState(
        index=index, state=name, run_id=state.run_id, cases=state.cases, exit_code=state.exit_code
    )


def _read_run(path: Path, known: dict[str, tuple[str, str]], errors: deque[LastError]) -> _RunState:
    """Go through the journals of a run; ``known`` and ``errors`` take up what it decided."""
    started: dict[str, Any] = {}
    exit_code: int | None = None
    begun = last = 0.0
    worked = 0
    seen: set[str] = set()
    for event in events(path):
        kind = event["event"]
        if kind == "started":
            started, begun = event, _seconds(event)
        elif kind == "ended":
            exit_code = event.get("exit_code")
        elif kind in DECIDED:
            case_id = str(event.get("case"))
            seen.add(case_id)
            if kind == "skipped":
                continue
            code = str(event.get("error", ""))
            known[case_id] = (kind, code)
            worked += 1
            last = max(last, _seconds(event))
            if code:
                errors.append(LastError(case_id=case_id, code=code, time=event.get("time", "")))
    return _RunState(
        run_id=path.name,
        live=exit_code is None and is_live(path),
        cases=started.get("cases"),
        shard=str(started.get("shard", "")),
        exit_code=exit_code,
        decided=len(seen),
        worked=worked,
        begun=begun,
        last=last,
    )


def _rate(states: list[_RunState]) -> float | None:
    """Cases a second, of runs side by side."""
    worked = [state for state in states if state.last > state.begun > 0]
    if not worked:
        return None
    return sum(state.worked / (state.last - state.begun) for state in worked)


def _total(last: _RunState, shards: tuple[ShardState, ...]) -> int | None:
    if not shards:
        return last.cases
    known = [shard.cases for shard in shards]
    return None if None in known else sum(cases or 0 for cases in known)


def _recorded(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                yield entry.name.removesuffix(".json")


def _from_record(path: Path) -> tuple[str, str]:
    """What a record says of a case that no journal speaks of any more."""
    record = read_record(path)
    if record is None:
        return "", ""
    return record.status, record.error.code if record.error else ""


def _seconds(event: dict[str, Any]) -> float:
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return 0.0
