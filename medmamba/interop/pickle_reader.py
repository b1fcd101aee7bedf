"""Read foreign ``.pth`` files without running what they contain.

A pickle is a program. This reader knows a short list of names a program may use (tensors, plain
containers, numpy values, torch's devices, types and sizes); the first other name ends the reading
before anything of it is imported or called. Only torch's zip format is read.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from medmamba.errors import BundleError, DatasetError, MedMambaError, SecurityError

STORAGE_TYPES: dict[str, torch.dtype] = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*STORAGE_TYPES.values(), torch.complex64, torch.complex128)
}

NUMPY_KINDS = "biufcSU"
"""Kinds of numpy type that hold plain values; "O" holds arbitrary objects."""


def read_foreign_pickle(path: Path) -> Any:
    """Return the content of a file written by ``torch.save``; tensors are on the CPU.

    Raises:
        SecurityError: the pickle uses a name outside the allow-list; nothing of it was run.
        BundleError: the file is missing, damaged, or not of torch's zip format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path)
    except MedMambaError:
        raise
    except FileNotFoundError as error:
        raise BundleError(f"checkpoint {path} does not exist.") from error
    except zipfile.BadZipFile as error:
        raise BundleError(
            f"checkpoint {path} is not in torch's zip format ({error}). Copy it again; if it is of "
            "before torch 1.6, load it where you trust it and save it again."
        ) from error
    except Exception as error:
        # A damaged pickle fails in as many ways as there are opcodes.
        raise BundleError(f"checkpoint {path} is damaged ({error!r}). Copy it again.") from error


def read_plain_pickle(path: Path) -> Any:
    """Return the content of a plain pickle of numbers, text, containers and NumPy arrays.

    Raises:
        SecurityError: the pickle uses a name outside the allow-list; nothing of it was run.
        DatasetError: the file is missing or damaged.
    """
    try:
        with path.open("rb") as program:
            return _Reader(program, None, "", path).load()
    except MedMambaError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"{path} does not exist.") from error
    except Exception as error:
        # A damaged pickle fails in as many ways as there are opcodes.
        raise DatasetError(f"{path} is damaged ({error!r}). Copy it again.") from error


def _read_archive(archive: zipfile.ZipFile, path: Path) -> Any:
    programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise BundleError(f"checkpoint {path} holds {len(programs)} pickles, one expected.")
    prefix = programs[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise BundleError(f"checkpoint {path} is big-endian; save it on a little-endian machine.")
    with archive.open(programs[0]) as program:
        return _Reader(program, archive, prefix, path).load()


class _Reader(pickle.Unpickler):
    """An unpickler that resolves names from a fixed table and storages from the archive."""

    def __init__(
        self, program: Any, archive: zipfile.ZipFile | None, prefix: str, path: Path
    ) -> None:
        super().__init__(program)
        self.archive, self.prefix, self.path = archive, prefix, path
        self.storages: dict[str, Tensor] = {}
        self.table = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name of the allow-list."""
        found = self.table.get((module, name))
        if found is None:
            self._refuse(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Tensor:
        """Return a storage as a flat tensor."""
        kind, dtype, key, _, _ = pid
        is_storage = kind == "storage" and isinstance(dtype, _StorageType) and isinstance(key, str)
        if not is_storage or self.archive is None:
            self._refuse(f"storage {kind!r}")
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.prefix}data/{key}"))
            self.storages[key] = (
                torch.frombuffer(content, dtype=dtype.dtype)
                if content
                else torch.empty(0, dtype=dtype.dtype)
            )
        return self.storages[key]

    def _refuse(self, what: str) -> NoReturn:
        raise SecurityError(
            f"checkpoint {self.path}: it uses {what}, which no checkpoint needs; nothing of it "
            "was run. Ask whoever gave it to you for weights as safetensors."
            if self.archive is not None
            else f"{self.path}: it uses {what}, which no properties of a case need; nothing of it "
            "was run. Preprocess the case again."
        )


class _StorageType:
    """Stands for a class of torch storages."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _allowed() -> Mapping[tuple[str, str], Any]:
    """Build the allow-list anew for each file, of objects whose change would reach nobody else."""
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch._utils", "_rebuild_tensor_v2"): _private(_rebuild_tensor),
        ("torch._utils", "_rebuild_parameter"): _private(_rebuild_parameter),
        ("numpy", "dtype"): _private(_plain_dtype),
        ("numpy", "ndarray"): np.ndarray,
        ("_codecs", "encode"): _private(_encode_latin1),
    }
    for kind in (set, frozenset, complex, bytearray):
        # Protocol 2, which torch writes, calls the module by its old name.
        table["builtins", kind.__name__] = table["__builtin__", kind.__name__] = kind
    for name, dtype in STORAGE_TYPES.items():
        table["torch", name] = table["torch.storage", name] = _StorageType(dtype)
    for name, dtype in DTYPES.items():
        table["torch", name] = dtype
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "scalar"] = _private(_numpy_scalar)
        table[f"{core}.multiarray", "_reconstruct"] = _private(_numpy_array)
        table[f"{core}.numeric", "_frombuffer"] = _private(_numpy_from_buffer)
    return table


def _private(function: Callable[..., Any]) -> Callable[..., Any]:
    # A pickle can set attributes on what it names, so it never gets a shared function.
    return lambda *arguments: function(*arguments)


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    # as_strided refuses what reaches beyond the storage.
    return torch.as_strided(storage, size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _plain_dtype(name: str, *_: Any) -> np.dtype[Any]:
    # A copy, because the byte order follows in a BUILD instruction.
    dtype = np.dtype(str(name), False, True)
    if dtype.kind not in NUMPY_KINDS:
        raise SecurityError(f"a numpy type {name!r} in a checkpoint can hold arbitrary objects.")
    return dtype


def _numpy_scalar(dtype: np.dtype[Any], content: bytes = b"") -> Any:
    return np.frombuffer(content, dtype=_plain_dtype(dtype.str), count=1)[0]


def _numpy_array(*_: Any) -> np.ndarray[Any, Any]:
    # Shape, type and values follow in the pickle's BUILD instruction, which numpy checks.
    return np.empty(0, dtype=np.uint8)


def _numpy_from_buffer(
    content: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: str
) -> np.ndarray[Any, Any]:
    # What protocol 5 writes in place of _reconstruct.
    flat = np.frombuffer(content, dtype=_plain_dtype(dtype.str))
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise SecurityError(f"encoding {encoding!r} in a checkpoint; only latin1 is expected.")
    return text.encode("latin1")
