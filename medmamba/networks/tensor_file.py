"""The layout of safetensors files, judged before a library reads them. No torch."""

import json
from pathlib import Path

from medmamba.errors import BundleError

MAX_HEADER_BYTES = 64 * 2**20
"""Largest safetensors header that is parsed; those of real networks are far below 1 MiB."""

TENSOR_TYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})


def check_tensor_file(path: Path) -> None:
    """Check the layout of a safetensors file without reading its tensors.

    Raises:
        BundleError: the header is too large or damaged, a type is unknown, or bytes are missing.
    """
    length = path.stat().st_size
    with path.open("rb") as handle:
        header_bytes = header_length(handle.read(8), path)
        try:
            header = json.loads(handle.read(header_bytes))
            entries = [value for key, value in header.items() if key != "__metadata__"]
            end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
            types = {str(entry["dtype"]) for entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BundleError(f"{path}: header is damaged ({error!r}). Copy it again.") from error
    if unknown := types - TENSOR_TYPES:
        raise BundleError(f"{path}: tensor type {sorted(unknown)[0]!r} is not known.")
    if 8 + header_bytes + end != length:
        raise BundleError(
            f"{path}: has {length} bytes, its header describes {8 + header_bytes + end}. "
            "Copy the file again."
        )


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
