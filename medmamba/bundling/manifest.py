"""What a bundle says about itself, and where bundles are found. No torch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medmamba import __version__
from medmamba.bundling.archives import archive_problem
from medmamba.errors import BundleError, SecurityError
from medmamba.files import RECORD_CONFIG, from_plain, read_json
from medmamba.labels import UsualVolume

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"
WEIGHTS_FOLDER = "weights"
PREVIOUS_PREFIX = "previous_"
"""Of the names of weights of a cascade's first stage."""

MEMBERS_FOLDER = "members"
SUMS_FILE = "SHA256SUMS"
REFERENCE_FILE = "reference.json"
PROBES_FILE = "parity.json"
POSTPROCESSING_FILE = "postprocessing.json"
CARD_FILE = "CARD.md"
MODEL_FOLDER = "model"
"""Where a training run keeps its bundle."""

INTENDED_USE = "Research use only. Not a medical device."
UNSAFE_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")


@dataclass(frozen=True, kw_only=True)
class LabelEntry:
    """A label or region as viewers and reports show it.

    Args:
        name: as in dataset.json.
        values: label values it consists of.
        color: ``#rrggbb``.
        snomed: SNOMED CT code, where one is known.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    values: tuple[int, ...]
    color: str
    snomed: str | None = None


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """One trained fold."""

    __pydantic_config__ = RECORD_CONFIG

    fold: str
    file: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle is, in one page.

    Args:
        schema_version: raised when older programs could misread a bundle.
        name: for people, such as ``Dataset004_Hippocampus lightm_unet_s``.
        network: key of the networks' registry; the members' joined by " + " in an ensemble.
        configuration: the branch of the plan that the weights belong to; joined likewise.
        channels: names of the image channels, in order.
        weights: one entry per fold; predictions are the mean of their logits. Empty in an ensemble.
        previous_weights: of a cascade's first stage, one entry per fold.
        members: folders of the bundles of an ensemble; predictions are the mean of their
            probabilities.
        postprocessing: file that says which islands are removed; None when nothing is.
        mirror_axes: axes whose flips the networks have seen in training.
        precision: in which the scores were measured.
        training: how the weights came to be.
        scores: Dice on validation cases, by label and fold.
        usual_volumes: how large labels were in the training cases, by name.
        orientation: where the stored axes (x, y, z) of all training images point, such as ``LPS``;
            images stored another way are turned so for the networks. Empty where training images
            differ or nobody knows: then images are taken as they are stored.
        licence: of the weights.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    network: str
    configuration: str
    labels: tuple[LabelEntry, ...]
    channels: tuple[str, ...]
    weights: tuple[WeightsEntry, ...]
    previous_weights: tuple[WeightsEntry, ...] = ()
    members: tuple[str, ...] = ()
    postprocessing: str | None = None
    mirror_axes: tuple[int, ...] = ()
    precision: str = "fp32"
    training: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    usual_volumes: dict[str, UsualVolume] = field(default_factory=dict)
    orientation: str = ""
    plan: str = PLAN_FILE
    licence: str = "not stated"
    intended_use: str = INTENDED_USE
    medmamba_version: str = __version__
    schema_version: int = SCHEMA_VERSION


def find_bundle(path: Path) -> Path:
    """Return the bundle folder meant by ``path``: itself, or the ``model`` inside a run.

    Raises:
        BundleError: there is none; says what was looked for.
        SecurityError: the path is a file in a format that can run code, or a harmful archive.
    """
    if path.is_file():
        if path.suffix.lower() in UNSAFE_SUFFIXES:
            raise SecurityError(
                f"{path}: '{path.suffix}' files can run code when loaded. "
                "Turn it into a model folder: `medmamba convert import-checkpoint FILE -o MODEL`."
            )
        if problem := archive_problem(path):
            raise SecurityError(
                f"{path}: {problem}. Do not unpack it; ask where it came from.",
                code="E_MODEL_UNSAFE",
            )
        raise BundleError(
            f"{path}: is a file; a model is a folder with {MANIFEST_FILE}. Unpack an archive first."
        )
    for folder in (path, path / MODEL_FOLDER):
        if (folder / MANIFEST_FILE).is_file():
            return folder
    found = "does not exist" if not path.exists() else "is no model"
    raise BundleError(
        f"{path}: {found}. Looked for {MANIFEST_FILE} there and in {MODEL_FOLDER}/. "
        "Give the model folder that training wrote, or the run folder that holds it."
    )


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a bundle or run folder, without checking the other files.

    Raises:
        BundleError: there is none, it is damaged, or of a newer version; names the key.
    """
    folder = find_bundle(path)
    content = read_json(folder / MANIFEST_FILE, what="model manifest", error=BundleError)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise BundleError(
            f"{folder / MANIFEST_FILE}: key 'schema_version' is {version!r}; this version of "
            f"medmamba reads up to {SCHEMA_VERSION}. Use a newer medmamba."
        )
    return from_plain(Manifest, content, what=str(folder / MANIFEST_FILE), error=BundleError)
