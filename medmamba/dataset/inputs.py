"""Which cases a path to predict means: a file, a folder, or a list; nnU-Net's names or any others.

A case that cannot be taken is rejected by name and never costs another case anything.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba.dataset.bids import find_bids_cases, is_bids
from medmamba.dataset.case import Case
from medmamba.dataset.lists import LIST_SUFFIXES, Row, read_rows
from medmamba.errors import InputError, UsageError
from medmamba.files import FORMULA_STARTS, RECORD_CONFIG
from medmamba.io import FORMATS, ZIP_SUFFIX, holds_dicom, is_dicom

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_DERIVED_PREFIX_LENGTH = 60
MOST_NAMED = 5
"""Of entries that are left out, named in a message."""

PAIR_SUFFIXES = (".hdr", ".img", ".hdr.gz", ".img.gz")
"""ANALYZE, and NIfTI in two files, which says too little about where voxels are."""

CHANNEL_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A case that was found but cannot be predicted.

    Args:
        id: safe name of the case.
        code: stable identifier.
        message: what was found and what to do.
    """

    __pydantic_config__ = RECORD_CONFIG

    id: str
    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class CaseListing:
    """The cases behind a path.

    Args:
        cases: sorted by id, ids unique even where letter case does not count.
        rejected: sorted by id.
        renamed: derived id -> name it stands for, where the name was not safe as a file name.
        ignored: entries of the folder that no case was made of, such as images of another format
            than asked for, folders, or files being copied.
    """

    cases: tuple[Case, ...]
    rejected: tuple[Rejection, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[Path, ...] = ()

    @property
    def total(self) -> int:
        """Cases found, rejected ones too."""
        return len(self.cases) + len(self.rejected)

    def describe_ignored(self, output: Path | None = None) -> str:
        """Say what was left out of a folder, but for ``output``; empty where nothing was."""
        left_out = [path for path in self.ignored if output is None or not _is_same(path, output)]
        if not left_out:
            return ""
        names = [f"{path.name}/" if path.is_dir() else path.name for path in left_out]
        listed = ", ".join(map(repr, names[:MOST_NAMED]))
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        return (
            f"left out of the input folder, since no case of this model: {listed}{more} "
            f"({len(names)} in all)"
        )


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A case before its id and paths are judged."""

    name: str
    images: tuple[Path, ...]
    problem: tuple[str, str] | None = None


def find_cases(
    source: Path | str,
    *,
    channels: int,
    file_ending: str | None = None,
    root: Path | None = None,
    follow_links: bool = False,
    modalities: Sequence[str] = (),
) -> CaseListing:
    """List the cases of a file, a folder, or a list file (.txt, .csv, .json, .jsonl).

    Args:
        source: an image; a folder with ``CASE_0000`` names, or any names where a case is one file;
            a DICOM series (folder, archive or file) or a folder of them; a BIDS folder; or a list.
        channels: files per case that the model needs.
        file_ending: only files of this format; None for any.
        root: folder that the paths of a list are relative to and must not leave; the list's own
            when None.
        follow_links: accept paths that leave the folder.
        modalities: suffixes of the images of a BIDS folder, or what the model calls its channels.

    Raises:
        UsageError: the path does not exist, holds no image, or the list cannot be understood.
    """
    source = Path(source)
    ignored: tuple[Path, ...] = ()
    boundary: Path | None = None
    listed = is_list(source)
    if source.is_dir():
        candidates, ignored = _in_folder(source, channels, file_ending, modalities)
        boundary = source
    elif not os.path.lexists(source):
        raise UsageError(f"{source}: does not exist. Give an image, a folder or a list file.")
    elif _pair_suffix(source.name):
        candidates = list(_pairs([source]))
    elif image_suffix(source.name):
        candidates = list(_single(source, channels))
    elif is_dicom(source):
        candidates = [Candidate(name=source.stem, images=(source,))]
    elif listed:
        boundary = root or source.parent
        candidates = list(_listed(source, boundary, channels))
    else:
        raise UsageError(
            f"{source.name}: unknown file ending. Images end in {', '.join(FORMATS)}, "
            f"lists in {', '.join(LIST_SUFFIXES)}."
        )
    if not candidates:
        wanted = file_ending or ", ".join(FORMATS)
        raise UsageError(f"{source}: holds no image ({wanted}). Check the path.")
    resolved = None if boundary is None or follow_links else boundary.resolve()
    return _judge(candidates, resolved, ignored, listed=listed)


def is_list(source: Path) -> bool:
    """Whether a path is a list of cases, by its name."""
    return source.suffix.lower() in LIST_SUFFIXES and not source.is_dir()


def _in_folder(
    folder: Path, channels: int, ending: str | None, modalities: Sequence[str]
) -> tuple[list[Candidate], tuple[Path, ...]]:
    """The cases of a folder, and its entries that belong to none."""
    with os.scandir(folder) as found:
        names = sorted(entry.name for entry in found if not entry.name.startswith("."))
    entries = [folder / name for name in names]
    family = None if ending is None else FORMATS.get(ending.lower())
    images = [
        path
        for path in entries
        if (suffix := image_suffix(path.name)) and family in (None, FORMATS[suffix])
    ]
    pairs = [path for path in entries if _pair_suffix(path.name)]
    candidates = [*_group(images, channels), *_pairs(pairs), *_dicom_cases(folder)]
    if not candidates and is_bids(folder):
        return list(_bids_cases(folder, modalities, channels)), ()
    used = {path for candidate in candidates for path in candidate.images}
    if folder in used:
        return candidates, ()
    used.update(pairs)
    return candidates, tuple(path for path in entries if path not in used)


def _pair_suffix(name: str) -> str:
    lower = name.lower()
    return next((suffix for suffix in PAIR_SUFFIXES if lower.endswith(suffix)), "")


def _pairs(paths: Sequence[Path]) -> Iterator[Candidate]:
    """One case to be turned away for each image in two files."""
    stems = {path.name[: -len(_pair_suffix(path.name))]: path for path in reversed(paths)}
    for stem, path in sorted(stems.items()):
        match = CHANNEL_NAME.fullmatch(stem)
        message = f"{path.name}: is an image in two files (.hdr and .img), of which neither says "
        message += "enough. Convert it to a single .nii.gz, and check its orientation."
        yield Candidate(
            name=match["case"] if match else stem,
            images=(path,),
            problem=("E_IO_FORMAT", message),
        )


def _dicom_cases(folder: Path) -> Iterator[Candidate]:
    """Turn a folder of DICOM files into one case, or each folder and archive in it that holds any.

    A folder named like an image file is left to be rejected as one.
    """
    others = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    others = [path for path in others if not image_suffix(path.name)]
    files = [path for path in others if path.is_file() and path.suffix.lower() != ZIP_SUFFIX]
    if any(map(holds_dicom, files)):
        yield Candidate(name=folder.resolve().name, images=(folder,))
        return
    for path in others:
        if (path.is_dir() or path.suffix.lower() == ZIP_SUFFIX) and holds_dicom(path):
            name = path.name if path.is_dir() else path.stem
            yield Candidate(name=name, images=(path,))


def _bids_cases(folder: Path, modalities: Sequence[str], channels: int) -> Iterator[Candidate]:
    for case in find_bids_cases(folder, modalities, channels):
        problem = None
        if case.problem:
            message = f"case {case.name}: has no {case.problem}. Add it, or leave the case out."
            problem = ("E_CHAN_COUNT", message)
        yield Candidate(name=case.name, images=case.images, problem=problem)


def image_suffix(name: str) -> str:
    """The ending of an image's name, in lower case; empty for any other file."""
    lower = name.lower()
    return next((suffix for suffix in FORMATS if lower.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """The name of an image without its ending."""
    return path.name[: len(path.name) - len(image_suffix(path.name))]


def _group(paths: list[Path], channels: int) -> Iterator[Candidate]:
    """Turn the files of a folder into cases."""
    groups: dict[tuple[str, str], dict[str, Path]] = {}
    for path in paths:
        match = CHANNEL_NAME.fullmatch(stem_of(path))
        if match:
            key = (match["case"], image_suffix(path.name))
            groups.setdefault(key, {})[match["channel"]] = path
        else:
            yield Candidate(name=stem_of(path), images=(path,))
    for (name, _), files in groups.items():
        if channels == 1 and "0000" not in files:
            # Numbers that are part of the name, such as patient_0007.
            for path in files.values():
                yield Candidate(name=stem_of(path), images=(path,))
        else:
            yield _channel_case(name, files, channels)


def _channel_case(name: str, files: dict[str, Path], channels: int) -> Candidate:
    images = tuple(files[key] for key in sorted(files))
    expected = {f"{index:04d}" for index in range(channels)}
    # A lone first file may hold every channel itself; reading decides.
    if set(files) in (expected, {"0000"}):
        return Candidate(name=name, images=images)
    missing, extra = sorted(expected - set(files)), sorted(set(files) - expected)
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"too many: {', '.join(extra)}"] if extra else []
    message = f"case {name}: the model takes {channels} channels; {'; '.join(parts)}. "
    message += "Correct the channel files."
    return Candidate(name=name, images=images, problem=("E_CHAN_COUNT", message))


def _single(path: Path, channels: int) -> Iterator[Candidate]:
    match = CHANNEL_NAME.fullmatch(stem_of(path))
    if match is None or (channels == 1 and match["channel"] != "0000"):
        yield Candidate(name=stem_of(path), images=(path,))
        return
    if channels == 1:
        yield Candidate(name=match["case"], images=(path,))
        return
    suffix = path.name[len(stem_of(path)) :]
    files = {
        f"{index:04d}": sibling
        for index in range(channels)
        if os.path.lexists(sibling := path.with_name(f"{match['case']}_{index:04d}{suffix}"))
    }
    yield _channel_case(match["case"], files, channels)


def _listed(path: Path, root: Path, channels: int) -> Iterator[Candidate]:
    for row in read_rows(path):
        yield candidate_of(row, root, channels)


def candidate_of(row: Row, root: Path, channels: int) -> Candidate:
    """Turn a row of a list into a case to judge; its files are relative to ``root``."""
    name = name_of(row)
    images = tuple(root / file for file in row.files)
    found = len(row.files) - row.files.count("")
    problem = None
    if not images:
        problem = ("E_CHAN_COUNT", f"case {name}: the list names no file.")
    elif found < len(images) or found not in (1, channels):
        message = f"case {name}: the list names {found} files; the model takes {channels}."
        problem = ("E_CHAN_COUNT", f"{message} Correct the list.")
    for text in (name, *row.files):
        if text.startswith(FORMULA_STARTS):
            message = f"case {name!r}: {text!r} begins as a formula of a spreadsheet does. Rename "
            message += "the case, or write the path with ./ before it."
            problem = ("E_PATH_UNSAFE", message)
        elif _has_control(text):
            message = f"case {name!r}: the list's {text!r} holds control characters. Rename it."
            problem = ("E_PATH_UNSAFE", message)
    return Candidate(name=name, images=images, problem=problem)


def name_of(row: Row) -> str:
    """The name of a case in a list: as given, or that of its first file."""
    if row.name is not None or not row.files:
        return row.name or ""
    first = Path(row.files[0])
    stem = stem_of(first) or first.name
    match = CHANNEL_NAME.fullmatch(stem)
    return match["case"] if match and match["channel"] == "0000" else stem


def _judge(
    candidates: list[Candidate], boundary: Path | None, ignored: tuple[Path, ...], *, listed: bool
) -> CaseListing:
    cases, rejected, renamed = [], [], []
    twins = Counter(collision_key(candidate.name) for candidate in candidates)
    for candidate in candidates:
        repeated = twins[collision_key(candidate.name)] > 1
        verdict = judge(candidate, boundary, repeated=repeated, listed=listed)
        if isinstance(verdict, Rejection):
            rejected.append(verdict)
            continue
        cases.append(verdict)
        if verdict.id != candidate.name:
            renamed.append((verdict.id, candidate.name))
    return CaseListing(
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        rejected=tuple(sorted(rejected, key=lambda item: item.id)),
        renamed=tuple(sorted(renamed)),
        ignored=ignored,
    )


def judge(
    candidate: Candidate, boundary: Path | None, *, repeated: bool, listed: bool
) -> Case | Rejection:
    """Decide whether a case may be predicted.

    Args:
        candidate: the case.
        boundary: resolved folder that no file may leave; None allows every place.
        repeated: whether another case has the same name.
        listed: whether its paths were written by somebody, rather than found in a folder.
    """
    safe = safe_id(candidate.name)
    problem = _name_problem(candidate.name) or candidate.problem
    if problem is None and repeated:
        message = f"case {candidate.name}: several cases have this name where letter "
        message += "case, accents or file ending do not count. Rename them."
        problem = ("E_ID_COLLISION", message)
    if problem is None and listed and boundary is not None:
        problem = _place_problem(candidate, boundary)
    try:
        problem = problem or _path_problem(candidate, boundary)
    except OSError as error:
        message = f"case {candidate.name}: cannot be looked at ({error.strerror}). Check its paths."
        denied = isinstance(error, PermissionError)
        problem = ("E_IO_PERMISSION" if denied else "E_IO_READ", message)
    if problem is not None:
        return Rejection(id=safe, code=problem[0], message=problem[1])
    return Case(id=safe, images=candidate.images)


def safe_id(name: str) -> str:
    """Return ``name`` if it is safe in file names everywhere, else a derived id that is."""
    normal = unicodedata.normalize("NFC", name)
    if SAFE_ID.fullmatch(normal):
        return normal
    digest = hashlib.sha256(normal.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    prefix = re.sub(r"[^A-Za-z0-9._-]+", "_", normal).strip("._-")[:_DERIVED_PREFIX_LENGTH]
    return f"{prefix or 'case'}-{digest}"


def collision_key(name: str) -> str:
    """What two names have in common that some file system could not tell apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _name_problem(name: str) -> tuple[str, str] | None:
    if not name or _has_control(name) or "/" in name or "\\" in name or name in (".", ".."):
        message = f"case {name!r}: the name is unsafe in a path. Rename the case."
        return "E_PATH_UNSAFE", message
    return None


def _has_control(text: str) -> bool:
    return any(unicodedata.category(letter) == "Cc" for letter in text)


def _place_problem(candidate: Candidate, boundary: Path) -> tuple[str, str] | None:
    """A path in a list must not lead out of its folder, neither by name nor through a link."""
    for path in candidate.images:
        try:
            inside = path.resolve().is_relative_to(boundary)
        except (OSError, RuntimeError, ValueError):
            continue  # a loop of links, or no path at all; looked at next
        if not inside:
            message = f"case {candidate.name}: {path.name} lies outside the folder that the list's "
            message += "paths belong to. Name a folder that holds all files with --root, or allow "
            message += "links with --follow-links."
            return "E_PATH_ESCAPE", message
    return None


def _path_problem(candidate: Candidate, boundary: Path | None) -> tuple[str, str] | None:
    for path in candidate.images:
        if path.is_symlink() and (problem := _link_problem(path, boundary)):
            return problem
        if not path.is_file() and not (path.is_dir() and not image_suffix(path.name)):
            there = os.path.lexists(path)
            message = f"{path.name}: {'is no regular file' if there else 'does not exist'}. "
            message += "Give the path of an image file."
            return ("E_PATH_NOTFILE" if there else "E_IO_MISSING"), message
    return None


def _link_problem(path: Path, boundary: Path | None) -> tuple[str, str] | None:
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        message = f"{path.name}: is a link to a file that does not exist. Restore the file."
        return "E_IO_MISSING", message
    except (OSError, RuntimeError):
        return "E_PATH_LOOP", f"{path.name}: is a link that leads back to itself. Remove it."
    if boundary is not None and not target.is_relative_to(boundary):
        message = f"{path.name}: is a link that leaves the input folder. Copy the file there, or "
        message += "allow such links with --follow-links."
        return "E_PATH_ESCAPE", message
    return None


def as_input_error(rejection: Rejection) -> InputError:
    """The error a rejected case would have raised on its own."""
    return InputError(rejection.message, code=rejection.code)
