"""Preprocessed cases on disk: chunked blosc2 arrays, so that a patch is read alone.

One case is four files in one folder: ``<case>.b2nd`` (C, d, h, w), ``<case>_seg.b2nd``
(1, d, h, w), ``<case>_locations.b2nd`` (n, 3) and ``<case>.json``, which is written last and
makes the case exist. Chunking follows nnU-Net's, so its own loader reads the arrays.
"""

from dataclasses import dataclass
from errno import EIO
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import blosc2  # noqa: TID251
import numpy as np
from numpy.typing import NDArray

from medmamba.errors import DatasetError
from medmamba.files import (
    RECORD_CONFIG,
    from_plain,
    read_json,
    remove_leftovers,
    replace_atomic,
    to_json,
    write_atomic,
)
from medmamba.preprocessing.locations import ClassLocations
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord

LARGEST_BLOCK_BYTES = 128 * 1024
"""A block is what one read decompresses; it should stay in the second-level cache."""

LARGEST_CHUNK_BYTES = 6 * 1024 * 1024
"""A chunk is what one read opens; about the third-level cache of one core."""

CHUNK_PER_PATCH = 1.5
"""Chunks may exceed the patch by this factor per axis (nnU-Net's storage rule)."""

COMPRESSION_LEVEL = 5
CHECKSUM_BLOCK_BYTES = 1 << 20
SIDECAR_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The JSON beside the arrays of a case.

    Args:
        key: hash of everything the arrays were made from.
        locations: per class, its label values and how many rows it has, in row order.
        files: name of each array's file -> its size in bytes and its CRC-32.
    """

    __pydantic_config__ = RECORD_CONFIG

    format: int
    key: str
    record: UndoRecord
    has_labels: bool
    locations: tuple[tuple[tuple[int, ...], int], ...]
    files: dict[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredCase:
    """A stored case, open for reading; slicing an array reads only what it covers.

    Args:
        data: (C, d, h, w) float32.
        labels: (1, d, h, w) int16, or None.
    """

    data: blosc2.NDArray
    labels: blosc2.NDArray | None
    class_locations: ClassLocations
    record: UndoRecord

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the working axes."""
        return self.record.working_shape


class CaseStore:
    """A folder of preprocessed cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self, case_id: str, case: PreprocessedCase, *, key: str, patch_size: tuple[int, ...]
    ) -> None:
        """Store a case so that it exists wholly or not at all.

        Args:
            case_id: becomes the name of the files.
            case: the arrays, and how they were made.
            key: hash of what the case was made from; see `has`.
            patch_size: what will be read at once; chunks are fitted to it.

        Raises:
            EnvironmentFault: the folder cannot be written.
        """
        self._sidecar_path(case_id).unlink(missing_ok=True)
        patch = (1,) * (3 - len(patch_size)) + tuple(patch_size)
        _write_array(self._data_path(case_id), case.data, patch)
        if case.labels is not None:
            _write_array(self._labels_path(case_id), case.labels, patch)
        rows = [np.zeros((0, 3), np.int32), *case.class_locations.values()]
        _write_rows(self._locations_path(case_id), np.concatenate(rows).astype(np.int32))
        sidecar = Sidecar(
            format=SIDECAR_FORMAT,
            key=key,
            record=case.record,
            has_labels=case.labels is not None,
            locations=tuple((name, len(found)) for name, found in case.class_locations.items()),
            files={path.name: _checksum(path) for path in self._array_paths(case_id, case)},
        )
        write_atomic(self._sidecar_path(case_id), to_json(sidecar))

    def has(self, case_id: str, key: str) -> bool:
        """Tell whether the case is stored undamaged and was made from what ``key`` stands for."""
        path = self._sidecar_path(case_id)
        if not path.is_file():
            return False
        try:
            sidecar = self._read_sidecar(case_id)
        except DatasetError:
            return False
        return sidecar.key == key and all(
            (self.folder / name).is_file() and _checksum(self.folder / name) == expected
            for name, expected in sidecar.files.items()
        )

    def remove_leftovers(self) -> None:
        """Delete what a killed run was writing; nobody else may be writing to the store."""
        remove_leftovers(self.folder)

    def case_ids(self) -> tuple[str, ...]:
        """List the stored cases, sorted."""
        return tuple(sorted(path.stem for path in self.folder.glob("*.json")))

    def content(self, case_id: str) -> tuple[int, int]:
        """Return size and checksum of a case's image, equal for copies of one image.

        Raises:
            DatasetError: the case is not in the store.
        """
        return self._read_sidecar(case_id).files[self._data_path(case_id).name]

    def open(self, case_id: str) -> StoredCase:
        """Open a case without reading its voxels.

        Raises:
            DatasetError: the case is not in the store, or its files are damaged.
        """
        sidecar = self._read_sidecar(case_id)
        for file, (size, _) in sidecar.files.items():
            _require_size(self.folder / file, size)
        rows = read_array(self._locations_path(case_id))
        locations: ClassLocations = {}
        start = 0
        for name, count in sidecar.locations:
            locations[name] = rows[start : start + count]
            start += count
        return StoredCase(
            data=_open_array(self._data_path(case_id)),
            labels=_open_array(self._labels_path(case_id)) if sidecar.has_labels else None,
            class_locations=locations,
            record=sidecar.record,
        )

    def _read_sidecar(self, case_id: str) -> Sidecar:
        what = f"preprocessed case {case_id}"
        content = read_json(self._sidecar_path(case_id), what=what, error=DatasetError)
        return from_plain(Sidecar, content, what=what, error=DatasetError)

    def _array_paths(self, case_id: str, case: PreprocessedCase) -> list[Path]:
        paths = [self._data_path(case_id), self._locations_path(case_id)]
        return paths if case.labels is None else [*paths, self._labels_path(case_id)]

    def _data_path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}.b2nd"

    def _labels_path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}_seg.b2nd"

    def _locations_path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}_locations.b2nd"

    def _sidecar_path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}.json"


@dataclass(frozen=True, kw_only=True)
class PreviousSidecar:
    """The JSON beside a coarse network's labels: what made them."""

    __pydantic_config__ = RECORD_CONFIG

    key: str


class PreviousStore:
    """A folder of labels that the coarse network of a cascade gave to preprocessed cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        case_id: str,
        labels: NDArray[np.unsignedinteger],
        *,
        key: str,
        patch_size: tuple[int, ...],
    ) -> None:
        """Store labels (d, h, w) so that they exist wholly or not at all.

        Raises:
            EnvironmentFault: the folder cannot be written.
        """
        self._sidecar_path(case_id).unlink(missing_ok=True)
        _write_array(self._path(case_id), labels[None].astype(np.int16), patch_size)
        write_atomic(self._sidecar_path(case_id), to_json(PreviousSidecar(key=key)))

    def has(self, case_id: str, key: str) -> bool:
        """Tell whether the case's labels are there and were made by what ``key`` stands for."""
        path = self._sidecar_path(case_id)
        if not path.is_file():
            return False
        content = read_json(path, what=f"previous stage of {case_id}", error=DatasetError)
        return isinstance(content, dict) and content.get("key") == key

    def open(self, case_id: str) -> blosc2.NDArray:
        """Open labels (1, d, h, w) without reading their voxels.

        Raises:
            DatasetError: they are not there, or damaged.
        """
        return _open_array(self._path(case_id))

    def _path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}.b2nd"

    def _sidecar_path(self, case_id: str) -> Path:
        return self.folder / f"{case_id}.json"


def read_array(path: Path) -> NDArray[Any]:
    """Read a whole array, of this store or of nnU-Net's folders.

    Raises:
        DatasetError: the file is missing or damaged.
    """
    array = _open_array(path)
    try:
        return np.asarray(array[:])
    except (OSError, RuntimeError, ValueError) as problem:
        raise _damaged(path, problem) from problem


def array_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of a stored array.

    Raises:
        DatasetError: the file is missing or damaged.
    """
    return tuple(int(size) for size in _open_array(path).shape)


def _checksum(path: Path) -> tuple[int, int]:
    found = size = 0
    with path.open("rb") as handle:
        while block := handle.read(CHECKSUM_BLOCK_BYTES):
            found, size = crc32(block, found), size + len(block)
    return size, found


def _require_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        raise DatasetError(
            f"{path}: {'is missing' if found is None else f'has {found} bytes'}, {size} were "
            "written. Run medmamba plan again; it makes damaged cases anew.",
            code="E_STORE_DAMAGED",
        )


def _open_array(path: Path) -> blosc2.NDArray:
    try:
        return blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))
    except (OSError, RuntimeError, ValueError) as problem:
        raise _damaged(path, problem) from problem


def _damaged(path: Path, problem: Exception) -> DatasetError:
    return DatasetError(
        f"{path}: cannot be opened as a blosc2 array ({problem}). "
        "Delete the folder of preprocessed cases and make them again.",
        code="E_STORE_DAMAGED",
    )


def chunk_shapes(
    shape: tuple[int, ...], patch_size: tuple[int, ...], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose chunk and block shapes for reading patches out of an array.

    Blocks start as the patch with edges rounded up to powers of two and are halved along the edge
    largest in relation to the patch until they fit; chunks grow from a block, one block at a time,
    along the edge smallest in relation to the patch.

    Args:
        shape: (C, d, h, w); every channel is stored by itself.
        patch_size: (d, h, w).
        itemsize: bytes per voxel.

    Returns:
        Chunk shape and block shape.
    """
    block = [1 << (edge - 1).bit_length() for edge in patch_size]
    while prod(block) * itemsize > LARGEST_BLOCK_BYTES:
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: block[a] / patch_size[a])
        block[axis] //= 2
    block = [min(edge, size) for edge, size in zip(block, shape[1:], strict=True)]
    chunk = list(block)
    while True:
        growable = [
            axis
            for axis in range(3)
            if chunk[axis] < shape[axis + 1]
            and chunk[axis] < CHUNK_PER_PATCH * patch_size[axis]
            and prod(chunk) // chunk[axis] * (chunk[axis] + block[axis]) * itemsize
            <= LARGEST_CHUNK_BYTES
        ]
        if not growable:
            break
        axis = min(growable, key=lambda a: chunk[a] / patch_size[a])
        chunk[axis] = min(chunk[axis] + block[axis], shape[axis + 1])
    return (1, *chunk), (1, *block)


def _write_array(path: Path, array: NDArray[np.generic], patch: tuple[int, ...]) -> None:
    chunks, blocks = chunk_shapes(array.shape, patch, array.itemsize)
    _save(path, array, chunks, blocks)


def _write_rows(path: Path, rows: NDArray[np.int32]) -> None:
    shape = (max(len(rows), 1), 3)
    _save(path, rows, shape, shape)


def _save(
    path: Path, array: NDArray[np.generic], chunks: tuple[int, ...], blocks: tuple[int, ...]
) -> None:
    # One thread: with several the order of blocks, and so the bytes, would change between runs.
    parameters = blosc2.CParams(
        codec=blosc2.Codec.LZ4,
        clevel=COMPRESSION_LEVEL,
        filters=[blosc2.Filter.SHUFFLE],
        nthreads=1,
    )
    whole = np.ascontiguousarray(array)

    def write(temporary: Path) -> None:
        try:
            blosc2.asarray(
                whole,
                urlpath=str(temporary),
                mode="w",
                chunks=chunks,
                blocks=blocks,
                cparams=parameters,
            )
        except RuntimeError as error:
            # blosc2 does not say why it could not write; the system does where it is asked to
            # take more than what that would have been.
            with temporary.open("wb") as handle:
                for _ in range(2):
                    handle.write(whole.data)
            raise OSError(EIO, f"blosc2: {error}") from error

    replace_atomic(path, write)
