"""Several predictors as one: the mean of their probabilities on the grid of the raw image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from medmamba.inference.course import Course, segmented
from medmamba.inference.job import Segmented
from medmamba.inference.predictor import PredictionSettings, Predictor
from medmamba.inference.records import Parity
from medmamba.inference.restoring import Restoring, restore_beside
from medmamba.inference.sliding_window import TileProgress
from medmamba.labels import UsualVolume
from medmamba.preprocessing.pipeline import PreprocessedCase
from medmamba.preprocessing.restore import OnProbabilities
from medmamba.preprocessing.restore_mean import MeanStream
from medmamba.volume import Volume

if TYPE_CHECKING:  # blosc2, a tenth of a second of every start
    from medmamba.preprocessing.probability_file import ProbabilityKind

Finish = Callable[[NDArray[Any]], NDArray[Any]]
"""What is done to the labels (D, H, W) of a case in the end: postprocessing."""


class EnsemblePredictor:
    """Members that may differ in network, spacing and patch, but not in labels or channels.

    Args:
        members: one predictor per network; one alone is used as it is.
        finish: applied to the labels of every case; None for nothing.
        usual: volumes of labels in the training cases.
        probabilities: in what form they are to be kept; ``none`` for labels alone.
    """

    def __init__(
        self,
        members: Sequence[Predictor],
        finish: Finish | None = None,
        usual: Mapping[str, UsualVolume] = MappingProxyType({}),
        probabilities: "ProbabilityKind" = "none",
    ) -> None:
        self.members = tuple(members)
        self.label_map = members[0].label_map
        self._finish = finish
        self._usual = usual
        self._probabilities = probabilities

    @property
    def settings(self) -> PredictionSettings:
        """Of the first member."""
        return self.members[0].settings

    @property
    def parities(self) -> tuple[Parity, ...]:
        """How reduced precision compared with float32, for members it was asked for."""
        return tuple(member.parity for member in self.members if member.parity is not None)

    @property
    def channels(self) -> int:
        """Image channels a case must have."""
        return self.members[0].channels

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Of the first member."""
        return self.members[0].patch_size

    def parameters(self) -> dict[str, Any]:
        """Everything that decides what comes out, but for the model itself."""
        found = self.members[0].parameters()
        if len(self.members) > 1:
            found["members"] = [member.parameters() for member in self.members]
        if self._probabilities != "none":
            found["probabilities"] = self._probabilities
        return found

    def numerics(self) -> dict[str, Any]:
        """What computes, as JSON values."""
        if len(self.members) == 1:
            return self.members[0].numerics()
        return {
            **self.members[0].numerics(),
            "members": [member.numerics() for member in self.members],
        }

    def prepare(self, image: Volume) -> PreprocessedCase:
        """Bring an image to the working grid of every member; the image must not be used again."""
        # The last one may have the memory of the image.
        last = len(self.members) - 1
        first, *others = (
            member.prepare(image, consume=number == last)
            for number, member in enumerate(self.members)
        )
        return replace(first, siblings=tuple(others))

    def infer(
        self,
        prepared: PreprocessedCase,
        *,
        on_tiles: TileProgress | None = None,
        on_probabilities: OnProbabilities | None = None,
    ) -> Restoring[Segmented]:
        """Run the networks of every member, and begin to make labels of what they say.

        Args:
            prepared: the case.
            on_tiles: progress; may raise to abandon the case.
            on_probabilities: given what labels are decided by too, from another thread.

        Raises:
            EnvironmentFault: the device has too little memory.
            MedMambaError: logits are not finite.
        """
        if len(self.members) == 1:
            return self.members[0].infer(
                prepared, on_tiles=on_tiles, on_probabilities=on_probabilities
            )
        course = Course()
        cases = (prepared, *prepared.siblings)
        stream = MeanStream(
            [case.record for case in cases],
            [member.recipe for member in self.members],
            self.label_map,
            compat=self.settings.compat,
            on_probabilities=on_probabilities,
        )
        steps = self._steps(cases, stream, course, on_tiles)
        return restore_beside(steps, partial(segmented, stream, course), nbytes=stream.nbytes)

    def restore(self, inferred: Restoring[Segmented]) -> Segmented:
        """Wait for the labels (D, H, W) on the grid of the raw image."""
        found = replace(inferred.result(), usual=self._usual)
        return found if self._finish is None else replace(found, labels=self._finish(found.labels))

    def predict(self, image: Volume) -> NDArray[Any]:
        """Return the labels (D, H, W) of one image."""
        return self.restore(self.infer(self.prepare(image))).labels

    def _steps(
        self,
        cases: Sequence[PreprocessedCase],
        stream: MeanStream,
        course: Course,
        on_tiles: TileProgress | None,
    ) -> Iterator[Callable[[], None]]:
        """Planes of the member that is behind, until all have given all of theirs."""
        sources = [
            member.planes(case, course, _shifted(on_tiles, index, len(cases)))
            for index, (member, case) in enumerate(zip(self.members, cases, strict=True))
        ]
        remaining = [case.record.working_shape[0] for case in cases]
        totals = tuple(remaining)
        while any(remaining):
            member = max(range(len(cases)), key=lambda at: remaining[at] / totals[at])
            start, planes = next(sources[member])
            remaining[member] -= planes.shape[1]
            yield partial(stream.feed, member, start, planes.numpy())


def _shifted(on_tiles: TileProgress | None, index: int, count: int) -> TileProgress | None:
    """Progress of one member of several as progress of the whole."""
    if on_tiles is None:
        return None
    report: TileProgress = on_tiles
    return lambda done, total: report(index * total + done, count * total)
