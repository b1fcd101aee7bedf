"""A phantom and the means to spoil its file byte by byte."""

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray


@pytest.fixture
def voxels() -> NDArray[np.int16]:
    """A 20 x 24 x 16 (x, y, z) phantom: noise with a bright ellipsoid."""
    x, y, z = np.ogrid[:20, :24, :16]
    inside = ((x - 9) / 7) ** 2 + ((y - 12) / 9) ** 2 + ((z - 8) / 5) ** 2 < 1
    noise = np.random.default_rng(7).integers(-40, 40, (20, 24, 16))
    return (noise + 500 * inside).astype(np.int16)


@pytest.fixture
def affine() -> NDArray[np.float64]:
    """An axis-aligned affine with three different spacings."""
    matrix = np.diag([0.75, 1.25, 2.5, 1.0])
    matrix[:3, 3] = (-10.0, 20.5, 30.25)
    return matrix


@pytest.fixture
def plain(voxels: NDArray[np.int16], affine: NDArray[np.float64]) -> bytes:
    """The phantom as an uncompressed NIfTI-1 file with both transforms coded."""
    return as_nifti(voxels, affine)


def as_nifti(
    voxels: NDArray[np.generic], affine: NDArray[np.float64] | None, *, version: int = 1
) -> bytes:
    """A single-file NIfTI whose sform and qform say the same."""
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    image = kind(voxels, affine)
    if affine is not None:
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save bytes under a name, compressed if the name says so."""

    def write(raw: bytes, name: str = "case.nii.gz", *, compress: bool | None = None) -> Path:
        path = tmp_path / name
        wanted = name.endswith(".gz") if compress is None else compress
        path.write_bytes(gzip.compress(raw, 1, mtime=0) if wanted else raw)
        return path

    return write
