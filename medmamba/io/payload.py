"""The bytes of a file, trusted or refused; knows nothing of what they mean.

Regular files only, whole gzip streams with correct checksums, and never more decoded bytes than the
header calls for.
"""

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from medmamba.errors import InputError
from medmamba.io.header import Finding

GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 1 << 20
TRAILING_BYTES_LIMIT = 64 << 10
"""Bytes read past the voxels before giving up: enough for padding, too little for a bomb."""
PROOF_BYTES_LIMIT = 256 << 20
"""Bytes decoded to explain a bad header: under a second, and no bomb takes longer."""
DEFLATE_MAX_RATIO = 1032
"""Deflate cannot expand a byte into more than this many (RFC 1951: 258 bytes from two bits)."""
_GZIP_WINDOW_BITS = 31


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; never blocks on pipes or devices.

    Raises:
        InputError: missing, unreadable, a link loop, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as problem:
        raise _open_error(path, problem) from problem
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise InputError(
                f"{path.name}: is not a regular file. Give the path of an image file.",
                code="E_PATH_NOTFILE",
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _open_error(path: Path, problem: OSError) -> InputError:
    if isinstance(problem, FileNotFoundError):
        return InputError(f"{path.name}: does not exist. Check the path.", code="E_IO_MISSING")
    if isinstance(problem, PermissionError):
        return InputError(
            f"{path.name}: may not be read. Change its permissions.", code="E_IO_PERMISSION"
        )
    reason = os.strerror(problem.errno) if problem.errno else str(problem)
    loop = "symbolic link" in reason.lower()
    # Sockets cannot be opened at all (ENXIO), which is the same fault as opening a pipe.
    code = "E_PATH_LOOP" if loop else "E_PATH_NOTFILE"
    return InputError(f"{path.name}: cannot be opened ({reason}).", code=code)


class PayloadReader:
    """Sequential reader of a plain or gzip-compressed file.

    Use as a context manager: read the header, then the voxels, then call ``finish``, which proves
    that the stream ends where it should and that the file did not change meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.findings: list[Finding] = []
        self._file = open_regular(path)
        self._before = _identity(self._file)
        self.file_bytes = self._before[0]
        try:
            start = self._file.read(len(GZIP_MAGIC))
            self._file.seek(0)
        except OSError as problem:
            self._file.close()
            raise self._unreadable(problem) from problem
        if self.file_bytes == 0:
            self._file.close()
            raise InputError(f"{path.name}: is empty (0 bytes). Copy it again.", code="E_IO_EMPTY")
        self.is_gzip = start == GZIP_MAGIC
        self._inflater: Any = _new_inflater() if self.is_gzip else None
        self._pending = b""
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def most_bytes(self) -> int:
        """The most decoded bytes this file can possibly hold."""
        return self.file_bytes * (DEFLATE_MAX_RATIO if self.is_gzip else 1)

    def read(self, count: int) -> bytes:
        """Return up to ``count`` decoded bytes; fewer only at the end of the stream."""
        parts = []
        while count > 0:
            part = self._next(min(count, CHUNK_BYTES))
            if not part:
                break
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def read_into(self, target: memoryview) -> int:
        """Fill ``target`` with decoded bytes and return how many there were."""
        if not self.is_gzip:
            return self._read_plain_into(target)
        filled = 0
        while filled < len(target):
            part = self._next(min(len(target) - filled, CHUNK_BYTES))
            if not part:
                break
            target[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def skip(self, count: int) -> int:
        """Pass over ``count`` decoded bytes and return how many there were."""
        skipped = 0
        while skipped < count:
            part = self._next(min(count - skipped, CHUNK_BYTES))
            if not part:
                break
            skipped += len(part)
        return skipped

    def prove_rest(self) -> None:
        """Decode on, within a bound, to learn whether a compressed stream is damaged.

        Raises:
            InputError: it is; that explains a senseless header better than the header does.
        """
        if self.is_gzip:
            self.skip(PROOF_BYTES_LIMIT)

    def finish(self) -> None:
        """Require the end of the stream here, with correct checksums, in an unchanged file.

        Raises:
            InputError: far too many bytes, a damaged or unfinished stream, or a changed file.
        """
        trailing = self.read(TRAILING_BYTES_LIMIT)
        if len(trailing) == TRAILING_BYTES_LIMIT and self._next(1):
            raise InputError(
                f"{self._path.name}: holds over {TRAILING_BYTES_LIMIT} bytes more than its header "
                "describes. Write the file again from its source.",
                code="E_IO_TRAILING",
            )
        if trailing:
            self._note_trailing(len(trailing), zeros=not trailing.strip(b"\0"))
        if _identity(self._file) != self._before or self._replaced():
            raise InputError(
                f"{self._path.name}: changed while it was being read. Wait until it is complete.",
                code="E_IO_CHANGED",
            )

    def _replaced(self) -> bool:
        try:
            now = self._path.stat()
        except OSError:
            return True
        return (now.st_size, now.st_mtime_ns, now.st_ino) != self._before

    def _read_plain_into(self, target: memoryview) -> int:
        filled = 0
        try:
            while filled < len(target):
                got = self._file.readinto(target[filled:])  # type: ignore[attr-defined]
                if not got:
                    break
                filled += got
        except OSError as problem:
            raise self._unreadable(problem) from problem
        return filled

    def _next(self, limit: int) -> bytes:
        """One decoded piece of at most ``limit`` bytes, empty at the end."""
        if not self.is_gzip:
            return self._raw(limit)
        while not self._ended:
            if self._inflater.eof:
                self._next_member()
                continue
            source = self._pending or self._raw(CHUNK_BYTES >> 2)
            if not source:
                raise InputError(
                    f"{self._path.name}: the compressed data ends too early. Copy it again.",
                    code="E_IO_TRUNCATED",
                )
            piece = self._inflate(source, limit)
            if piece:
                return piece
        return b""

    def _inflate(self, source: bytes, limit: int) -> bytes:
        try:
            piece: bytes = self._inflater.decompress(source, limit)
        except Exception as problem:  # each inflate library has its own error class
            raise InputError(
                f"{self._path.name}: the compressed data is damaged ({problem}). Copy it again.",
                code="E_IO_CORRUPT",
            ) from problem
        inflater = self._inflater
        self._pending = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        return piece

    def _next_member(self) -> None:
        """After a complete gzip member: start the next one, or note what else follows."""
        rest = self._pending or self._raw(CHUNK_BYTES >> 2)
        if len(rest) == 1:
            rest += self._raw(CHUNK_BYTES >> 2)
        if rest.startswith(GZIP_MAGIC):
            self._inflater = _new_inflater()
            self._pending = rest
            return
        self._ended = True
        self._pending = b""
        if rest:
            zeros = not rest.strip(b"\0")
            total = len(rest)
            while more := self._raw(CHUNK_BYTES):
                zeros = zeros and not more.strip(b"\0")
                total += len(more)
            self._note_trailing(total, zeros=zeros)

    def _note_trailing(self, count: int, *, zeros: bool) -> None:
        kind = "zero bytes" if zeros else "bytes that belong to nothing"
        self.findings.append(
            Finding(code="W_IO_TRAILING", message=f"{count} {kind} follow the data; ignored.")
        )

    def _raw(self, limit: int) -> bytes:
        try:
            return self._file.read(limit)
        except OSError as problem:
            raise self._unreadable(problem) from problem

    def _unreadable(self, problem: OSError) -> InputError:
        return InputError(
            f"{self._path.name}: cannot be read ({problem.strerror or problem}).", code="E_IO_READ"
        )


def _identity(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _new_inflater() -> Any:
    return _deflate_module().decompressobj(_GZIP_WINDOW_BITS)


def compress_gzip(parts: list[bytes | memoryview]) -> bytes:
    """Compress into one gzip member without name or time, so that equal input gives equal bytes."""
    compressor = _deflate_module().compressobj(1, 8, _GZIP_WINDOW_BITS)
    output = [compressor.compress(part) for part in parts]
    output.append(compressor.flush())
    return b"".join(output)


def _deflate_module() -> Any:
    # isal inflates twice and deflates eight times as fast; the standard library is equivalent.
    try:
        from isal import isal_zlib
    except ImportError:
        import zlib

        return zlib
    return isal_zlib
