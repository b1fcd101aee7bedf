"""The demo's dataset: real brain MRI that the nilearn wheel ships, cut into blocks as cases.

It is one averaged brain (ICBM 2009a, Fonov et al. 2011) with its tissue maps, so it shows that the
chain works on real images, not that a model generalises to other people.
"""

import importlib.util
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medmamba.errors import EnvironmentFault
from medmamba.files import write_atomic

DATASET_NAME = "Dataset001_BrainTissue"
IMAGE_FILE = "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
TISSUE_FILES = {
    "grey matter": "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz",
    "white matter": "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz",
}
MAP_MAXIMUM = 255.0
"""Tissue maps are probabilities stored as bytes."""
BLOCK = 40
"""Edge of a block in voxels, 1 mm each."""
HELD_OUT_EVERY = 4
MINIMUM_TISSUE = 0.15
"""Blocks with less tissue than this are left out: they are mostly air."""


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """Where the demo's raw dataset lies and how many blocks each part has."""

    folder: Path
    training: int
    held_out: int


def make_demo_dataset(parent: Path, *, tiny: bool = False) -> DemoData:
    """Write the blocks as an nnU-Net raw dataset below ``parent``.

    Args:
        parent: folder to make the dataset folder in.
        tiny: only a handful of blocks, to try the chain in a minute.

    Raises:
        EnvironmentFault: nilearn, which ships the images, is not installed.
    """
    from medmamba.io import read_image

    shipped = shipped_folder()
    volume, _ = read_image(shipped / IMAGE_FILE)
    maps = [read_image(shipped / name)[0].array[0] / MAP_MAXIMUM for name in TISSUE_FILES.values()]
    labels = np.argmax(np.stack([1.0 - maps[0] - maps[1], *maps]), axis=0).astype(np.uint8)
    image = volume.array[0].astype(np.uint8)
    blocks = list_blocks(labels)
    if tiny:
        blocks = blocks[:: max(1, len(blocks) // 8)]
    folder = parent / DATASET_NAME
    held_out = 0
    for number, corner in enumerate(blocks):
        test = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        held_out += test
        _write_block(
            folder, f"block_{number:03d}", corner, image, labels, volume.geometry.matrix, test=test
        )
    training = len(blocks) - held_out
    write_atomic(folder / "dataset.json", json.dumps(_describe(training), indent=2) + "\n")
    return DemoData(folder=folder, training=training, held_out=held_out)


def shipped_folder() -> Path:
    """Return the folder of images inside the installed nilearn, without importing nilearn.

    Raises:
        EnvironmentFault: it is not installed, or this version ships no images.
    """
    found = importlib.util.find_spec("nilearn")
    places = list(found.submodule_search_locations or []) if found else []
    folder = Path(places[0]) / "datasets" / "data" if places else Path("nilearn")
    if not (folder / IMAGE_FILE).is_file():
        raise EnvironmentFault(
            "the demo's brain images come with the package nilearn, which is not installed here. "
            "Run `pip install 'medmamba[demo]'`, or use --dataset with a raw dataset of yours.",
            code="E_DEMO_DATA",
        )
    return folder


def list_blocks(labels: NDArray[np.uint8]) -> list[tuple[int, int, int]]:
    """Corners of non-overlapping blocks that hold enough tissue, in raster order."""
    inside = np.argwhere(labels > 0)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    starts = [range(int(low[axis]), int(high[axis]) - BLOCK // 2, BLOCK) for axis in range(3)]
    corners = []
    for corner in product(*starts):
        block = labels[tuple(slice(start, start + BLOCK) for start in corner)]
        if (block > 0).mean() >= MINIMUM_TISSUE:
            corners.append((corner[0], corner[1], corner[2]))
    return corners


def _write_block(
    folder: Path,
    name: str,
    corner: tuple[int, int, int],
    image: NDArray[np.uint8],
    labels: NDArray[np.uint8],
    affine: NDArray[np.float64],
    *,
    test: bool,
) -> None:
    from medmamba.io import write_image
    from medmamba.volume import Geometry

    place = tuple(slice(start, start + BLOCK) for start in corner)
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.array(corner, dtype=np.float64)
    part = "Ts" if test else "Tr"
    geometry = Geometry.from_matrix(image[place].shape, moved)
    write_image(folder / f"images{part}" / f"{name}_0000.nii.gz", image[place], geometry)
    write_image(folder / f"labels{part}" / f"{name}.nii.gz", labels[place], geometry)


def _describe(training: int) -> dict[str, object]:
    return {
        "name": "BrainTissue",
        "description": "Blocks of one averaged brain (ICBM 2009a) with tissue labels",
        "reference": "Fonov et al., NeuroImage 54 (2011) 313-327, as shipped by nilearn",
        # The template's intensities are on one scale already; a z-score per block would undo that.
        "channel_names": {"0": "rescale_to_0_1"},
        "labels": {
            "background": 0,
            **{name: index for index, name in enumerate(TISSUE_FILES, start=1)},
        },
        "numTraining": training,
        "file_ending": ".nii.gz",
    }
