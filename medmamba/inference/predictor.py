"""One case from image to labels: preprocessing, the networks of all folds, restoring the grid.

Knows nothing of files, bundles or batches of cases (``engine``), and is given every choice: device,
precision, flips. What it does when memory runs out is the ``ladder``.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medmamba.errors import EnvironmentFault, MedMambaError
from medmamba.files import to_plain
from medmamba.inference.course import Course, segmented
from medmamba.inference.job import Segmented
from medmamba.inference.ladder import Rung, rungs, smaller_patch
from medmamba.inference.records import Parity
from medmamba.inference.restoring import Restoring, restore_beside
from medmamba.inference.sliding_window import (
    PlaneStream,
    TileProgress,
    TileSource,
    tile_batch_size,
)
from medmamba.inference.votes import Votes
from medmamba.labels import LabelMap
from medmamba.networks.memory_format import pack_weights
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord, preprocess_case
from medmamba.preprocessing.previous import labels_on_working_grid
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.preprocessing.restore import LabelStream, OnProbabilities
from medmamba.volume import Grid, Volume

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

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
        reuse_constant: compute tiles of one single value, such as air, once per value.
        cpu_fallback: compute a case on the CPU where the device's memory is too small for it.
        features: channels at the highest resolution, from which the tile batch follows.
        patch_multiple: what the sizes of a patch must be multiples of; empty where it cannot be
            made smaller.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    mirror_axes: tuple[int, ...] = ()
    step: float = 0.5
    compat: bool = False
    reuse_constant: bool = True
    cpu_fallback: bool = False
    features: int = 32
    patch_multiple: tuple[int, ...] = ()


class Predictor:
    """Networks of one or more folds, ready to segment cases of one kind.

    Args:
        networks: in evaluation mode; their logits are averaged.
        grid: working spacing and patch size.
        preprocessing: as in training.
        label_map: meaning of the networks' outputs.
        settings: device, precision, flips.
        previous: the first stage of a cascade, whose labels become channels of this one.
        parity: how reduced precision compared with float32, where it was tried.
        fallbacks: what is done differently than asked for, in every case.
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
        parity: Parity | None = None,
        fallbacks: tuple[str, ...] = (),
    ) -> None:
        self._previous = previous
        self.parity = parity
        self._fallbacks = fallbacks
        self._networks = [network.to(settings.device).eval() for network in networks]
        # In another layout oneDNN adds up in another order, and nnU-Net's labels must not change.
        if settings.device.type == "cpu" and not settings.compat:
            for network in self._networks:
                pack_weights(network)
        self._grid = grid
        self.recipe = preprocessing
        self.label_map = label_map
        self.settings = settings
        # nnU-Net takes inputs one by one, for which a CPU has other convolutions than for several.
        one_by_one = settings.compat and settings.device.type == "cpu"
        self.tile_batch = (
            1
            if one_by_one
            else tile_batch_size(
                grid.patch_size,
                features=settings.features,
                device_class=settings.device.type,
                memory_bytes=_device_memory(settings.device),
            )
        )

    @property
    def channels(self) -> int:
        """Image channels a case must have."""
        return len(self.recipe.channels)

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
            "reuse_constant": settings.reuse_constant,
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
            **({"parity": to_plain(self.parity)} if self.parity else {}),
        }

    def prepare(self, image: Volume, *, consume: bool = False) -> PreprocessedCase:
        """Bring an image to the working grid; with ``consume`` its memory may be reused."""
        coarse = None if self._previous is None else self._previous.prepare(image)
        prepared = preprocess_case(
            image,
            None,
            grid=self._grid,
            recipe=self.recipe,
            label_map=self.label_map,
            consume=consume,
        )
        return replace(prepared, coarse=coarse)

    def planes(
        self, prepared: PreprocessedCase, course: Course, on_tiles: TileProgress | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Run the networks, those of a cascade's first stage before them.

        Yields:
            Ascending (first plane, planes (K, n, h, w)) of logits on the working grid, float32 on
            the CPU.

        Raises:
            EnvironmentFault: the device has too little memory even for the smallest step.
            MedMambaError: logits are not finite, in float32 neither.
        """
        for fallback in self._fallbacks:
            course.note(fallback)
        source = self._source(prepared, course)
        reached, precision = 0, self.settings.precision
        while True:
            for start, planes in self._climb(source, precision, reached, course, on_tiles):
                if not bool(torch.isfinite(planes).all()):
                    break
                reached = start + planes.shape[1]
                yield start, planes.float()
            else:
                return
            if precision == "fp32":
                raise MedMambaError(
                    "the network's output is not finite. The weights or the image's intensities "
                    "are unusable; check the image's intensities against those of the training "
                    "data.",
                    code="E_NUM_NONFINITE",
                )
            logger.warning("logits are not finite in %s; repeating in fp32", precision)
            course.note("repeated in fp32")
            precision = "fp32"

    def logits(self, prepared: PreprocessedCase) -> Tensor:
        """Return the logits (K, d, h, w) of a whole case on the working grid."""
        return torch.cat([planes for _, planes in self.planes(prepared, Course())], dim=1)

    def infer(
        self,
        prepared: PreprocessedCase,
        *,
        onto: UndoRecord | None = None,
        on_tiles: TileProgress | None = None,
        on_probabilities: OnProbabilities | None = None,
    ) -> Restoring[Segmented]:
        """Run the networks, and begin to make labels of what they say.

        Args:
            prepared: the case.
            onto: the grid of the labels; the raw image's when omitted.
            on_tiles: progress; may raise to abandon the case.
            on_probabilities: given what labels are decided by too, from another thread.

        Raises:
            EnvironmentFault, MedMambaError: as of `planes`.
        """
        course = Course()
        stream = LabelStream(
            onto or prepared.record,
            self.recipe,
            self.label_map,
            compat=self.settings.compat,
            on_probabilities=on_probabilities,
        )
        steps = (
            partial(stream.feed, start, planes.numpy())
            for start, planes in self.planes(prepared, course, on_tiles)
        )
        return restore_beside(steps, partial(segmented, stream, course), nbytes=stream.nbytes)

    def restore(self, inferred: Restoring[Segmented]) -> Segmented:
        """Wait for the labels (D, H, W)."""
        return inferred.result()

    def predict(self, image: Volume) -> NDArray[Any]:
        """Return the labels (D, H, W) of one image."""
        return self.restore(self.infer(self.prepare(image))).labels

    def _source(self, prepared: PreprocessedCase, course: Course) -> TileSource:
        image = torch.from_numpy(prepared.data)
        if self._previous is None:
            return TileSource(image=image)
        assert prepared.coarse is not None
        first = self._previous.restore(self._previous.infer(prepared.coarse))
        for fallback in first.fallbacks:
            course.note(fallback)
        course.tiles += first.tiles
        coarse = labels_on_working_grid(first.labels, prepared.record, self.recipe)
        return TileSource(
            image=image,
            labels=torch.from_numpy(coarse),
            values=self.label_map.foreground_values,
        )

    def _climb(
        self,
        source: TileSource,
        precision: str,
        reached: int,
        course: Course,
        on_tiles: TileProgress | None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Planes from ``reached`` on, with less and less memory."""
        halved = smaller_patch(self.patch_size, self.settings.patch_multiple)
        for rung in rungs(smaller=halved != self.patch_size, cpu=self.settings.cpu_fallback):
            try:
                with self._networks_on(rung):
                    votes = Votes(self.label_map)
                    stream = self._stream(source, precision, rung, on_tiles, votes)
                    for start, planes in stream:
                        fresh = planes[:, max(0, reached - start) :]
                        if fresh.shape[1]:
                            reached = start + planes.shape[1]
                            yield reached - fresh.shape[1], fresh.to("cpu")
            except torch.OutOfMemoryError:
                logger.warning(
                    "out of memory on %s (%s)", self.settings.device, rung.name or "plain"
                )
                continue
            if rung.name:
                course.note(rung.name)
            course.add(stream, votes)
            return
        raise EnvironmentFault(
            f"device {self.settings.device}: too little memory for one patch of "
            f"{self._grid.patch_size}. Use a device with more memory, or the CPU "
            "(--allow-cpu-fallback for cases like this).",
            code="E_MEM_GPU",
        )

    @contextmanager
    def _networks_on(self, rung: Rung) -> Iterator[None]:
        """Have the networks where a rung needs them, and bring them back for the next case."""
        if not rung.on_cpu:
            yield
            return
        try:
            for network in self._networks:
                network.to(CPU)
            yield
        finally:
            for network in self._networks:
                network.to(self.settings.device)

    def _stream(
        self,
        source: TileSource,
        precision: str,
        rung: Rung,
        on_tiles: TileProgress | None,
        votes: Votes,
    ) -> PlaneStream:
        settings = self.settings
        return PlaneStream(
            self._networks,
            source,
            patch_size=(
                smaller_patch(self.patch_size, settings.patch_multiple)
                if rung.smaller
                else self.patch_size
            ),
            mirror_axes=settings.mirror_axes,
            step=settings.step,
            tile_batch=1 if rung.single else self.tile_batch,
            compat=settings.compat,
            autocast=None if rung.on_cpu else AUTOCAST[precision],
            device=CPU if rung.on_cpu else settings.device,
            accumulate_on=CPU if rung.accumulate_on_host else settings.device,
            on_tiles=on_tiles,
            reuse_constant=settings.reuse_constant,
            votes=votes,
        )


def _device_memory(device: torch.device) -> int | None:
    """Memory the device is built with; what others use of it must not change results."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)
