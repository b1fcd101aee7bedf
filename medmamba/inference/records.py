"""The commit record of a case: what was done, with what, to which bytes, and what came out.

``<case>.json`` is written last, so its presence says that the case is done; whether it still
holds is decided by content (hashes), never by time. No torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medmamba import __version__
from medmamba.dataset import Case
from medmamba.dataset.redaction import without_names
from medmamba.errors import InputError, MedMambaError
from medmamba.files import RECORD_CONFIG, from_plain, hash_file, hash_values, read_json
from medmamba.io import content_hash
from medmamba.labels import LabelMap, UsualVolume
from medmamba.preprocessing.confidence import Confidence
from medmamba.volume import Geometry

RECORD_VERSION = 1
BIDS_RECORDS = "medmamba"
"""Folder of masks, records and runs in an output that is laid out as BIDS."""

Status = Literal["ok", "ok_with_warnings", "rejected", "failed", "skipped"]
"""``skipped`` is never stored: it says of a run that the stored record still held."""

DONE: tuple[Status, ...] = ("ok", "ok_with_warnings", "skipped")

FULL_CONNECTIVITY = np.ones((3, 3, 3))
"""Voxels that touch by a corner belong to one component, as in postprocessing."""

PLANES_AT_ONCE = 16
"""Planes of a mask that are looked at together, so that this takes little memory."""


@dataclass(frozen=True, kw_only=True)
class CaseError:
    """Why a case has no mask."""

    __pydantic_config__ = RECORD_CONFIG

    code: str
    stage: str
    message: str


@dataclass(frozen=True, kw_only=True)
class InputIdentity:
    """One input file, by name and content; never by the folders above it."""

    __pydantic_config__ = RECORD_CONFIG

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which model, for people (name) and for good (hash of its files)."""

    __pydantic_config__ = RECORD_CONFIG

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TileCount:
    """How many tiles networks saw.

    Args:
        total: tiles of a case, for every network that tiles it in its own way.
        reused: of these, not computed because a tile of the same single value had been.
    """

    __pydantic_config__ = RECORD_CONFIG

    total: int = 0
    reused: int = 0

    def __add__(self, other: "TileCount") -> "TileCount":
        return TileCount(total=self.total + other.total, reused=self.reused + other.reused)


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How labels in reduced precision compare with those in float32.

    Args:
        precision: the reduced one.
        passed: whether it may be used.
        dice: between both, by label; labels that neither found are left out.
        voxels: that were compared.
        changed: of these, how many got another label.
        logits_error: root mean square of the difference, in standard deviations.
    """

    __pydantic_config__ = RECORD_CONFIG

    precision: str
    passed: bool
    dice: dict[str, float]
    voxels: int
    changed: int
    logits_error: float

    def __str__(self) -> str:
        words = [f"{self.changed} of {self.voxels} voxels of a probe change"]
        if self.dice:
            name = min(self.dice, key=lambda label: self.dice[label])
            words.append(f"smallest Dice {self.dice[name]:.4f} ({name})")
        words.append(f"logits off by {self.logits_error:.2g} standard deviations")
        return f"{'passed' if self.passed else 'failed'}: {', '.join(words)}"


@dataclass(frozen=True, kw_only=True)
class LabelStatistics:
    """Size and place of one label or region in a mask.

    Args:
        box: half-open index ranges along (D, H, W); None where the label is absent.
        touches_border: whether the structure may go on outside the image.
        n_components: parts that do not touch, not even by a corner.
        confidence: how sure the networks were; None where the label is absent.
        usual: how large it was in training cases; None where the model does not say.
        volume_flag: ``low`` or ``high`` where the volume is not usual.
    """

    __pydantic_config__ = RECORD_CONFIG

    name: str
    values: tuple[int, ...]
    voxels: int
    volume_ml: float
    n_components: int
    touches_border: bool
    box: tuple[tuple[int, int], ...] | None
    confidence: Confidence | None = None
    usual: UsualVolume | None = None
    volume_flag: Literal["low", "high"] | None = None


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """The mask."""

    __pydantic_config__ = RECORD_CONFIG

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """Everything to know about one predicted case.

    Args:
        case_id: name of the case.
        status: ``rejected`` when the input cannot be trusted, ``failed`` when we could not do it.
        warnings: as ``CODE: text``.
        error: why there is no mask.
        key: hash of inputs, model and parameters; a mask with the same key need not be made again.
        inputs: the files read.
        geometry: the grid of the mask, which is that of the first input.
        model: which networks.
        parameters: everything that decides which labels come out.
        numerics: what computed, as far as it may show in the last digits.
        fallbacks: what had to be done differently than asked for, such as less memory.
        tiles: how many the networks saw, and how many needed no computation.
        labels: per label and region.
        output: the mask; None without one.
        segmentation: the same as a DICOM object; None unless the input is DICOM.
        probabilities: what the labels were decided by; None unless asked for.
        timings_s: seconds per stage.
        peak_memory_bytes: of the process so far.
        version: of medmamba.
        record_version: raised when older programs could misread a record.
    """

    __pydantic_config__ = RECORD_CONFIG

    case_id: str
    status: Status
    warnings: tuple[str, ...] = ()
    error: CaseError | None = None
    key: str = ""
    inputs: tuple[InputIdentity, ...] = ()
    geometry: Geometry | None = None
    model: ModelIdentity | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    numerics: dict[str, Any] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()
    tiles: TileCount = TileCount()
    labels: tuple[LabelStatistics, ...] = ()
    output: OutputFile | None = None
    segmentation: OutputFile | None = None
    probabilities: OutputFile | None = None
    timings_s: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    version: str = __version__
    record_version: int = RECORD_VERSION

    @property
    def succeeded(self) -> bool:
        """Whether there is a mask."""
        return self.status in DONE


def identify(paths: tuple[Path, ...]) -> tuple[InputIdentity, ...]:
    """Hash input files.

    Raises:
        InputError: a file cannot be read.
    """
    try:
        return tuple(_identity(path) for path in paths)
    except OSError as error:
        name = Path(error.filename or "input").name
        raise InputError(
            f"{name}: cannot be read ({error.strerror}). Check the path and its permissions.",
            code="E_IO_READ",
        ) from error


def _identity(path: Path) -> InputIdentity:
    if path.is_dir():
        size, digest = content_hash(path)
        return InputIdentity(name=path.name, size_bytes=size, sha256=digest)
    return InputIdentity(name=path.name, size_bytes=path.stat().st_size, sha256=hash_file(path))


def work_key(
    inputs: tuple[InputIdentity, ...], model: ModelIdentity, parameters: dict[str, Any]
) -> str:
    """Return the hash of everything a mask follows from; names of files do not count."""
    contents = [identity.sha256 for identity in inputs]
    return hash_values([contents, model.sha256, parameters, __version__])


def records_folder(folder: Path) -> Path:
    """Where the records of an output folder are: in it, or in a part of it if laid out as BIDS."""
    inner = folder / BIDS_RECORDS
    return inner if (folder / "dataset_description.json").is_file() and inner.is_dir() else folder


def read_record(path: Path) -> CommitRecord | None:
    """Read a commit record; None where there is none that this version understands."""
    if not path.is_file():
        return None
    try:
        content = read_json(path, what="commit record", error=MedMambaError)
        return from_plain(CommitRecord, content, what=str(path), error=MedMambaError)
    except MedMambaError:
        return None


def still_holds(record: CommitRecord | None, folder: Path) -> bool:
    """Tell whether the mask that a record speaks of is there, byte for byte."""
    if record is None or not record.succeeded or record.output is None:
        return False
    files = [file for file in (record.output, record.segmentation, record.probabilities) if file]
    return all(_is_as_written(file, folder) for file in files)


def _is_as_written(file: OutputFile, folder: Path) -> bool:
    path = folder / file.name
    try:
        return path.stat().st_size == file.size_bytes and hash_file(path) == file.sha256
    except OSError:  # absent, or another run has just set it aside
        return False


def describe_file(path: Path) -> OutputFile:
    """Name, size and hash of a file just written."""
    return OutputFile(name=path.name, size_bytes=path.stat().st_size, sha256=hash_file(path))


def describe_labels(
    labels: NDArray[np.integer[Any]],
    geometry: Geometry,
    label_map: LabelMap,
    confidence: Mapping[str, Confidence] = MappingProxyType({}),
    usual: Mapping[str, UsualVolume] = MappingProxyType({}),
) -> tuple[LabelStatistics, ...]:
    """Measure every label and region of a mask (D, H, W).

    Args:
        labels: the mask.
        geometry: its grid.
        label_map: the labels.
        confidence: of the networks, by label name.
        usual: volumes to compare with, by label name.
    """
    from scipy.ndimage import label

    boxes = _boxes(labels)
    measured = []
    for name, values in label_map.foreground.items():
        box = _joined([boxes[value] for value in values if value in boxes])
        mask = None if box is None else _mask(labels[box], values)
        voxels = 0 if mask is None else int(np.count_nonzero(mask))
        volume_ml = voxels * geometry.voxel_volume_ml
        measured.append(
            LabelStatistics(
                name=name,
                values=values,
                voxels=voxels,
                volume_ml=volume_ml,
                n_components=0 if mask is None else int(label(mask, FULL_CONNECTIVITY)[1]),
                touches_border=box is not None and _touches(box, labels.shape),
                box=None if box is None else tuple((part.start, part.stop) for part in box),
                confidence=confidence.get(name),
                usual=usual.get(name),
                volume_flag=usual[name].judge(volume_ml) if name in usual else None,
            )
        )
    return tuple(measured)


def redacted(record: CommitRecord, case: Case) -> CommitRecord:
    """Return the record without the folders of its files, nor the names that are hidden."""

    def plain(text: str) -> str:
        return without_names(without_folders(text, case.images), case)

    error = record.error
    if error is not None:
        error = dataclasses.replace(error, message=plain(error.message))
    inputs = record.inputs
    if case.known_as:
        inputs = tuple(
            dataclasses.replace(item, name=f"{case.id}_{channel:04d}")
            for channel, item in enumerate(inputs)
        )
    return dataclasses.replace(
        record, error=error, inputs=inputs, warnings=tuple(map(plain, record.warnings))
    )


def without_folders(text: str, paths: Sequence[Path]) -> str:
    """Return a text without the folders of ``paths``, which may say more than a file may."""
    folders = sorted({str(path.parent) for path in paths}, key=len, reverse=True)
    for folder in folders:
        text = text.replace(folder + "/", "").replace(folder + "\\", "")
    return text


def _boxes(labels: NDArray[np.integer[Any]]) -> dict[int, tuple[slice, ...]]:
    """Return the bounding box of every value but 0, looking at a few planes at a time."""
    from scipy.ndimage import find_objects

    found: dict[int, list[tuple[slice, ...]]] = {}
    for first in range(0, len(labels), PLANES_AT_ONCE):
        planes = labels[first : first + PLANES_AT_ONCE].astype(np.int32, copy=False)
        for value, box in enumerate(find_objects(planes), start=1):
            if box is not None:
                moved = slice(box[0].start + first, box[0].stop + first)
                found.setdefault(value, []).append((moved, *box[1:]))
    return {value: box for value, parts in found.items() if (box := _joined(parts)) is not None}


def _mask(labels: NDArray[np.integer[Any]], values: tuple[int, ...]) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = labels == values[0]
    for value in values[1:]:
        mask |= labels == value
    return mask


def _joined(boxes: list[tuple[slice, ...]]) -> tuple[slice, ...] | None:
    if not boxes:
        return None
    return tuple(
        slice(min(part.start for part in parts), max(part.stop for part in parts))
        for parts in zip(*boxes, strict=True)
    )


def _touches(box: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    """A single slice has no border in its missing direction."""
    return any(
        size > 1 and (part.start == 0 or part.stop == size)
        for part, size in zip(box, shape, strict=True)
    )
