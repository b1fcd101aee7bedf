"""A case on its way through prediction, and what the engine needs of a predictor. No torch."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from medmamba.dataset import Case
from medmamba.inference.records import CommitRecord, InputIdentity, TileCount
from medmamba.io import SourceHeader
from medmamba.labels import LabelMap, UsualVolume
from medmamba.preprocessing.confidence import Confidence
from medmamba.preprocessing.pipeline import PreprocessedCase
from medmamba.preprocessing.restore import OnProbabilities
from medmamba.volume import Volume

if TYPE_CHECKING:
    from medmamba.preprocessing.probability_file import ProbabilityArchive, ProbabilityFile


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmented:
    """What became of a case.

    Args:
        labels: (D, H, W) on the raw image's grid.
        confidence: how sure the networks were, by label name.
        usual: volumes of training cases, to judge the labels by.
        fallbacks: what had to be done differently than asked for.
        tiles: how many the networks saw, and how many of these were taken from an equal one.
    """

    labels: NDArray[Any]
    confidence: Mapping[str, Confidence] = field(default_factory=dict)
    usual: Mapping[str, UsualVolume] = field(default_factory=dict)
    fallbacks: tuple[str, ...] = ()
    tiles: TileCount = field(default_factory=TileCount)


class Inferred(Protocol):
    """A case that the networks are done with, while its labels may still be in the making."""

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""


class CasePredictor(Protocol):
    """What the engine needs of ``predictor.Predictor``; tests give it something simpler."""

    label_map: LabelMap

    @property
    def channels(self) -> int:
        """Image channels a case must have."""

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Voxels per axis that the network sees at once: three, or two of a 2D model."""

    def parameters(self) -> dict[str, Any]:
        """Everything that decides which labels come out, as JSON values."""

    def numerics(self) -> dict[str, Any]:
        """What computes, as JSON values that go into records."""

    def prepare(self, image: Volume) -> PreprocessedCase:
        """Bring an image to the working grid; the image may be overwritten."""

    def infer(
        self,
        prepared: PreprocessedCase,
        *,
        on_tiles: Callable[[int, int], None] | None = None,
        on_probabilities: OnProbabilities | None = None,
    ) -> Inferred:
        """Run the networks; probabilities are asked for where parameters name a form of them."""

    def restore(self, inferred: Any) -> Segmented:
        """Wait for the labels on the raw image's grid."""


class Stopwatch:
    """Seconds per named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 4)


@dataclass(kw_only=True)
class Job:
    """A case on its way; a record ends it, and later stages then pass it on untouched."""

    case: Case
    watch: Stopwatch = field(default_factory=Stopwatch)
    inputs: tuple[InputIdentity, ...] = ()
    key: str = ""
    header: SourceHeader | None = None
    prepared: PreprocessedCase | None = None
    inferred: Inferred | None = None
    segmented: Segmented | None = None
    probabilities: "ProbabilityFile | ProbabilityArchive | None" = None
    record: CommitRecord | None = None
    short_of_memory: bool = False
    device_lost: bool = False
    abandoned: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing remains to be done."""
        return self.record is not None or self.abandoned

    @property
    def memory_bytes(self) -> int:
        """Memory of the arrays that the job holds."""
        prepared = 0 if self.prepared is None else self.prepared.data.nbytes
        return prepared + (0 if self.inferred is None else self.inferred.nbytes)
