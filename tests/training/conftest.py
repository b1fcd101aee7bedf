"""A synthetic store of bright ellipsoids and a tiny network, made anew for each test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medmamba.dataset import Split
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord
from medmamba.preprocessing.store import CaseStore
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.trainer import TrainingSetup
from medmamba.volume import Geometry, Grid

CASES = tuple(f"case_{index:02d}" for index in range(5))
LABEL_MAP = LabelMap(values={"background": (0,), "ball": (1,), "core": (2,)})
PATCH = (8, 16, 16)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_case(seed: int, shape: tuple[int, int, int] = (12, 20, 22)) -> PreprocessedCase:
    generator = np.random.default_rng(seed)
    centre = generator.uniform(0.35, 0.65, 3) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    distance = np.sqrt((((grid - centre[:, None, None, None]) / 5.0) ** 2).sum(0))
    labels = (distance < 1).astype(np.int16) + (distance < 0.5)
    data = labels + generator.normal(0, 0.3, shape)
    spacing = (1.0, 1.0, 1.0)
    record = UndoRecord(
        geometry=Geometry.from_spacing(shape, spacing),
        transpose_forward=(0, 1, 2),
        spacing_mm=spacing,
        shape=shape,
        crop_box=tuple((0, size) for size in shape),
        shape_after_crop=shape,
        working_spacing_mm=spacing,
        working_shape=shape,
    )
    return PreprocessedCase(
        data=data[None].astype(np.float32),
        labels=labels[None].astype(np.int16),
        record=record,
        class_locations={(k,): np.argwhere(labels == k) for k in (1, 2)},
    )


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    store = CaseStore(folder)
    for index, case in enumerate(CASES):
        store.write(case, make_case(index), key="k", patch_size=PATCH)
    return folder


def tiny_network(**changes) -> NetworkSpec:
    values = {
        "name": "plain_unet",
        "in_channels": 1,
        "out_channels": 3,
        "patch_size": PATCH,
        "features": (4, 8, 8),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "kernel_sizes": ((3, 3, 3),) * 3,
        "encoder_blocks": (1, 1, 1),
        "decoder_blocks": (1, 1),
    }
    return NetworkSpec(**{**values, **changes})


@pytest.fixture
def make_setup(store_folder: Path, tmp_path: Path) -> Callable[..., TrainingSetup]:
    return lambda **changes: build_setup(store_folder, tmp_path / "run", **changes)


def build_setup(
    store_folder: Path, run_folder: Path, recipe: dict | None = None, **changes
) -> TrainingSetup:
    values = {
        "run_folder": run_folder,
        "network": tiny_network(),
        "grid": Grid(spacing_mm=(1.0, 1.0, 1.0), patch_size=PATCH),
        "recipe": TrainingRecipe(
            **{
                "batch_size": 2,
                "epochs": 3,
                "iterations": 4,
                "validation_iterations": 2,
                **(recipe or {}),
            }
        ),
        "label_map": LABEL_MAP,
        "store_folder": store_folder,
        "split": Split(train=CASES[:4], validation=CASES[4:]),
        "device": "cpu",
        "precision": "fp32",
    }
    return TrainingSetup(**{**values, **changes})
