"""Geometry in nnU-Net's properties of a case: both ways, for every reader it has."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from medmamba.errors import DatasetError
from medmamba.volume import Geometry

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
PLANE_SLICE = 999.0
"""nnU-Net gives a plane slices this many times as far apart as its coarsest pixels."""

SITK, NIBABEL = "sitk_stuff", "nibabel_stuff"


def geometry_properties(geometry: Geometry, reader: str) -> dict[str, Any]:
    """Say where voxels are as nnU-Net's ``reader`` would have said it.

    Args:
        geometry: of the raw image.
        reader: nnU-Net's name of the class that reads and writes the images.
    """
    spacing = geometry.spacing_mm
    if reader == "NaturalImage2DIO":
        return {"spacing": (PLANE_SLICE, 1, 1)}
    properties: dict[str, Any] = {"spacing": [float(value) for value in spacing]}
    matrix = geometry.matrix[:, [2, 1, 0, 3]]
    if reader.startswith("Nibabel"):
        properties[NIBABEL] = {"original_affine": matrix}
        if reader.endswith("Reorient"):
            properties[NIBABEL]["reoriented_affine"] = matrix
    elif reader.startswith("SimpleITK"):
        dimension = 2 if _is_plane(geometry) else 3
        matrix = LPS_TO_RAS @ matrix
        steps = np.array(spacing[::-1][:dimension])
        properties[SITK] = {
            "spacing": tuple(steps.tolist()),
            "origin": tuple(matrix[:dimension, 3].tolist()),
            "direction": tuple((matrix[:dimension, :dimension] / steps).ravel().tolist()),
        }
    return properties


def read_geometry(properties: Mapping[str, Any], shape: tuple[int, ...], what: str) -> Geometry:
    """Return the grid of the raw image.

    Args:
        properties: nnU-Net's, of one case.
        shape: voxels of the raw image, (D, H, W).
        what: how messages call the case.

    Raises:
        DatasetError: there is no spacing.
    """
    if "spacing" not in properties:
        raise DatasetError(f"{what}: its properties have no 'spacing'. Preprocess it again.")
    spacing = tuple(float(value) for value in properties["spacing"])
    if NIBABEL in properties:
        known = properties[NIBABEL]
        # Of the array as it was preprocessed, which a reader may have turned before.
        stored = known.get("reoriented_affine", known["original_affine"])
        affine = np.asarray(stored, dtype=np.float64)
        return Geometry.from_matrix(shape, affine[:, [2, 1, 0, 3]])
    if SITK not in properties or len(properties[SITK]["spacing"]) != 3:
        return Geometry.from_spacing(shape, spacing)
    fields = properties[SITK]
    matrix = np.eye(4)
    directions = np.array(fields["direction"], dtype=np.float64).reshape(3, 3)
    matrix[:3, :3] = directions * np.array(fields["spacing"])
    matrix[:3, 3] = fields["origin"]
    return Geometry.from_matrix(shape, (LPS_TO_RAS @ matrix)[:, [2, 1, 0, 3]])


def _is_plane(geometry: Geometry) -> bool:
    depth, height, width = geometry.spacing_mm
    return geometry.shape[0] == 1 and bool(np.isclose(depth, PLANE_SLICE * max(height, width)))
