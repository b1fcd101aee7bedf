"""Images with tilted axes (CT with a tilted gantry) onto a right-angled grid, and labels back.

The plane of the two axes that are closest to a right angle is kept as it is; only the third axis is
replaced by the plane's normal, so a tilted stack is shifted slice by slice and not turned.
"""

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import InputError
from medmamba.io.affine import column_of_length, numbers
from medmamba.io.header import Gate
from medmamba.volume import Geometry


def straight_geometry(geometry: Geometry) -> Geometry:
    """Return the right-angled grid that covers a tilted one at the same resolution."""
    matrix = geometry.matrix
    columns = matrix[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    unit = columns / spacing
    cosines = np.abs(unit.T @ unit)
    first, second, third = min(((0, 1, 2), (0, 2, 1), (1, 2, 0)), key=lambda at: cosines[at[:2]])
    normal = np.cross(unit[:, first], unit[:, second])
    normal *= np.sign(normal @ unit[:, third]) / np.linalg.norm(normal)
    square = np.cross(normal, unit[:, first])
    square *= np.sign(square @ unit[:, second])
    straight = np.eye(4)
    straight[:3, first] = column_of_length(unit[:, first], float(spacing[first]))
    straight[:3, second] = column_of_length(square, float(spacing[second]))
    straight[:3, third] = normal * float(columns[:, third] @ normal)
    straight[:3, 3] = matrix[:3, 3]
    low, high = _extent(geometry, straight)
    straight[:3, 3] += straight[:3, :3] @ low
    shape = tuple(int(size) for size in high - low + 1)
    return Geometry.from_matrix(shape, straight)


def _extent(geometry: Geometry, straight: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """First and last index of ``straight`` that the corners of ``geometry`` reach."""
    ends = [(0.0, size - 1.0) for size in geometry.shape]
    corners = np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
    points = geometry.matrix @ np.concatenate([corners, np.ones((1, 8))])
    indices = np.linalg.solve(straight, points)[:3]
    # A thousandth of a voxel is rounding, not another row of voxels.
    return np.floor(indices.min(axis=1) + 1e-3), np.ceil(indices.max(axis=1) - 1e-3)


def straighten(
    array: NDArray[np.float32], geometry: Geometry, name: str, gate: Gate
) -> tuple[NDArray[np.float32], Geometry]:
    """Resample an image (C, D, H, W) linearly; outside is the image's smallest value.

    Raises:
        InputError: the right-angled grid would be over the gate's limit.
    """
    from scipy.ndimage import affine_transform

    straight = straight_geometry(geometry)
    if int(np.prod(straight.shape)) * array.shape[0] > gate.max_voxels:
        raise InputError(
            f"{name}: straightening its axes needs {numbers(straight.shape)} voxels; the limit is "
            f"{gate.max_voxels}. Resample it to a regular grid.",
            code="E_LIMIT_VOXELS",
        )
    mapping = np.linalg.solve(geometry.matrix, straight.matrix)
    result = np.empty((array.shape[0], *straight.shape), dtype=np.float32)
    for source, target in zip(array, result, strict=True):
        affine_transform(
            source, mapping, output=target, order=1, mode="constant", cval=float(source.min())
        )
    return result, straight


def labels_on_source(
    labels: NDArray[np.integer], straight: Geometry, source: Geometry
) -> NDArray[np.integer]:
    """Carry labels (D, H, W) from the right-angled grid to the file's, by nearest neighbours."""
    from scipy.ndimage import affine_transform

    mapping = np.linalg.solve(straight.matrix, source.matrix)
    result = np.empty(source.shape, dtype=labels.dtype)
    affine_transform(labels, mapping, output=result, order=0, mode="nearest")
    return result
