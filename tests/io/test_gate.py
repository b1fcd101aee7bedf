"""The input gate, row by row: what a damaged, dubious or unusual file must lead to."""

import gzip
import math
import os
import socket
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medmamba import io
from medmamba.errors import InputError
from medmamba.io.payload import PayloadReader

HEADER = 352
Spoil = Callable[[bytes], bytes]


def patch(raw: bytes, name: str, *values: object) -> bytes:
    offsets = {
        "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
        "vox_offset": (108, "f"), "slope": (112, "f"), "inter": (116, "f"), "units": (123, "b"),
        "qcode": (252, "h"), "scode": (254, "h"), "quatern": (256, "3f"), "srow": (280, "12f"),
        "magic": (344, "4s"),
    }  # fmt: skip
    offset, layout = offsets[name]
    block = struct.pack("<" + layout, *values)
    return raw[:offset] + block + raw[offset + len(block) :]


def packed(raw: bytes) -> bytes:
    return gzip.compress(raw, 1, mtime=0)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def members(raw: bytes) -> bytes:
    return packed(raw[:1000]) + packed(raw[1000:5000]) + packed(b"") + packed(raw[5000:])


def only(raw: bytes, transform: str) -> bytes:
    return patch(raw, "scode" if transform == "q" else "qcode", 0)


# Row of the fault table, file name, how the good file is spoiled, error code.
REJECTED: list[tuple[str, str, Spoil, str]] = [
    ("A1", "x.nii.gz", lambda raw: packed(raw)[: len(packed(raw)) // 2], "E_IO_TRUNCATED"),
    ("A1 tail", "x.nii.gz", lambda raw: packed(raw)[:-4], "E_IO_TRUNCATED"),
    ("A1 data", "x.nii.gz", lambda raw: packed(raw[:-100]), "E_IO_TRUNCATED"),
    ("A2", "x.nii", lambda raw: raw[: len(raw) // 2], "E_IO_TRUNCATED"),
    ("A2 byte", "x.nii", lambda raw: raw[:-1], "E_IO_TRUNCATED"),
    ("A3", "x.nii", lambda raw: raw[:HEADER], "E_IO_TRUNCATED"),
    ("A3 348", "x.nii", lambda raw: raw[:348], "E_IO_TRUNCATED"),
    ("A3 gz", "x.nii.gz", lambda raw: packed(raw[:HEADER]), "E_IO_TRUNCATED"),
    ("A4", "x.nii", lambda raw: raw[:200], "E_HDR_SHORT"),
    ("A4 gz", "x.nii.gz", lambda raw: packed(raw[:200]), "E_HDR_SHORT"),
    ("A5", "x.nii.gz", lambda raw: b"", "E_IO_EMPTY"),
    ("A5 nii", "x.nii", lambda raw: b"", "E_IO_EMPTY"),
    ("A6", "x.nii.gz", lambda raw: flipped(packed(raw), len(packed(raw)) // 2), "E_IO_CORRUPT"),
    ("A7", "x.nii.gz", lambda raw: flipped(packed(raw), len(packed(raw)) - 6), "E_IO_CORRUPT"),
    ("A7 size", "x.nii.gz", lambda raw: flipped(packed(raw), len(packed(raw)) - 2), "E_IO_CORRUPT"),
    ("A10", "x.nii.gz", lambda raw: b"<!DOCTYPE html><html>404</html>\n" * 20, "E_IO_FORMAT"),
    ("A10 short", "x.nii.gz", lambda raw: b"not found\n", "E_IO_FORMAT"),
    ("A14", "x.nii.gz", lambda raw: packed(raw + bytes(100_000)), "E_IO_TRAILING"),
    ("A15", "x.nii.gz", lambda raw: packed(patch(raw, "dim", 3, *[32767] * 3, 1, 1, 1, 1)),
     "E_LIMIT_VOXELS"),
    ("B1", "x.nii", lambda raw: patch(raw, "magic", b"n+9\0"), "E_HDR_MAGIC"),
    ("B1 analyze", "x.nii", lambda raw: patch(raw, "magic", b"\0\0\0\0"), "E_HDR_MAGIC"),
    ("B2", "x.nii", lambda raw: patch(raw, "datatype", 9999), "E_HDR_DTYPE"),
    ("B2 bits", "x.nii", lambda raw: patch(raw, "bitpix", 8), "E_HDR_DTYPE"),
    ("B3 0", "x.nii", lambda raw: patch(raw, "dim", 0, 20, 24, 16, 1, 1, 1, 1), "E_HDR_DIM"),
    ("B3 9", "x.nii", lambda raw: patch(raw, "dim", 9, 20, 24, 16, 1, 1, 1, 1), "E_HDR_DIM"),
    ("B3 neg", "x.nii", lambda raw: patch(raw, "dim", 3, 20, -24, 16, 1, 1, 1, 1), "E_HDR_DIM"),
    ("B3 zero", "x.nii", lambda raw: patch(raw, "dim", 3, 20, 24, 0, 1, 1, 1, 1), "E_HDR_DIM"),
    ("B4 neg", "x.nii", lambda raw: patch(raw, "vox_offset", -16.0), "E_HDR_OFFSET"),
    ("B4 nan", "x.nii", lambda raw: patch(raw, "vox_offset", math.nan), "E_HDR_OFFSET"),
    ("B4 far", "x.nii", lambda raw: patch(raw, "vox_offset", 1e6), "E_HDR_OFFSET"),
    ("B4 far gz", "x.nii.gz", lambda raw: packed(patch(raw, "vox_offset", 1e6)), "E_HDR_OFFSET"),
    ("B4 small", "x.nii", lambda raw: patch(raw, "vox_offset", 0.0), "E_HDR_OFFSET"),
    ("B4 inf", "x.nii", lambda raw: patch(raw, "vox_offset", math.inf), "E_HDR_OFFSET"),
    ("B5", "x.nii", lambda raw: patch(raw, "magic", b"ni1\0"), "E_IO_FORMAT"),
    ("B8 inf", "x.nii", lambda raw: patch(raw, "slope", math.inf), "E_HDR_SCALE"),
    ("B8 inter", "x.nii", lambda raw: patch(patch(raw, "slope", 2.0), "inter", -math.inf),
     "E_HDR_SCALE"),
    ("B9 zero", "x.nii", lambda raw: patch(only(raw, "q"), "pixdim", 1, 0.75, 0, 2.5, 0, 0, 0, 0),
     "E_GEOM_SPACING"),
    ("B9 nan", "x.nii",
     lambda raw: patch(only(raw, "q"), "pixdim", 1, math.nan, 1, 2.5, 0, 0, 0, 0),
     "E_GEOM_SPACING"),
    ("B10", "x.nii", lambda raw: patch(raw, "pixdim", 1, 0.75, -1.25, 2.5, 0, 0, 0, 0),
     "E_GEOM_SPACING"),
    ("B11", "x.nii", lambda raw: patch(only(raw, "q"), "quatern", 0.9, 0.9, 0.0),
     "E_GEOM_QUATERN"),
    ("B11 nan", "x.nii", lambda raw: patch(only(raw, "q"), "quatern", 0.0, math.nan, 0.0),
     "E_GEOM_QUATERN"),
    ("B12 zero", "x.nii", lambda raw: patch(only(raw, "s"), "srow", *[0.0] * 12),
     "E_GEOM_SINGULAR"),
    ("B12 nan", "x.nii", lambda raw: patch(only(raw, "s"), "srow", *[math.nan] * 12),
     "E_GEOM_SINGULAR"),
    ("B12 flat", "x.nii",
     lambda raw: patch(only(raw, "s"), "srow", 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0),
     "E_GEOM_SINGULAR"),
    ("B13", "x.nii",
     lambda raw: patch(only(raw, "s"), "srow", 1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0), "E_GEOM_SHEAR"),
    ("B16", "x.nii", lambda raw: patch(raw, "srow", 0.75, 0, 0, 0, 0, 1.25, 0, 0, 0, 0, 2.5, 0),
     "E_GEOM_AMBIGUOUS"),
    ("B18", "x.nii", lambda raw: patch(patch(raw, "qcode", 0), "scode", 0), "E_GEOM_UNCODED"),
    ("B19 rej", "x.nii", lambda raw: patch(raw, "units", 1), "E_GEOM_SPACING"),
    ("C3 1D", "x.nii", lambda raw: patch(raw, "dim", 1, 20, 1, 1, 1, 1, 1, 1), "E_SHAPE_NDIM"),
    ("C3 5D", "x.nii", lambda raw: patch(raw, "dim", 5, 20, 24, 4, 2, 2, 1, 1), "E_SHAPE_NDIM"),
    ("C4 rgb", "x.nii", lambda raw: patch(patch(raw, "datatype", 128), "bitpix", 24),
     "E_HDR_DTYPE"),
    ("C4 complex", "x.nii", lambda raw: patch(patch(raw, "datatype", 32), "bitpix", 64),
     "E_HDR_DTYPE"),
    ("C8", "x.nii", lambda raw: raw[:HEADER] + b"\7\0" * (20 * 24 * 16), "E_VAL_CONSTANT"),
]  # fmt: skip

# Row, file name, how the good file is changed, warning codes; the values must stay as they are.
ACCEPTED: list[tuple[str, str, Spoil, set[str]]] = [
    ("good", "x.nii.gz", packed, set()),
    ("good nii", "x.nii", lambda raw: raw, set()),
    ("A8", "x.nii.gz", lambda raw: raw, {"W_IO_NOT_GZIP"}),
    ("A9", "x.nii", packed, {"W_IO_GZIP"}),
    ("A11", "x.nii.gz", lambda raw: packed(raw) + bytes(512), {"W_IO_TRAILING"}),
    ("A11 one", "x.nii.gz", lambda raw: packed(raw) + b"\0", {"W_IO_TRAILING"}),
    ("A11 junk", "x.nii.gz", lambda raw: packed(raw) + b"junk", {"W_IO_TRAILING"}),
    ("A11 nii", "x.nii", lambda raw: raw + bytes(512), {"W_IO_TRAILING"}),
    ("A12", "x.nii.gz", members, set()),
    ("B8 zero", "x.nii", lambda raw: patch(patch(raw, "slope", 0.0), "inter", 5.0), set()),
    ("B8 nan", "x.nii", lambda raw: patch(raw, "slope", math.nan), set()),
    ("B12 q", "x.nii", lambda raw: patch(raw, "srow", *[0.0] * 12), {"W_GEOM_SFORM"}),
    ("B17", "x.nii",
     lambda raw: patch(patch(raw, "srow", 2, 0, 0, 9, 0, 2, 0, 9, 0, 0, 2, 9), "scode", 4),
     {"W_GEOM_SCANNER"}),
    ("B20", "x.nii", lambda raw: patch(raw, "units", 0), {"N_GEOM_UNITS"}),
    ("C1", "x.nii", lambda raw: patch(raw, "dim", 4, 20, 24, 16, 1, 1, 1, 1), set()),
    ("C1 5D", "x.nii", lambda raw: patch(raw, "dim", 5, 20, 24, 16, 1, 1, 1, 1), set()),
]  # fmt: skip


def codes(path: Path, **options: object) -> set[str]:
    return {finding.code for finding in io.check_file(path, **options)}  # type: ignore[arg-type]


@pytest.mark.parametrize(("row", "name", "spoil", "code"), REJECTED, ids=[r[0] for r in REJECTED])
def test_rejects(
    row: str, name: str, spoil: Spoil, code: str, plain: bytes, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(spoil(plain))
    start = time.perf_counter()
    findings = io.check_file(path)
    assert time.perf_counter() - start < 2
    assert {finding.code for finding in findings} == {code}
    message = findings[0].message
    assert str(tmp_path) not in message
    assert "\n" not in message
    assert message.endswith(".")


@pytest.mark.parametrize(("row", "name", "change", "found"), ACCEPTED, ids=[r[0] for r in ACCEPTED])
def test_accepts(
    row: str,
    name: str,
    change: Spoil,
    found: set[str],
    plain: bytes,
    voxels: np.ndarray,
    tmp_path: Path,
) -> None:
    path = tmp_path / name
    path.write_bytes(change(plain))
    volume, header = io.read_image(path)
    assert np.array_equal(volume.array[0], voxels.T.astype(np.float32))
    assert volume.geometry.spacing_mm == (2.5, 1.25, 0.75)
    assert set(header.warning_codes) == found
    assert codes(path) == found


def test_flipped_bits_anywhere_are_called_damage(
    plain: bytes, voxels: np.ndarray, tmp_path: Path
) -> None:
    stream = packed(plain)
    path = tmp_path / "x.nii.gz"
    for at in range(10, len(stream), 97):
        path.write_bytes(flipped(stream, at))
        found = codes(path)
        assert found <= {"E_IO_CORRUPT", "E_IO_TRUNCATED"}, (at, found)
        assert found, at


def test_bomb_is_refused_before_memory_is_taken(plain: bytes, save: Callable[..., Path]) -> None:
    # 1.5e9 voxels pass the limit on voxels, but no gzip file of this size can hold them.
    path = save(patch(plain, "dim", 3, 1500, 1000, 1000, 1, 1, 1, 1))
    assert codes(path) == {"E_IO_TRUNCATED"}
    assert codes(path, gate=io.Gate(max_bytes=10_000)) == {"E_LIMIT_RAM"}


def test_reads_no_more_than_needed_of_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(packed(bytes(50_000_000)))
    with PayloadReader(path) as reader:
        assert len(reader.read(1000)) == 1000
        with pytest.raises(InputError) as caught:
            reader.finish()
    assert caught.value.code == "E_IO_TRAILING"


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_only_regular_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.nii.gz"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # addresses of sockets must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("x.nii.gz")
            assert codes(path) == {"E_PATH_NOTFILE"}
        return
    else:
        path.symlink_to("/dev/zero")
    assert codes(path) == {"E_PATH_NOTFILE"}


def test_missing_unreadable_and_looping(plain: bytes, tmp_path: Path) -> None:
    assert codes(tmp_path / "none.nii.gz") == {"E_IO_MISSING"}
    loop = tmp_path / "loop.nii"
    loop.symlink_to(loop)
    assert codes(loop) == {"E_PATH_LOOP"}


def test_forbidden(plain: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "locked.nii"
    path.write_bytes(plain)
    path.chmod(0)
    if os.geteuid() == 0:  # the superuser may read everything, so the system's answer is staged

        def refuse(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("medmamba.io.payload.os.open", refuse)
    assert codes(path) == {"E_IO_PERMISSION"}


@pytest.mark.parametrize("how", ["replaced", "grown", "deleted"])
def test_change_while_reading(how: str, plain: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.nii"
    path.write_bytes(plain)
    with PayloadReader(path) as reader:
        reader.read(len(plain))
        if how == "replaced":
            other = tmp_path / "y.nii"
            other.write_bytes(plain)
            other.replace(path)
        elif how == "grown":
            with path.open("ab") as file:
                file.write(b"more")
        else:
            path.unlink()
        with pytest.raises(InputError) as caught:
            reader.finish()
    assert caught.value.code == "E_IO_CHANGED"


def test_permitted_identity(plain: bytes, save: Callable[..., Path]) -> None:
    path = save(patch(patch(plain, "qcode", 0), "scode", 0))
    volume, header = io.read_image(path, gate=io.Gate(assume_identity=True))
    assert header.warning_codes == ("W_GEOM_UNCODED",)
    assert volume.geometry.spacing_mm == (2.5, 1.25, 0.75)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1e-3), (3, 1e3)])
def test_units_are_converted(
    unit: int, factor: float, voxels: np.ndarray, save: Callable[..., Path]
) -> None:
    image = nibabel.Nifti1Image(voxels, np.diag([factor, factor, 2 * factor, 1.0]))
    raw = patch(bytes(image.to_bytes()), "units", unit)
    volume, header = io.read_image(save(raw))
    assert header.warning_codes == ("W_GEOM_UNITS",)
    assert volume.geometry.spacing_mm == pytest.approx((2, 1, 1), rel=1e-6)


@pytest.mark.parametrize(
    ("shear", "code"), [(1e-4, None), (0.1, "W_GEOM_RESAMPLED"), (0.4, "W_GEOM_RESAMPLED")]
)
def test_tilt(
    shear: float, code: str | None, voxels: np.ndarray, save: Callable[..., Path]
) -> None:
    matrix = np.eye(4)
    matrix[1, 2] = shear
    image = nibabel.Nifti1Image(voxels, None)
    image.set_sform(matrix, 1)
    image.header.set_xyzt_units("mm")
    path = save(bytes(image.to_bytes()))
    found = {item for item in codes(path) if item != "W_GEOM_PIXDIM"}
    assert found == ({code} if code else set())
    if code:
        assert codes(path, gate=io.Gate(strict=True)) == {"E_GEOM_SHEAR"}


@pytest.mark.parametrize(
    ("share", "code"),
    [(0.1, "W_VAL_NONFINITE"), (0.6, "E_VAL_NONFINITE"), (1.0, "E_VAL_NONFINITE")],
)
def test_nonfinite_values(
    share: float, code: str, voxels: np.ndarray, save: Callable[..., Path]
) -> None:
    values = voxels.astype(np.float32)
    count = int(share * values.size)
    values.reshape(-1)[:count] = np.tile([np.nan, np.inf, -np.inf], count)[:count]
    path = save(bytes(nibabel.Nifti1Image(values, np.eye(4)).to_bytes()))
    assert code in codes(path)
    if code.startswith("W"):
        volume, header = io.read_image(path)
        assert np.isfinite(volume.array).all()
        assert volume.array.reshape(-1).min() == np.nanmin(
            np.where(np.isinf(values), np.nan, values)
        )
        assert str(count) in header.warnings[-1]


def test_nan_outside_a_positive_image_becomes_zero(
    voxels: np.ndarray, save: Callable[..., Path]
) -> None:
    values = voxels.astype(np.float32) + 100
    values[:3] = np.nan
    volume, _ = io.read_image(save(bytes(nibabel.Nifti1Image(values, np.eye(4)).to_bytes())))
    assert (volume.array[0, :, :, :3] == 0).all()


def test_mask_given_as_image(voxels: np.ndarray, save: Callable[..., Path]) -> None:
    mask = (voxels > 200).astype(np.uint8)
    assert "W_VAL_FEWLEVELS" in codes(save(bytes(nibabel.Nifti1Image(mask, np.eye(4)).to_bytes())))


@pytest.mark.parametrize("kind", ["i8", "u8", "f8", "i4", "u2", "i1", "f4", "u4", "u1"])
def test_every_integer_and_float_type(
    kind: str, voxels: np.ndarray, save: Callable[..., Path]
) -> None:
    values = (np.abs(voxels) % 100).astype(kind)
    image = nibabel.Nifti1Image(values, np.eye(4), dtype=values.dtype)
    volume, header = io.read_image(save(bytes(image.to_bytes())))
    assert np.array_equal(volume.array[0], values.T.astype(np.float32))
    assert header.stored_type == np.dtype(kind).name


def test_lost_precision_is_noted(voxels: np.ndarray, save: Callable[..., Path]) -> None:
    values = voxels.astype(np.int64) + 2**40
    assert "W_VAL_PRECISION" in codes(
        save(bytes(nibabel.Nifti1Image(values, np.eye(4), dtype=np.int64).to_bytes()))
    )


def test_checksum_is_verified_without_isal(
    plain: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medmamba.io.payload._deflate_module", lambda: zlib)
    path = tmp_path / "x.nii.gz"
    path.write_bytes(packed(plain))
    assert not codes(path)
    path.write_bytes(flipped(packed(plain), len(packed(plain)) - 6))
    assert codes(path) == {"E_IO_CORRUPT"}
