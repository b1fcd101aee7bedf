"""Which cases a path to predict means: a file, a folder, or a list; nnU-Net's names or any others.

A case that cannot be taken is rejected by name and never costs another case anything.
"""

import csv
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmamba.dataset.case import Case
from medmamba.errors import InputError, UsageError
from medmamba.files import RECORD_CONFIG
from medmamba.io import FORMATS, ZIP_SUFFIX, holds_dicom, is_dicom

LIST_SUFFIXES = (".txt", ".csv", ".json", ".jsonl")
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_DERIVED_PREFIX_LENGTH = 60
_CHANNEL_NAME = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})", re.DOTALL)


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
        ignored: image files of another format than asked for.
    """

    cases: tuple[Case, ...]
    rejected: tuple[Rejection, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A case before its id and paths are judged."""

    name: str
    images: tuple[Path, ...]
    problem: tuple[str, str] | None = None


def find_cases(
    source: Path | str,
    *,
    channels: int,
    file_ending: str | None = None,
    follow_links: bool = False,
) -> CaseListing:
    """List the cases of a file, a folder, or a list file (.txt, .csv, .json, .jsonl).

    Args:
        source: an image; a folder with ``CASE_0000`` names, or any names where a case is one file;
            a DICOM series (folder, archive or file) or a folder of them; or a list. Paths in a
            list are relative to its folder.
        channels: files per case that the model needs.
        file_ending: only files of this format; None for any.
        follow_links: accept symbolic links that leave the folder.

    Raises:
        UsageError: the path does not exist, holds no image, or the list cannot be understood.
    """
    source = Path(source)
    ignored: tuple[Path, ...] = ()
    if source.is_dir():
        paths, ignored = _image_entries(source, file_ending)
        candidates = [*_group(paths, channels), *_dicom_cases(source)]
        root: Path | None = source
    elif not os.path.lexists(source):
        raise UsageError(f"{source}: does not exist. Give an image, a folder or a list file.")
    elif _suffix(source.name):
        candidates, root = list(_single(source, channels)), None
    elif is_dicom(source):
        candidates, root = [_Candidate(name=source.stem, images=(source,))], None
    elif source.suffix.lower() in LIST_SUFFIXES:
        candidates, root = list(_listed(source, channels)), None
    else:
        raise UsageError(
            f"{source.name}: unknown file ending. Images end in {', '.join(FORMATS)}, "
            f"lists in {', '.join(LIST_SUFFIXES)}."
        )
    if not candidates:
        wanted = file_ending or ", ".join(FORMATS)
        raise UsageError(f"{source}: holds no image ({wanted}). Check the path.")
    return _judge(candidates, None if follow_links else root, ignored)


def _image_entries(folder: Path, ending: str | None) -> tuple[list[Path], tuple[Path, ...]]:
    """Entries named like images, and those of another format than ``ending``."""
    taken: list[Path] = []
    ignored: list[Path] = []
    family = None if ending is None else FORMATS.get(ending.lower())
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        suffix = _suffix(name)
        if not suffix:
            continue
        same = family is None or FORMATS[suffix] == family
        (taken if same else ignored).append(folder / name)
    return taken, tuple(ignored)


def _dicom_cases(folder: Path) -> Iterator[_Candidate]:
    """Turn a folder of DICOM files into one case, or each folder and archive in it that holds any.

    A folder named like an image file is left to be rejected as one.
    """
    others = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    others = [path for path in others if not _suffix(path.name)]
    files = [path for path in others if path.is_file() and path.suffix.lower() != ZIP_SUFFIX]
    if any(map(holds_dicom, files)):
        yield _Candidate(name=folder.resolve().name, images=(folder,))
        return
    for path in others:
        if (path.is_dir() or path.suffix.lower() == ZIP_SUFFIX) and holds_dicom(path):
            name = path.name if path.is_dir() else path.stem
            yield _Candidate(name=name, images=(path,))


def _suffix(name: str) -> str:
    lower = name.lower()
    return next((suffix for suffix in FORMATS if lower.endswith(suffix)), "")


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(_suffix(path.name))]


def _group(paths: list[Path], channels: int) -> Iterator[_Candidate]:
    """Turn the files of a folder into cases."""
    groups: dict[tuple[str, str], dict[str, Path]] = {}
    for path in paths:
        match = _CHANNEL_NAME.fullmatch(_stem(path))
        if match:
            key = (match["case"], _suffix(path.name))
            groups.setdefault(key, {})[match["channel"]] = path
        else:
            yield _Candidate(name=_stem(path), images=(path,))
    for (name, _), files in groups.items():
        if channels == 1 and "0000" not in files:
            # Numbers that are part of the name, such as patient_0007.
            for path in files.values():
                yield _Candidate(name=_stem(path), images=(path,))
        else:
            yield _channel_case(name, files, channels)


def _channel_case(name: str, files: dict[str, Path], channels: int) -> _Candidate:
    images = tuple(files[key] for key in sorted(files))
    expected = {f"{index:04d}" for index in range(channels)}
    # A lone first file may hold every channel itself; reading decides.
    if set(files) in (expected, {"0000"}):
        return _Candidate(name=name, images=images)
    missing, extra = sorted(expected - set(files)), sorted(set(files) - expected)
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [f"too many: {', '.join(extra)}"] if extra else []
    message = f"case {name}: the model takes {channels} channels; {'; '.join(parts)}. "
    message += "Correct the channel files."
    return _Candidate(name=name, images=images, problem=("E_CHAN_COUNT", message))


def _single(path: Path, channels: int) -> Iterator[_Candidate]:
    match = _CHANNEL_NAME.fullmatch(_stem(path))
    if match is None or (channels == 1 and match["channel"] != "0000"):
        yield _Candidate(name=_stem(path), images=(path,))
        return
    if channels == 1:
        yield _Candidate(name=match["case"], images=(path,))
        return
    suffix = path.name[len(_stem(path)) :]
    files = {
        f"{index:04d}": sibling
        for index in range(channels)
        if os.path.lexists(sibling := path.with_name(f"{match['case']}_{index:04d}{suffix}"))
    }
    yield _channel_case(match["case"], files, channels)


def _listed(path: Path, channels: int) -> Iterator[_Candidate]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"{path.name}: the list cannot be read ({problem}).") from problem
    kind = path.suffix.lower()
    rows: Iterable[tuple[str | None, list[str]]]
    if kind == ".txt":
        lines = [line.strip() for line in text.splitlines()]
        rows = [(None, line.split("\t")) for line in lines if line and not line.startswith("#")]
    elif kind == ".csv":
        rows = _csv_rows(text)
    else:
        rows = _json_rows(path.name, text, lines=kind == ".jsonl")
    for name, files in rows:
        images = tuple(path.parent / file for file in files if file)
        if not images:
            message = f"case {name}: the list names no file."
            yield _Candidate(name=name or "", images=(), problem=("E_CHAN_COUNT", message))
            continue
        yield _listed_case(name, images, channels)


def _listed_case(name: str | None, images: tuple[Path, ...], channels: int) -> _Candidate:
    if name is None:
        stem = _stem(images[0]) or images[0].name
        match = _CHANNEL_NAME.fullmatch(stem)
        name = match["case"] if match and match["channel"] == "0000" else stem
    problem = None
    if len(images) not in (1, channels):
        message = f"case {name}: the list names {len(images)} files; the model takes {channels}."
        problem = ("E_CHAN_COUNT", f"{message} Correct the list.")
    return _Candidate(name=name, images=images, problem=problem)


def _csv_rows(text: str) -> Iterator[tuple[str | None, list[str]]]:
    rows = [row for row in csv.reader(text.splitlines()) if any(cell.strip() for cell in row)]
    if not rows:
        return
    head = [cell.strip().lower() for cell in rows[0]]
    if "case_id" in head or any(cell.startswith("channel_") for cell in head):
        columns = [at for at, cell in enumerate(head) if cell.startswith(("channel_", "image"))]
        named = head.index("case_id") if "case_id" in head else None
        for row in rows[1:]:
            cells = [cell.strip() for cell in row] + [""] * len(head)
            yield None if named is None else cells[named], [cells[at] for at in columns]
        return
    for row in rows:
        yield None, [cell.strip() for cell in row]


def _json_rows(name: str, text: str, *, lines: bool) -> Iterator[tuple[str | None, list[str]]]:
    try:
        if lines:
            value: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise UsageError(f"{name}: the list is not valid JSON ({problem}).") from problem
    if isinstance(value, dict):
        value = [{"case_id": key, "images": files} for key, files in value.items()]
    if not isinstance(value, list):
        raise UsageError(f"{name}: a list of cases or a map case -> files is needed.")
    for entry in value:
        yield _json_row(name, entry)


def _json_row(name: str, entry: Any) -> tuple[str | None, list[str]]:
    case_id = None
    files = entry
    if isinstance(entry, dict):
        case_id = str(entry["case_id"]) if "case_id" in entry else None
        files = entry.get("images")
        if files is None:
            files = [entry[key] for key in sorted(entry) if key.startswith("channel_")]
        if isinstance(files, dict):
            files = files.get("images")
    if isinstance(files, str):
        files = [files]
    if not isinstance(files, list) or not all(isinstance(item, str) for item in files):
        raise UsageError(f"{name}: entry {str(entry)[:80]} is no path, list of paths or map.")
    return case_id, files


def _judge(
    candidates: list[_Candidate], root: Path | None, ignored: tuple[Path, ...]
) -> CaseListing:
    cases, rejected, renamed = [], [], []
    keys: dict[str, list[str]] = {}
    for candidate in candidates:
        keys.setdefault(_collision_key(candidate.name), []).append(candidate.name)
    boundary = None if root is None else root.resolve()
    for candidate in candidates:
        safe = safe_id(candidate.name)
        twins = keys[_collision_key(candidate.name)]
        problem = _name_problem(candidate.name) or candidate.problem
        if problem is None and len(twins) > 1:
            message = f"case {candidate.name}: {len(twins)} cases have this name where letter "
            message += "case, accents or file ending do not count. Rename them."
            problem = ("E_ID_COLLISION", message)
        problem = problem or _path_problem(candidate, boundary)
        if problem is not None:
            rejected.append(Rejection(id=safe, code=problem[0], message=problem[1]))
            continue
        cases.append(Case(id=safe, images=candidate.images))
        if safe != candidate.name:
            renamed.append((safe, candidate.name))
    return CaseListing(
        cases=tuple(sorted(cases, key=lambda case: case.id)),
        rejected=tuple(sorted(rejected, key=lambda item: item.id)),
        renamed=tuple(sorted(renamed)),
        ignored=ignored,
    )


def safe_id(name: str) -> str:
    """Return ``name`` if it is safe in file names everywhere, else a derived id that is."""
    normal = unicodedata.normalize("NFC", name)
    if SAFE_ID.fullmatch(normal):
        return normal
    digest = hashlib.sha256(normal.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    prefix = re.sub(r"[^A-Za-z0-9._-]+", "_", normal).strip("._-")[:_DERIVED_PREFIX_LENGTH]
    return f"{prefix or 'case'}-{digest}"


def _collision_key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _name_problem(name: str) -> tuple[str, str] | None:
    unprintable = any(unicodedata.category(letter) == "Cc" for letter in name)
    if not name or unprintable or "/" in name or "\\" in name or name in (".", ".."):
        message = f"case {name!r}: the name is unsafe in a path. Rename the case."
        return "E_PATH_UNSAFE", message
    return None


def _path_problem(candidate: _Candidate, boundary: Path | None) -> tuple[str, str] | None:
    for path in candidate.images:
        if path.is_symlink() and (problem := _link_problem(path, boundary)):
            return problem
        if not path.is_file() and not (path.is_dir() and not _suffix(path.name)):
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
