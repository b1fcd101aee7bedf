"""A predictor that needs no networks, and images for it."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from medmamba.dataset import Case
from medmamba.inference import engine
from medmamba.inference.assignment import Assignment, PredictionRun
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


def assign(cases: Iterable[Any], options: dict[str, Any]) -> Assignment:
    """Take from a test's options what belongs to the assignment."""
    names = [each.name for each in fields(Assignment) if each.name in options]
    return Assignment(cases=cases, **{name: options.pop(name) for name in names})


def predict_cases(
    cases: Iterable[Any], folder: Path, predictor: Any, **options: Any
) -> PredictionRun:
    """Predict in this process, with the options of the assignment and of the engine mixed."""
    return engine.predict_cases(assign(cases, options), folder, predictor, **options)


def image(folder: Path, name: str, mark: int = 0, seed: int = 0) -> Case:
    folder.mkdir(exist_ok=True)
    voxels = np.random.default_rng(seed).integers(1, 200, (6, 5, 4)).astype(np.int16)
    voxels[0, 0, 0] = mark
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    return Case(id=name, images=(path,))


def tree(folder: Path) -> dict[str, str]:
    """Hashes of every mask, packed and unpacked, and every record without times and memory."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix == ".json":
            content = json.loads(path.read_text())
            del content["timings_s"], content["peak_memory_bytes"]
            found[path.name] = json.dumps(content, sort_keys=True)
        elif path.is_file():
            data = path.read_bytes()
            parts = [data, gzip.decompress(data)] if data[:2] == b"\x1f\x8b" else [data]
            # Both, so that a difference says whether voxels or their packing differ.
            found[path.name] = " ".join(hashlib.sha256(part).hexdigest() for part in parts)
    return found
