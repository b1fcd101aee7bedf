"""The card of a bundle: what a person reads before using a model."""

from typing import Any

from medmamba.bundling.manifest import Manifest


def render_card(manifest: Manifest) -> str:
    """Return the card as Markdown: what the model is, its scores, how it came to be, its limits."""
    labels = ", ".join(
        f"{entry.name} ({'+'.join(str(value) for value in entry.values)})"
        for entry in manifest.labels
    )
    folds = ", ".join(entry.fold for entry in manifest.weights)
    kind = f"folds {folds}" if folds else f"an ensemble of {len(manifest.members)} networks"
    lines = [
        f"# {manifest.name}",
        "",
        f"**{manifest.intended_use}**",
        "",
        f"- Network: {manifest.network}, configuration {manifest.configuration}, {kind}",
        f"- Image channels: {', '.join(manifest.channels)}",
        f"- Labels: {labels}",
        f"- Postprocessing: {manifest.postprocessing or 'none'}",
        f"- Scores measured in: {manifest.precision}",
        f"- Licence of the weights: {manifest.licence}",
        f"- Written by medmamba {manifest.medmamba_version}",
        "",
        "## Scores",
        "",
        *(_items(manifest.scores) or ["None were measured."]),
        "",
        "## How it was trained",
        "",
        *(_items(manifest.training) or ["Not recorded."]),
        "",
        "## Limits",
        "",
        "Scores hold for data like the training data. On other scanners, protocols or patients the "
        "model may fail without a sign of it; check masks by eye. `medmamba verify MODEL` repeats "
        "a reference case that is stored with the weights.",
    ]
    return "\n".join(lines) + "\n"


def _items(values: dict[str, Any], depth: int = 0) -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * depth}- {key}:", *_items(value, depth + 1)]
        else:
            lines.append(f"{'  ' * depth}- {key}: {_text(value)}")
    return lines


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return "-" if value is None else str(value)
