"""What lands on disk lands whole: atomic writes, and JSON for frozen dataclasses.

A file appears under its final name only once its bytes are complete and on disk. JSON goes
through pydantic, so an unknown key or a wrong type is an error that names the key.
"""

import contextlib
import csv
import dataclasses
import errno
import functools
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
from medmamba.failpoints import failpoint

T = TypeVar("T")

_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)
"""Of a type; to make one takes 5 ms, a hundred times what it then does."""

TEMPORARY_PREFIX = ".mm-tmp-"

PROCESS_TOKEN = uuid.uuid4().hex[:12]
"""Part of the names of all temporary files of this process, so that another can remove them."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

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
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        failpoint("before_open", path.name)
        write(temporary)
        failpoint("mid_write", path.name, spoil=lambda: _cut_in_half(temporary))
        failpoint("before_fsync", path.name)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        failpoint("after_fsync", path.name)
        temporary.replace(path)
        failpoint("after_replace", path.name)
        sync_folder(path.parent)
        failpoint("after_folder_sync", path.name)
    except OSError as error:
        raise not_writable(path, error) from error
    finally:
        # Where the folder itself is at fault there is nothing to remove, and the error is known.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return a new name beside ``path`` for what will be renamed to it."""
    # The suffixes are kept because some writers choose their format by them.
    return path.with_name(f"{TEMPORARY_PREFIX}{PROCESS_TOKEN}-{uuid.uuid4().hex[:8]}-{path.name}")


def not_writable(path: Path, error: OSError, *, code: str = "E_IO_WRITE") -> EnvironmentFault:
    """Return the error to raise where writing ``path`` failed: a full disk, or ``code``."""
    if error.errno in NO_SPACE:
        return EnvironmentFault(
            f"{path}: the disk is full ({error.strerror}). Make room and run again; what is "
            "finished is kept.",
            code="E_IO_NOSPACE",
        )
    return EnvironmentFault(
        f"{path}: cannot be written ({error.strerror or error}). "
        "Check the folder, its permissions and its disk.",
        code=code,
    )


def _cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove_leftovers(folder: Path, token: str = "") -> None:
    """Delete what a killed process was writing in ``folder``.

    Args:
        folder: where.
        token: the `PROCESS_TOKEN` of that process; without it nobody else may be writing there.
    """
    for path in folder.glob(f"{TEMPORARY_PREFIX}{token}*"):
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
    probe = temporary_path(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)  # another run may be sweeping
    except OSError as error:
        raise not_writable(folder, error, code="E_OUT_NOT_WRITABLE") from error
    return folder


def to_plain(value: Any) -> Any:
    """Turn a dataclass tree into JSON values (dicts, lists, strings, numbers, None)."""
    adapter = _adapter(type(value) if dataclasses.is_dataclass(value) else Any)
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
        built: T = _adapter(kind).validate_python(value)
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(top level)"
        found = repr(first.get("input"))
        raise error(
            f"{what}: key '{where}': {first['msg']} (found {found[:120]}). "
            "Write the file again with this version of medmamba."
        ) from problem
    return built


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
