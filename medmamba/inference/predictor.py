"""One case from image to labels: preprocessing, the networks of all folds, restoring the grid.

Knows nothing of files, bundles or batches of cases (``engine``), and is given every choice: device,
precision, flips. What it does when memory runs out is the ladder of ``_LADDER``.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medmamba.errors import EnvironmentFault, MedMambaError
from medmamba.inference.sliding_window import TileProgress, predict_logits, tile_batch_size
from medmamba.labels import LabelMap
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord, preprocess_case
from medmamba.preprocessing.previous import labels_on_working_grid, one_hot
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.restore import restore_labels, restore_probabilities
from medmamba.volume import Grid, Volume

logger = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How to predict; all of it changes results, if only in the last digit.

    Args:
        device: where the networks run.
        precision: ``fp32``, ``bf16`` or ``fp16`` of the forward passes.
        mirror_axes: axes of the patch whose flips are averaged; empty for none.
        step: largest distance of neighbouring tiles, in patches.
        compat: round as nnU-Net does (fp16 sums and logits).
        features: channels at the highest resolution, from which the tile batch follows.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    mirror_axes: tuple[int, ...] = ()
    step: float = 0.5
    compat: bool = False
    features: int = 32


@dataclass(frozen=True, kw_only=True)
class _Rung:
    """One step of the ladder: where to add tiles up, and whether to run them one by one."""

    accumulate_on_host: bool
    single: bool
    name: str


_LADDER = (
    _Rung(accumulate_on_host=False, single=False, name=""),
    _Rung(accumulate_on_host=True, single=False, name="accumulated in host memory"),
    _Rung(accumulate_on_host=True, single=True, name="accumulated in host memory, one tile a pass"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inferred:
    """Logits of a case on the working grid.

    Args:
        logits: (K, d, h, w) on the CPU.
        fallbacks: what had to be done differently than settings say.
    """

    logits: Tensor
    fallbacks: tuple[str, ...] = ()


class Predictor:
    """Networks of one or more folds, ready to segment cases of one kind.

    Args:
        networks: in evaluation mode; their logits are averaged.
        grid: working spacing and patch size.
        preprocessing: as in training.
        label_map: meaning of the networks' outputs.
        settings: device, precision, flips.
        previous: the first stage of a cascade, whose labels become channels of this one.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        *,
        grid: Grid,
        preprocessing: PreprocessingRecipe,
        label_map: LabelMap,
        settings: PredictionSettings,
        previous: "Predictor | None" = None,
    ) -> None:
        self._previous = previous
        self._networks = [network.to(settings.device).eval() for network in networks]
        self._grid = grid
        self._recipe = preprocessing
        self.label_map = label_map
        self.settings = settings
        self.tile_batch = tile_batch_size(
            grid.patch_size,
            features=settings.features,
            device_class=settings.device.type,
            memory_bytes=_device_memory(settings.device),
        )

    @property
    def channels(self) -> int:
        """Image channels a case must have."""
        return len(self._recipe.channels)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels per axis that the network sees at once: three, or two of a 2D model."""
        return self._grid.patch_size

    def parameters(self) -> dict[str, Any]:
        """Everything that decides which labels come out, as JSON values."""
        settings = self.settings
        return {
            "device_class": settings.device.type,
            "precision": settings.precision,
            "mirror_axes": list(settings.mirror_axes),
            "step": settings.step,
            "compat": settings.compat,
            "tile_batch": self.tile_batch,
            "patch_size": list(self._grid.patch_size),
            "spacing_mm": list(self._grid.spacing_mm),
            "networks": len(self._networks),
            **({"previous_stage": self._previous.parameters()} if self._previous else {}),
        }

    def numerics(self) -> dict[str, Any]:
        """What computes, as far as it may show in the last digits; not part of the parameters."""
        device = self.settings.device
        on_gpu = device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": str(torch.__version__),
            "accumulation": "float16" if self.settings.compat else "float32",
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def prepare(self, image: Volume) -> PreprocessedCase:
        """Bring an image to the working grid."""
        prepared = preprocess_case(
            image, None, grid=self._grid, recipe=self._recipe, label_map=self.label_map
        )
        if self._previous is None:
            return prepared
        return replace(prepared, coarse=self._previous.prepare(image))

    @torch.inference_mode()
    def infer(
        self, prepared: PreprocessedCase, *, on_tiles: TileProgress | None = None
    ) -> Inferred:
        """Run the networks, those of a cascade's first stage before them.

        Raises:
            EnvironmentFault: the device has too little memory even for the smallest step.
            MedMambaError: logits are not finite, in float32 neither.
        """
        if self._previous is None:
            return self._infer(prepared.data, on_tiles)
        assert prepared.coarse is not None
        first = self._previous.infer(prepared.coarse)
        labels = self._previous.restore(first.logits, prepared.coarse.record)
        coarse = labels_on_working_grid(labels, prepared.record, self._recipe)
        channels = one_hot(coarse, self.label_map.foreground_values)
        found = self._infer(np.concatenate([prepared.data, channels]), on_tiles)
        return replace(found, fallbacks=(*first.fallbacks, *found.fallbacks))

    def _infer(self, data: NDArray[np.float32], on_tiles: TileProgress | None) -> Inferred:
        image = torch.from_numpy(np.ascontiguousarray(data))
        found = self._climb(image, self.settings.precision, on_tiles)
        if bool(torch.isfinite(found.logits).all()):
            return found
        if self.settings.precision != "fp32":
            logger.warning(
                "logits are not finite in %s; repeating in fp32", self.settings.precision
            )
            again = self._climb(image, "fp32", on_tiles)
            if bool(torch.isfinite(again.logits).all()):
                return Inferred(
                    logits=again.logits, fallbacks=(*again.fallbacks, "repeated in fp32")
                )
        raise MedMambaError(
            "the network's output is not finite. The weights or the image's intensities are "
            "unusable; check the image's intensities against those of the training data.",
            code="E_NUM_NONFINITE",
        )

    def restore(self, logits: Tensor, record: UndoRecord) -> NDArray[Any]:
        """Turn logits into labels (D, H, W) on the grid of the raw image."""
        return restore_labels(
            logits, record, self._recipe, self.label_map, compat=self.settings.compat
        )

    def probabilities(self, logits: Tensor, record: UndoRecord) -> NDArray[np.float32]:
        """Turn logits into probabilities (K, D, H, W) on the grid of the raw image."""
        return restore_probabilities(
            logits, record, self._recipe, self.label_map, compat=self.settings.compat
        )

    def predict(self, image: Volume) -> NDArray[Any]:
        """Return the labels (D, H, W) of one image."""
        prepared = self.prepare(image)
        return self.restore(self.infer(prepared).logits, prepared.record)

    def _climb(self, image: Tensor, precision: str, on_tiles: TileProgress | None) -> Inferred:
        for rung in _LADDER:
            try:
                logits = self._mean_logits(image, precision, rung, on_tiles)
            except torch.OutOfMemoryError:
                logger.warning(
                    "out of memory on %s (%s)", self.settings.device, rung.name or "plain"
                )
                continue
            return Inferred(logits=logits, fallbacks=(rung.name,) if rung.name else ())
        raise EnvironmentFault(
            f"device {self.settings.device}: too little memory for one patch of "
            f"{self._grid.patch_size}. Use a device with more memory, or the CPU.",
            code="E_MEM_GPU",
        )

    def _mean_logits(
        self, image: Tensor, precision: str, rung: _Rung, on_tiles: TileProgress | None
    ) -> Tensor:
        settings = self.settings
        total: Tensor | None = None
        for index, network in enumerate(self._networks):
            logits = predict_logits(
                network,
                image,
                patch_size=self._grid.patch_size,
                mirror_axes=settings.mirror_axes,
                step=settings.step,
                tile_batch=1 if rung.single else self.tile_batch,
                compat=settings.compat,
                autocast=AUTOCAST[precision],
                device=settings.device,
                accumulate_on=torch.device("cpu") if rung.accumulate_on_host else settings.device,
                on_tiles=_shifted(on_tiles, index, len(self._networks)),
            ).to("cpu")
            total = logits if total is None else total.add_(logits)
        assert total is not None
        return total.div_(len(self._networks)) if len(self._networks) > 1 else total


def _shifted(on_tiles: TileProgress | None, index: int, count: int) -> TileProgress | None:
    """Progress of one network of several as progress of the whole."""
    if on_tiles is None:
        return None
    report: Callable[[int, int], None] = on_tiles
    return lambda done, total: report(index * total + done, count * total)


def _device_memory(device: torch.device) -> int | None:
    """Memory the device is built with; what others use of it must not change results."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
