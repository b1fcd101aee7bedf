"""``medmamba info RUN``: where a training run is, for people and as JSON."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmamba.cli.options import format_duration

if TYPE_CHECKING:
    from medmamba.pipeline.run_summary import RunSummary

STATUS = {
    "finished": "finished",
    "running": "running",
    "interrupted": "interrupted; --resume goes on from the latest checkpoint",
    "elsewhere": "unfinished; begun on another machine, where it may be running",
}


def print_run(folder: Path, *, as_json: bool) -> None:
    """Print what a run folder holds, and its model where there is one."""
    from medmamba.bundle import read_manifest
    from medmamba.cli.display import print_table
    from medmamba.cli.info import print_manifest
    from medmamba.files import to_json, to_plain
    from medmamba.pipeline.run_summary import summarize_run

    run = summarize_run(folder)
    manifest = read_manifest(folder) if "model" in run.files else None
    if as_json:
        model = None if manifest is None else to_plain(manifest)
        sys.stdout.write(to_json({**to_plain(run), "model": model}))
        return
    place = [run.network, run.configuration or "", f"fold {run.fold}" if run.fold else ""]
    title = " ".join(part for part in place if part)
    rows = [(key, value) for key, value in _rows(run) if value]
    print_table(f"Run {title}", ("key", "value"), rows, right_from=2)
    if manifest is not None:
        print_manifest(manifest)
    if run.status == "interrupted":
        words = [word for word in run.settings.get("command", []) if word != "--overwrite"]
        again = [*words[1:], *([] if "--resume" in words else ["--resume"])]
        print(f"next      medmamba {shlex.join(again)}")


def _rows(run: "RunSummary") -> list[tuple[str, str]]:
    planned = "?" if run.epochs_planned is None else str(run.epochs_planned)
    left = f", about {format_duration(run.remaining_s)} left" if run.remaining_s else ""
    settings = run.settings
    return [
        ("status", STATUS[run.status]),
        ("epochs", f"{run.epochs_done} of {planned} ({run.iterations} steps; {run.length})"),
        ("time", f"{format_duration(run.elapsed_s)}{left}"),
        ("loss", _pair(run, "loss", "+.4f")),
        ("validation loss", _pair(run, "validation_loss", "+.4f")),
        ("Dice of patches", _pair(run, "dice", ".4f")),
        ("smoothed Dice", _pair(run, "ema_dice", ".4f")),
        ("Dice by class", _scores(run.dice_per_class)),
        ("whole cases", _scores(run.whole_cases)),
        ("skipped steps", str(run.skipped_steps) if run.skipped_steps else ""),
        ("speed", _speed(run)),
        ("device", f"{settings.get('device', '?')}, {settings.get('precision', '?')}"),
        ("recipe", _recipe(settings)),
        ("started", run.started),
        *((name.replace("_", " "), path) for name, path in run.files.items()),
    ]


def _pair(run: "RunSummary", key: str, form: str) -> str:
    last, best = run.last.get(key), run.best.get(key)
    if last is None and best is None:
        return ""
    now = "-" if last is None else format(last, form)
    return now if best is None else f"{now}, best {best['value']:{form}} in epoch {best['epoch']}"


def _scores(dice: dict[str, float | None]) -> str:
    return ", ".join(
        f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in dice.items()
    )


def _speed(run: "RunSummary") -> str:
    if run.patches_per_s is None:
        return ""
    return f"{run.patches_per_s:.1f} patches/s, {run.memory_gb or 0:.1f} GB"


def _recipe(settings: dict[str, Any]) -> str:
    recipe = settings.get("recipe", {})
    parts = [
        f"{recipe.get('loss')}", f"{recipe.get('optimizer')} {recipe.get('learning_rate')}",
        f"{recipe.get('schedule')}", f"batch {settings.get('batch_size')}",
        f"augmentation {recipe.get('augmentation')}", f"seed {settings.get('seed')}",
    ]  # fmt: skip
    return ", ".join(parts)
