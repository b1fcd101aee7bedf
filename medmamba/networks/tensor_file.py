"""The layout of safetensors files, judged before a library reads them. No torch."""

import json
from pathlib import Path
from typing import Any

from medmamba.errors import BundleError

METADATA_KEY = "medmamba"
"""All metadata is one JSON string: safetensors writes several entries in random order."""

MAX_HEADER_BYTES = 64 * 2**20
"""Largest safetensors header that is parsed; those of real networks are far below 1 MiB."""

METADATA = "__metadata__"
"""Key of the header that safetensors keeps for text."""

TENSOR_TYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})


def check_tensor_file(path: Path) -> None:
    """Check the layout of a safetensors file without reading its tensors.

    Raises:
        BundleError: the header is too large or damaged, a type is unknown, or bytes are missing.
    """
    length = path.stat().st_size
    header, header_bytes = _read_header(path)
    try:
        entries = [value for key, value in header.items() if key != METADATA]
        end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        types = {str(entry["dtype"]) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, error) from error
    if unknown := types - TENSOR_TYPES:
        raise BundleError(f"{path}: tensor type {sorted(unknown)[0]!r} is not known.")
    if 8 + header_bytes + end != length:
        raise BundleError(
            f"{path}: has {length} bytes, its header describes {8 + header_bytes + end}. "
            "Copy the file again."
        )


def load_metadata(path: Path) -> dict[str, str]:
    """Read what ``save_weights`` was given as metadata, without reading tensors.

    Raises:
        BundleError: the file is missing, truncated or no safetensors file.
    """
    try:
        header, _ = _read_header(path)
    except FileNotFoundError as error:
        raise BundleError(f"weights {path} do not exist.") from error
    try:
        values = json.loads(header.get(METADATA, {}).get(METADATA_KEY, "{}"))
        return {str(key): str(value) for key, value in values.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from error


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as handle:
        header_bytes = header_length(handle.read(8), path)
        try:
            header = json.loads(handle.read(header_bytes))
        except ValueError as error:
            raise _damaged(path, error) from error
    if not isinstance(header, dict):
        raise _damaged(path, TypeError(type(header).__name__))
    return header, header_bytes


def _damaged(path: Path, error: Exception) -> BundleError:
    return BundleError(f"{path}: header is damaged ({error!r}). Copy it again.")


def header_length(prefix: bytes, path: Path) -> int:
    """Return the length of the header that the first eight bytes of a file claim.

    Raises:
        BundleError: no header of that length can be there.
    """
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, path.stat().st_size - 8)
    if len(prefix) < 8 or length > limit:
        raise BundleError(
            f"{path}: claims a header of {length} bytes; at most {max(0, limit)} are possible. "
            "Copy the file again."
        )
    return length
