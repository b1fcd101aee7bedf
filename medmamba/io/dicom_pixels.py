"""Pixels of a DICOM series: decoded by the codec of their syntax, and rescaled per slice."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError
from medmamba.io.dicom_files import Entry
from medmamba.io.dicom_headers import open_dataset, pydicom_module
from medmamba.io.dicom_series import Plane

END_OF_CODESTREAM = b"\xff\xd9"
"""Last marker of a JPEG, JPEG-LS and JPEG 2000 stream (ITU T.81, T.87, T.800)."""
RLE_SYNTAX = "1.2.840.10008.1.2.5"
JPEG_SYNTAXES = "1.2.840.10008.1.2.4."
EXPLICIT_LITTLE, IMPLICIT_LITTLE = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
UNCOMPRESSED = (EXPLICIT_LITTLE, IMPLICIT_LITTLE, DEFLATED, BIG_ENDIAN)


def read_planes(planes: tuple[Plane, ...]) -> NDArray[np.generic]:
    """Return values as (D, H, W): whole numbers where every slice's rescaling keeps them whole.

    Raises:
        InputError: pixels are missing, damaged, or in a syntax that no codec here knows.
    """
    whole = all(plane.slope == 1.0 and plane.intercept.is_integer() for plane in planes)
    wide = max(plane.bits for plane in planes) > 16
    kind: Any = (np.int64 if wide else np.int32) if whole else np.float32
    values = np.empty((len(planes), *planes[0].shape), dtype=kind)
    current: tuple[Entry, _Frames] | None = None
    for index, plane in enumerate(planes):
        if current is None or current[0] != plane.entry:
            current = (plane.entry, _Frames(plane.entry))
        stored = current[1].frame(plane.frame)
        if stored.shape != plane.shape:
            raise _broken(plane.entry, "decodes to another size than its header states")
        if whole:
            np.add(stored, int(plane.intercept), out=values[index], dtype=kind, casting="unsafe")
        else:
            values[index] = stored.astype(np.float64) * plane.slope + plane.intercept
    return _narrowed(values) if whole else values


def _narrowed(values: NDArray[np.generic]) -> NDArray[np.generic]:
    limits = np.iinfo(np.int16)
    if limits.min <= values.min() and values.max() <= limits.max:
        return values.astype(np.int16)
    return values


class _Frames:
    """The frames of one file."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._dataset = open_dataset(entry)
        self._syntax = _syntax_of(self._dataset)
        self._count = int(self._dataset.get("NumberOfFrames") or 1)
        raw = self._dataset.get_item("PixelData")
        # pydicom takes what there is; the length as stated is in the raw element only.
        stated = getattr(raw, "length", None)
        data = self._dataset.get("PixelData")
        if not data:
            raise InputError(
                f"{entry.name}: ends before its pixels are complete. Copy it again.",
                code="E_IO_TRUNCATED",
            )
        self._decoder = _decoder(self._syntax, entry)
        if self._syntax in UNCOMPRESSED:
            self._require_length(len(data) if stated is None else int(stated))

    def frame(self, index: int) -> NDArray[np.generic]:
        """Stored values (H, W) of a frame."""
        if self._syntax.startswith(JPEG_SYNTAXES):
            self._require_end(index)
        try:
            array, _ = self._decoder.as_array(self._dataset, index=index, raw=True)
        except Exception as problem:  # each codec has its own error classes
            raise _broken(
                self._entry, f"pixels cannot be decoded ({type(problem).__name__})"
            ) from (problem)
        values: NDArray[np.generic] = np.asarray(array)
        return values

    def _require_length(self, found: int) -> None:
        dataset = self._dataset
        bits = int(dataset.Rows) * int(dataset.Columns) * int(dataset.get("BitsAllocated") or 0)
        needed = (bits * self._count * int(dataset.get("SamplesPerPixel") or 1) + 7) // 8
        # An odd number of bytes is padded to an even one.
        if found not in (needed, needed + needed % 2) or len(dataset.PixelData) < needed:
            raise InputError(
                f"{self._entry.name}: pixels need {needed} bytes, the file states {found} and "
                f"holds {len(dataset.PixelData)}. Copy it again.",
                code="E_IO_TRUNCATED",
            )

    def _require_end(self, index: int) -> None:
        """Some codecs fill up a stream that was cut off, in silence."""
        encaps = pydicom_module().encaps
        try:
            stream = encaps.get_frame(self._dataset.PixelData, index, number_of_frames=self._count)
        except Exception as problem:
            raise _broken(self._entry, "the list of its frames is damaged") from problem
        if not stream.rstrip(b"\0").endswith(END_OF_CODESTREAM):
            raise InputError(
                f"{self._entry.name}: compressed pixels end too early. Copy it again.",
                code="E_IO_TRUNCATED",
            )


def _syntax_of(dataset: Any) -> str:
    stated = str(getattr(dataset.file_meta, "TransferSyntaxUID", "") or "")
    if stated:
        return stated
    # Old files without a header of their own; pydicom has found out how they are encoded.
    implicit, little = dataset.original_encoding
    guessed = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE if little else BIG_ENDIAN
    dataset.file_meta.TransferSyntaxUID = pydicom_module().uid.UID(guessed)
    return guessed


def _decoder(syntax: str, entry: Entry) -> Any:
    import pydicom.pixels  # noqa: TID251

    try:
        decoder = pydicom.pixels.get_decoder(pydicom_module().uid.UID(syntax))
        known = bool(decoder.is_available)
    except NotImplementedError:
        known = False
    if not known:
        name = str(pydicom_module().uid.UID(syntax).name)
        raise InputError(
            f"{entry.name}: no codec here reads its transfer syntax ({name[:80]}). Install the "
            "extra 'dicom', or export the series uncompressed.",
            code="E_DCM_SYNTAX",
        )
    return decoder


def _broken(entry: Entry, text: str) -> InputError:
    return InputError(f"{entry.name}: {text}. Copy it again.", code="E_IO_CORRUPT")
