"""A predictor that needs no networks, and images for it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medmamba.dataset import Case
from medmamba.inference.job import Segmented
from medmamba.inference.records import ModelIdentity
from medmamba.labels import LabelMap
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord
from medmamba.volume import Volume

MODEL = ModelIdentity(name="threshold", sha256="0" * 64)
LABELS = LabelMap(values={"background": (0,), "bright": (1,), "very bright": (2,)})


@dataclass
class FakeLogits:
    logits: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.logits.nbytes


@dataclass
class ThresholdPredictor:
    """Labels by intensity; ``hooks`` may misbehave for chosen cases, by their first voxel."""

    label_map: LabelMap = LABELS
    channels: int = 1
    patch_size: tuple[int, ...] = (1, 1)
    level: float = 50.0
    inferred: list[float] = field(default_factory=list)
    on_infer: Callable[[float, Any], None] | None = None

    def parameters(self) -> dict[str, Any]:
        return {"level": self.level}

    def numerics(self) -> dict[str, Any]:
        return {"device": "none"}

    def prepare(self, image: Volume) -> PreprocessedCase:
        shape = image.geometry.shape
        record = UndoRecord(
            geometry=image.geometry,
            transpose_forward=(0, 1, 2),
            spacing_mm=image.geometry.spacing_mm,
            shape=shape,
            crop_box=tuple((0, size) for size in shape),
            shape_after_crop=shape,
            working_spacing_mm=image.geometry.spacing_mm,
            working_shape=shape,
        )
        return PreprocessedCase(data=image.array, labels=None, record=record, class_locations={})

    def infer(self, prepared: PreprocessedCase, *, on_tiles: Any = None) -> FakeLogits:
        mark = float(prepared.data[0, 0, 0, 0])
        self.inferred.append(mark)
        if self.on_infer is not None:
            self.on_infer(mark, on_tiles)
        return FakeLogits(prepared.data)

    def restore(self, inferred: FakeLogits) -> Segmented:
        values = inferred.logits[0]
        labels = (values > self.level).astype(np.uint8) + (values > 2 * self.level)
        return Segmented(labels=labels.astype(np.uint8))


def image(folder: Path, name: str, mark: int = 0, seed: int = 0) -> Case:
    folder.mkdir(exist_ok=True)
    voxels = np.random.default_rng(seed).integers(1, 200, (6, 5, 4)).astype(np.int16)
    voxels[0, 0, 0] = mark
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return Case(id=name, images=(path,))


def tree(folder: Path) -> dict[str, str]:
    """Hash of every mask and record, without what differs between runs by nature."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix == ".json":
            content = json.loads(path.read_text())
            del content["timings_s"], content["peak_memory_bytes"]
            found[path.name] = json.dumps(content, sort_keys=True)
        elif path.is_file():
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
