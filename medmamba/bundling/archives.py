"""What is wrong with an archive that is offered as a model; nothing is ever unpacked here."""

import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOST_ENTRIES = 10_000
MOST_DIRECTORY_BYTES = MOST_ENTRIES * 512
MOST_RATIO = 100
FREE_BYTES = 64 * 2**20
"""Below this, contents may be as well compressible as they like."""

_END_OF_ZIP = struct.Struct("<4s4H2LH")
_END_MAGIC = b"PK\x05\x06"
_LONGEST_COMMENT = 0xFFFF
_UNIX_MODE_SHIFT = 16


def archive_problem(path: Path) -> str | None:
    """Say why an archive must not be unpacked; None if it may be, or is no archive."""
    try:
        if zipfile.is_zipfile(path):
            problem = _oversized_directory(path)
            return problem or _first_problem(_zip_entries(path), path.stat().st_size)
        if tarfile.is_tarfile(path):
            return _first_problem(_tar_entries(path), path.stat().st_size)
    except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError):
        return None  # whatever it is, it cannot be unpacked either
    return None


def _first_problem(entries: Iterator[tuple[str, int, bool]], packed: int) -> str | None:
    """Look at entries (name, size, whether it is anything but a file or folder)."""
    total = 0
    for count, (name, size, odd) in enumerate(entries, start=1):
        inside = PurePosixPath(name.replace("\\", "/"))
        drive = len(name) > 1 and name[1] == ":"
        if inside.is_absolute() or ".." in inside.parts or drive or "\0" in name:
            return "holds a name that leads out of it"
        if odd:
            return "holds a link or a device"
        total += size
        if count > MOST_ENTRIES:
            return f"holds more than {MOST_ENTRIES} entries"
        if total > max(FREE_BYTES, MOST_RATIO * packed):
            return f"would unpack to more than {MOST_RATIO} times its size"
    return None


def _oversized_directory(path: Path) -> str | None:
    """Look at how large the list of entries is before anybody reads it."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END_OF_ZIP.size - _LONGEST_COMMENT))
        tail = file.read()
    at = tail.rfind(_END_MAGIC)
    if at < 0 or len(tail) - at < _END_OF_ZIP.size:
        return None
    _, _, _, _, count, directory_bytes, _, _ = _END_OF_ZIP.unpack_from(tail, at)
    if count > MOST_ENTRIES or directory_bytes > MOST_DIRECTORY_BYTES:
        return f"holds more than {MOST_ENTRIES} entries"
    return None


def _zip_entries(path: Path) -> Iterator[tuple[str, int, bool]]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            kind = stat.S_IFMT(entry.external_attr >> _UNIX_MODE_SHIFT)
            odd = kind not in (0, stat.S_IFREG, stat.S_IFDIR)
            yield entry.orig_filename, entry.file_size, odd


def _tar_entries(path: Path) -> Iterator[tuple[str, int, bool]]:
    with tarfile.open(path, "r|*") as archive:
        for entry in archive:
            yield entry.name, entry.size, not (entry.isreg() or entry.isdir())
