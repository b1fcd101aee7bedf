"""What lands on disk lands whole: atomic writes, and JSON for frozen dataclasses.

A file appears under its final name only once its bytes are complete and on disk. JSON goes
through pydantic, so an unknown key or a wrong type is an error that names the key.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medmamba.errors import EnvironmentFault, MedMambaError

T = TypeVar("T")

TEMPORARY_PREFIX = ".mm-tmp-"

RECORD_CONFIG = ConfigDict(extra="forbid", frozen=True)
"""Set as ``__pydantic_config__`` on dataclasses that go to JSON: unknown keys are errors."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` so that ``path`` is either the old file or the whole new one.

    Raises:
        EnvironmentFault: the folder cannot be written or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
    replace_atomic(path, lambda temporary: temporary.write_bytes(data))


def replace_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it into place.

    Raises:
        EnvironmentFault: the folder cannot be written or the disk is full.
    """
    # The suffixes are kept because some writers choose their format by them.
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise EnvironmentFault(
            f"{path}: cannot be written ({error.strerror or error}). "
            "Check permissions and free space of the folder.",
            code="E_IO_WRITE",
        ) from error
    finally:
        # Where the folder itself is at fault there is nothing to remove, and the error is known.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run was writing in ``folder``; nobody else may be writing there."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable, where the platform can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable_folder(folder: Path) -> Path:
    """Create ``folder`` and prove that a file can be written there.

    Raises:
        EnvironmentFault: it cannot.
    """
    probe = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise EnvironmentFault(
            f"{folder}: cannot be written ({error.strerror or error}). "
            "Choose another output folder or change its permissions.",
            code="E_OUT_NOT_WRITABLE",
        ) from error
    return folder


def to_plain(value: Any) -> Any:
    """Turn a dataclass tree into JSON values (dicts, lists, strings, numbers, None)."""
    adapter = TypeAdapter(type(value) if dataclasses.is_dataclass(value) else Any)
    return adapter.dump_python(value, mode="json")


def to_json(value: Any) -> str:
    """Render a dataclass tree as indented JSON; NaN becomes null."""
    return json.dumps(_without_nan(to_plain(value)), indent=2, ensure_ascii=False) + "\n"


def from_plain(kind: type[T], value: Any, *, what: str, error: type[MedMambaError]) -> T:
    """Build a ``kind`` from JSON values.

    Raises:
        MedMambaError: (of class ``error``) naming ``what``, the key and the value found.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        found = repr(first.get("input"))
        raise error(
            f"{what}: key '{where}': {first['msg']} (found {found[:120]}). "
            "Write the file again with this version of medmamba."
        ) from problem


def read_json(path: Path, *, what: str, error: type[MedMambaError]) -> Any:
    """Read JSON values.

    Raises:
        MedMambaError: (of class ``error``) when the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise error(f"{what}: {path} does not exist.") from problem
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise error(f"{what}: {path} is not valid JSON ({problem}).") from problem
    except OSError as problem:
        raise error(f"{what}: {path} cannot be read ({problem.strerror}).") from problem


def hash_values(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON, the key of everything derived from it."""
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value


FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet runs text that begins with one of these (OWASP, CSV injection)."""


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Render rows as CSV that a spreadsheet shows and never runs; NaN and None become empty."""
    buffer = io.StringIO()
    _write_csv(buffer, header, rows)
    return buffer.getvalue()


def replace_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write such CSV atomically, row by row: however many rows, memory stays the same.

    Raises:
        EnvironmentFault: the folder cannot be written or the disk is full.
    """

    def fill(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            _write_csv(handle, header, rows)

    replace_atomic(path, fill)


def _write_csv(handle: TextIO, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_csv_cell(value) for value in row] for row in rows)


def _csv_cell(value: object) -> object:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return f"'{value}"
    return value
