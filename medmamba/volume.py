"""Values that describe a volume; no I/O and no torch.

Where its voxels are (Geometry), what they hold (Volume), and the working resolution everyone
shares (Grid).

Axes are (D, H, W), that is z, y, x, everywhere; affines map voxel indices in that order to RAS+
millimetres. Libraries that use another order are converted in ``medmamba.io`` and nowhere else.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import GeometryError
from medmamba.files import RECORD_CONFIG

Box = tuple[tuple[int, int], ...]
"""Half-open index ranges, one (start, stop) per axis."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Where voxels are in space.

    Args:
        shape: voxels along (D, H, W); a 2D image has D = 1.
        affine: 4x4, rows are RAS+ millimetres, columns step along (D, H, W), as nested tuples.

    Raises:
        GeometryError: if the shape is not positive or the affine is singular or not finite.
    """

    __pydantic_config__ = RECORD_CONFIG

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, float, float, float], ...]

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise GeometryError(f"shape {self.shape}: three positive sizes are needed.")
        matrix = self.matrix
        if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
            raise GeometryError(f"affine {self.affine}: a finite 4x4 matrix is needed.")
        if abs(np.linalg.det(matrix[:3, :3])) < 1e-12 * max(1e-12, np.abs(matrix[:3, :3]).max()):
            raise GeometryError(
                f"affine {self.affine}: singular, voxels have no volume.",
                code="E_GEOM_SINGULAR",
            )

    @classmethod
    def from_matrix(cls, shape: tuple[int, ...], matrix: NDArray[np.floating]) -> "Geometry":
        """Build from a 4x4 array whose columns step along (D, H, W)."""
        depth, height, width = (int(size) for size in shape)
        rows = tuple(tuple(float(value) for value in row) for row in np.asarray(matrix))
        return cls(shape=(depth, height, width), affine=rows)  # type: ignore[arg-type]

    @classmethod
    def from_spacing(cls, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> "Geometry":
        """Build an axis-aligned grid: x to the right, y to the front, z up, origin at zero."""
        matrix = np.zeros((4, 4))
        for axis, spacing in enumerate(spacing_mm):
            matrix[2 - axis, axis] = spacing
        matrix[3, 3] = 1.0
        return cls.from_matrix(shape, matrix)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The affine as a float64 array."""
        return np.array(self.affine, dtype=np.float64)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along (D, H, W)."""
        columns = self.matrix[:3, :3]
        depth, height, width = (float(np.linalg.norm(columns[:, axis])) for axis in range(3))
        return (depth, height, width)

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.matrix[:3, :3]))) / 1000.0

    def same_grid_as(self, other: "Geometry", *, tolerance_voxels: float = 1e-3) -> bool:
        """Tell whether every corner lies within ``tolerance_voxels`` of the other grid's."""
        return self.shape == other.shape and self.corner_distance(other) <= tolerance_voxels

    def corner_distance(self, other: "Geometry") -> float:
        """Largest distance between corresponding corners, in voxels of this grid."""
        extent = np.array(self.shape, dtype=np.float64) - 1.0
        corners = np.array(np.meshgrid(*[(0.0, size) for size in extent], indexing="ij"))
        points = np.concatenate([corners.reshape(3, -1), np.ones((1, 8))])
        mapped = np.linalg.solve(self.matrix, other.matrix @ points)
        return float(np.abs(mapped[:3] - points[:3]).max())


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The working resolution of one configuration, decided once by the planner.

    Args:
        spacing_mm: target spacing along the working axes, in working (transposed) order;
            two values for a 2D configuration.
        patch_size: voxels per axis that the network sees at once.
    """

    __pydantic_config__ = RECORD_CONFIG

    spacing_mm: tuple[float, ...]
    patch_size: tuple[int, ...]

    @property
    def dimension(self) -> int:
        """2 or 3."""
        return len(self.patch_size)


class VolumeKind(StrEnum):
    """What the numbers of a volume mean."""

    IMAGE = "image"
    LABELS = "labels"


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """Voxels together with where they are.

    Args:
        array: (C, D, H, W) float32 for images; (1, D, H, W) integers for labels.
        geometry: the grid of the last three axes.
        kind: image or labels.
    """

    array: NDArray[np.generic]
    geometry: Geometry
    kind: VolumeKind = field(default=VolumeKind.IMAGE)

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or tuple(self.array.shape[1:]) != self.geometry.shape:
            raise GeometryError(
                f"array of shape {self.array.shape} does not fit a grid of {self.geometry.shape}; "
                "(C, D, H, W) is needed."
            )
