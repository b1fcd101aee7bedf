"""The files of a DICOM case: a folder, a zip archive, or a single file.

Nothing is unpacked to disk. An archive is judged before anything in it is read: unsafe names,
links, encryption and decompression bombs are refused.
"""

import hashlib
import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

from medmamba.errors import InputError

ZIP_SUFFIX = ".zip"
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
PREAMBLE_BYTES = 132
MAGIC = b"DICM"
MAX_FILES = 100_000
MAX_RATIO = 200
"""Deflated images reach about 20; empty ones more, which ``FREE_BYTES`` allows for."""
FREE_BYTES = 256 * 2**20
"""An archive that unpacks to less than this may have any ratio."""
MAX_ZIP_BYTES = 64 * 2**30
_UNIX_MODE_SHIFT = 16


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file of a case.

    Args:
        name: base name, for messages; never the folders above it.
        path: the file on disk, or the archive.
        member: name inside the archive; None for a file on disk.
        size_bytes: decoded size.
    """

    name: str
    path: Path
    member: str | None
    size_bytes: int

    def content(self) -> bytes:
        """Read the whole file.

        Raises:
            InputError: it is damaged or cannot be read.
        """
        try:
            if self.member is None:
                return self.path.read_bytes()
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as handle:
                data = handle.read(self.size_bytes + 1)
        except PermissionError as problem:
            raise InputError(
                f"{self.name}: cannot be read ({problem.strerror}). Change its permissions.",
                code="E_IO_PERMISSION",
            ) from problem
        except OSError as problem:
            raise InputError(
                f"{self.name}: cannot be read ({problem.strerror or problem}).", code="E_IO_READ"
            ) from problem
        except Exception as problem:  # zlib, bz2 and zipfile have error classes of their own
            raise InputError(
                f"{self.name}: the archive's data is damaged ({type(problem).__name__}). "
                "Copy it again.",
                code="E_IO_CORRUPT",
            ) from problem
        if len(data) != self.size_bytes:
            raise InputError(
                f"{self.name}: unpacks to another size than the archive states. Copy it again.",
                code="E_IO_CORRUPT",
            )
        return data

    def stream(self) -> BytesIO:
        """The whole file as a stream."""
        return BytesIO(self.content())


def is_dicom(path: Path) -> bool:
    """Tell by kind and name whether a path is a folder, an archive, or a DICOM file."""
    name = path.name.lower()
    return name.endswith((*DICOM_SUFFIXES, ZIP_SUFFIX)) or path.is_dir()


def holds_dicom(path: Path) -> bool:
    """Tell whether a folder or archive holds any DICOM file, however deep; reads little."""
    try:
        return any(_looks_like_dicom(entry) for entry in entries(path))
    except InputError:
        # What cannot be looked into is a case that will say so when it is read.
        return path.name.lower().endswith(ZIP_SUFFIX)


def entries(path: Path) -> Iterator[Entry]:
    """List the regular files of a case in a stable order.

    Raises:
        InputError: too many files, or an archive that is damaged or unsafe.
    """
    if path.is_dir():
        yield from _folder_entries(path)
    elif path.name.lower().endswith(ZIP_SUFFIX):
        yield from _zip_entries(path)
    else:
        yield Entry(name=path.name, path=path, member=None, size_bytes=_size(path))


def content_hash(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a folder's contents, whatever its files are called.

    Raises:
        OSError: a file cannot be read.
        InputError: it holds too many files.
    """
    total, digests = 0, []
    for entry in _folder_entries(path):
        total += entry.size_bytes
        with entry.path.open("rb") as handle:
            digests.append(hashlib.file_digest(handle, "sha256").digest())
    return total, hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _folder_entries(folder: Path) -> Iterator[Entry]:
    count = 0
    # Links to folders are not followed: they could lead anywhere, and in circles.
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(place) / name
            if name.startswith(".") or not path.is_file():
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
                raise InputError(
                    f"{name}: is a link that leaves the folder of the series. Copy the file there.",
                    code="E_PATH_ESCAPE",
                )
            count += 1
            _require_count(folder.name, count)
            yield Entry(name=name, path=path, member=None, size_bytes=_size(path))


def _zip_entries(path: Path) -> Iterator[Entry]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except PermissionError as problem:
        raise InputError(
            f"{path.name}: cannot be read ({problem.strerror}). Change its permissions.",
            code="E_IO_PERMISSION",
        ) from problem
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as problem:
        raise InputError(
            f"{path.name}: is not a complete zip archive. Copy it again.", code="E_IO_TRUNCATED"
        ) from problem
    _require_count(path.name, len(members))
    _judge_size(path, members)
    for member in sorted(members, key=lambda item: item.filename):
        _judge_member(path, member)
        name = PurePosixPath(member.filename).name
        if not member.is_dir() and not name.startswith("."):
            yield Entry(name=name, path=path, member=member.filename, size_bytes=member.file_size)


def _judge_size(path: Path, members: list[zipfile.ZipInfo]) -> None:
    total = sum(member.file_size for member in members)
    packed = max(1, _size(path))
    if total > MAX_ZIP_BYTES or (total > FREE_BYTES and total > MAX_RATIO * packed):
        raise InputError(
            f"{path.name}: would unpack from {packed} to {total} bytes, more than images do. "
            "Give the folder itself.",
            code="E_LIMIT_ZIP",
        )


def _judge_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = member.filename
    inside = PurePosixPath(name.replace("\\", "/"))
    drive = len(name) > 1 and name[1] == ":"
    if inside.is_absolute() or ".." in inside.parts or drive or "\0" in name:
        raise InputError(
            f"{path.name}: holds a file whose name leads out of the archive. Do not trust it.",
            code="E_PATH_UNSAFE",
        )
    if stat.S_ISLNK(member.external_attr >> _UNIX_MODE_SHIFT):
        raise InputError(
            f"{path.name}: holds a link. Pack the files themselves.", code="E_PATH_UNSAFE"
        )
    if member.flag_bits & 1:
        raise InputError(
            f"{path.name}: is encrypted. Unpack it and give the folder.", code="E_IO_FORMAT"
        )


def _require_count(name: str, count: int) -> None:
    if count > MAX_FILES:
        raise InputError(
            f"{name}: holds over {MAX_FILES} files. Give the folder of one series.",
            code="E_LIMIT_FILES",
        )


def _looks_like_dicom(entry: Entry) -> bool:
    if entry.name.lower().endswith(DICOM_SUFFIXES):
        return True
    try:
        if entry.member is None:
            with entry.path.open("rb") as handle:
                start = handle.read(PREAMBLE_BYTES)
        else:
            with zipfile.ZipFile(entry.path) as archive, archive.open(entry.member) as handle:
                start = handle.read(PREAMBLE_BYTES)
    except Exception:  # unreadable here is unreadable later, where it is reported
        return False
    return start[-4:] == MAGIC


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as problem:
        raise InputError(
            f"{path.name}: cannot be read ({problem.strerror or problem}).", code="E_IO_READ"
        ) from problem
