"""compare(): networks and their twins under one split, budget and list of seeds."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from medmamba.errors import UsageError
from medmamba.evaluation.comparison import PairedComparison, Scores, compare_scores
from medmamba.evaluation.scores import mean_dice
from medmamba.files import RECORD_CONFIG, require_writable_folder, to_plain
from medmamba.networks.spec import Mixer
from medmamba.pipeline.apart import RunsApart
from medmamba.pipeline.contest import (
    Conditions,
    ContestResult,
    ContestRun,
    run_here,
    with_plan,
)
from medmamba.pipeline.recipes import SHORT_BUDGET_S, short_recipe
from medmamba.pipeline.side_by_side import processor_shares, run_contests
from medmamba.pipeline.work import check_network_name, choose_configuration, open_work

MIXERS: tuple[Mixer, ...] = get_args(Mixer)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A network that takes part.

    Args:
        name: in tables and pictures.
        changes: see ``ContestRun``.
        seeds: its own, instead of the common ones.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    network: str
    mixer: Mixer = "mamba"
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    @property
    def definition(self) -> tuple[str, str, str]:
        """What it computes, whatever it is called."""
        return (self.network, self.mixer, json.dumps(self.changes, sort_keys=True))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant with its finished runs.

    Args:
        cases: names of the rows that scores have, in order.
        scores: (S, C) mean Dice of each case and seed; over folds, cases follow each other.
    """

    contestant: Contestant
    runs: tuple[tuple[int, int, ContestResult], ...]
    cases: tuple[str, ...]
    scores: Scores

    @property
    def dice(self) -> float:
        """Mean over cases and seeds."""
        return float(self.scores.mean())


@dataclass(frozen=True, kw_only=True)
class CompareOutcome:
    """A finished comparison; the first entry is what the others are held against."""

    folder: Path
    conditions: Conditions
    folds: tuple[int, ...]
    entries: tuple[Entry, ...]
    pairs: tuple[PairedComparison, ...]
    command: str = ""


def compare(
    work: Path | str,
    networks: Sequence[str],
    output: Path | str,
    *,
    twins: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
    folds: Sequence[int] = (0,),
    configuration: str | None = None,
    recipe: str | None = None,
    epochs: int | None = None,
    iterations: int | None = None,
    max_time: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    jobs: int = 1,
    isolate: bool = True,
    command: str = "",
    on_message: Callable[[str], None] | None = None,
) -> CompareOutcome:
    """Train and score every network with every seed, and say which differences are real.

    Finished runs are kept: the same call goes on where it was interrupted.

    Args:
        work: folder in which all networks are planned.
        networks: ``NAME``, ``NAME:identity``, ``NAME:dwconv``, each with ``,key=value`` changes of
            recipe keys, ``features`` (a factor), ``options.<name>``, ``name`` or ``seeds`` (such
            as ``3/4/5``). The first is what the others are compared with. One alone is compared
            with itself, and one that occurs twice gets other seeds the second time.
        output: folder of the report and of the runs.
        twins: add the identity and the dwconv twin of each network that has Mamba layers.
        seeds: of weights, patches and augmentation; three at least for a claim.
        folds: whose validation cases are scored.
        configuration: of the plans; the preferred one when None.
        recipe: one for all; when None, the plan's where all are one network, else ``common``, or
            ``short`` for budgets of an hour or less.
        epochs: equal number for all.
        iterations: equal number per epoch for all.
        max_time: equal wall-clock seconds for all.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        jobs: runs at once, each on its own equal share of the processors.
        isolate: a process per run; False runs all in this one.
        command: shown in the report.
        on_message: called with what is done.

    Raises:
        UsageError: networks, seeds or options that cannot be compared.
        PlanError: a network is not planned, or does not fit the common patch.
        TrainingError: a run failed.
    """
    from medmamba.pipeline.comparison_report import write_report

    if max_time is not None and epochs is not None:
        raise UsageError("--max-time and --epochs exclude each other: give one of them.")
    shares = processor_shares(jobs if isolate else 1)
    contestants = _contestants(networks, tuple(seeds), twins=twins)
    place = open_work(Path(work))
    first = contestants[0].network
    branch = choose_configuration(place.load_plan(first), configuration)
    conditions = Conditions(
        work=place.folder.resolve(),
        configuration=branch,
        frame=first,
        recipe=recipe or _recipe(contestants, max_time),
        epochs=epochs,
        iterations=iterations,
        max_time_s=max_time,
        device=device,
        precision=precision,
    )
    folder = require_writable_folder(Path(output))
    runs = _list_runs(conditions, contestants, tuple(folds))
    apart = RunsApart()
    results = run_contests(
        runs, folder, shares, apart if isolate else run_here, on_message, stop=apart.stop
    )
    done = {
        one.name: [
            (run.fold, run.seed, result)
            for (owner, run), result in zip(runs, results, strict=True)
            if owner == one.name
        ]
        for one in contestants
    }
    entries = tuple(_entry(one, done[one.name], tuple(folds)) for one in contestants)
    reference = entries[0]
    pairs = tuple(
        compare_scores(
            reference.scores,
            entry.scores,
            same=entry.contestant.definition == reference.contestant.definition,
        )
        for entry in entries[1:]
    )
    outcome = CompareOutcome(
        folder=folder,
        conditions=conditions,
        folds=tuple(folds),
        entries=entries,
        pairs=pairs,
        command=command,
    )
    write_report(outcome)
    return outcome


def parse_contestant(text: str) -> Contestant:
    """Read ``NAME[:MIXER][,key=value...]``.

    Raises:
        UsageError: names what cannot be read.
    """
    head, *parts = text.split(",")
    network, _, mixer = head.partition(":")
    check_network_name(network)
    chosen = next((known for known in MIXERS if known == (mixer or "mamba")), None)
    if chosen is None:
        raise UsageError(f"'{head}': mixer '{mixer}' does not exist; one of {', '.join(MIXERS)}.")
    changes: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"'{text}': '{part}' is no key=value.")
        changes[key] = _value(value)
    seeds = str(changes.pop("seeds", ""))
    if seeds and not all(seed.isdecimal() for seed in seeds.split("/")):
        raise UsageError(f"'{text}': seeds '{seeds}' are no numbers such as 3/4/5.")
    name = str(changes.pop("name", "")) or ",".join(
        [head, *(f"{key}={value}" for key, value in changes.items())]
    )
    return Contestant(
        name=name,
        network=network,
        mixer=chosen,
        changes=changes,
        seeds=tuple(int(seed) for seed in seeds.split("/")) if seeds else (),
    )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _contestants(
    networks: Sequence[str], seeds: tuple[int, ...], *, twins: bool
) -> tuple[Contestant, ...]:
    if not networks or not seeds or len(set(seeds)) != len(seeds):
        raise UsageError("compare: at least one network and one seed are needed, no seed twice.")
    parsed = [parse_contestant(text) for text in networks]
    if twins:
        parsed = _with_twins(parsed)
    for one in parsed:
        if one.mixer != "mamba" and not _has_twins(one.network):
            raise UsageError(f"compare: {one.network} has no Mamba layers, and so no twin.")
    if len(parsed) == 1:
        return _against_itself(parsed[0], seeds)
    found: list[Contestant] = []
    for one in parsed:
        taken = [s for f in found if f.definition == one.definition for s in f.seeds]
        own = one.seeds or seeds
        if set(own) & set(taken):
            own = tuple(range(max(taken) + 1, max(taken) + 1 + len(own)))
        copies = sum(f.name == one.name for f in found)
        name = f"{one.name} (seeds {', '.join(map(str, own))})" if copies else one.name
        found.append(replace(one, name=name, seeds=own))
    if len({one.name for one in found}) != len(found):
        raise UsageError("compare: two networks have one name; give them name=... of their own.")
    return tuple(found)


def _with_twins(parsed: Sequence[Contestant]) -> list[Contestant]:
    if not any(_has_twins(one.network) for one in parsed):
        names = ", ".join(one.name for one in parsed)
        raise UsageError(f"compare --twins: no Mamba layers in {names}, and so no twins.")
    found = []
    for one in parsed:
        found.append(one)
        if _has_twins(one.network):
            found += [
                replace(one, name=f"{one.name}:{mixer}", mixer=mixer)
                for mixer in MIXERS
                if mixer != "mamba"
            ]
    return found


def _has_twins(network: str) -> bool:
    from medmamba.networks.registry import find_network

    return find_network(network).has_twins


def _against_itself(one: Contestant, seeds: tuple[int, ...]) -> tuple[Contestant, ...]:
    seeds = one.seeds or seeds
    if len(seeds) < 2:
        raise UsageError("compare: one network and one seed are nothing to compare.")
    return tuple(
        replace(one, name=f"{one.name} (seeds {', '.join(map(str, part))})", seeds=part)
        for part in (seeds[::2], seeds[1::2])
    )


def _recipe(contestants: Sequence[Contestant], max_time: float | None) -> str | None:
    from medmamba.training.precision import resolve_device

    on_cpu = resolve_device("auto").type == "cpu"
    names = {one.network for one in contestants}
    if len(names) == 1:
        return short_recipe(contestants[0].network, max_time, on_cpu=on_cpu)
    short = max_time is not None and max_time <= SHORT_BUDGET_S and on_cpu
    return "short" if short else "common"


def _list_runs(
    conditions: Conditions, contestants: Sequence[Contestant], folds: tuple[int, ...]
) -> list[tuple[str, ContestRun]]:
    """(name of the contestant, run) in the order in which they are done."""
    # Seeds outermost: what changes on the machine meanwhile meets all networks alike.
    rounds = max(len(one.seeds) for one in contestants)
    return [
        (
            one.name,
            with_plan(
                ContestRun(
                    conditions=conditions,
                    network=one.network,
                    mixer=one.mixer,
                    fold=fold,
                    seed=one.seeds[number],
                    changes=one.changes,
                )
            ),
        )
        for number in range(rounds)
        for fold in folds
        for one in contestants
        if number < len(one.seeds)
    ]


def _entry(
    contestant: Contestant,
    runs: Sequence[tuple[int, int, ContestResult]],
    folds: tuple[int, ...],
) -> Entry:
    by_run = {(fold, seed): result for fold, seed, result in runs}
    cases = [(fold, case) for fold in folds for case in by_run[fold, contestant.seeds[0]].dice]
    scores = [
        [mean_dice(by_run[fold, seed].dice[case].values()) for fold, case in cases]
        for seed in contestant.seeds
    ]
    return Entry(
        contestant=contestant,
        runs=tuple(runs),
        cases=tuple(case for _, case in cases),
        scores=np.array(scores, dtype=np.float64),
    )


def outcome_to_plain(outcome: CompareOutcome) -> dict[str, Any]:
    """Return everything but paths as JSON values."""
    conditions = to_plain(outcome.conditions)
    del conditions["work"]
    return {
        "command": outcome.command,
        "conditions": conditions,
        "folds": list(outcome.folds),
        "cases": list(outcome.entries[0].cases),
        "entries": [
            {
                **to_plain(entry.contestant),
                "dice": entry.dice,
                "dice_by_seed": entry.scores.mean(1).tolist(),
                "runs": [
                    {"fold": fold, "seed": seed, **to_plain(result)}
                    for fold, seed, result in entry.runs
                ],
            }
            for entry in outcome.entries
        ],
        "comparisons": [
            {
                "first": outcome.entries[0].contestant.name,
                "second": entry.contestant.name,
                **to_plain(pair),
            }
            for entry, pair in zip(outcome.entries[1:], outcome.pairs, strict=True)
        ],
    }
