"""Several predictors as one: the mean of their probabilities on the grid of the raw image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medmamba.inference.predictor import PredictionSettings, Predictor
from medmamba.inference.sliding_window import TileProgress
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord
from medmamba.preprocessing.restore import labels_from_probabilities
from medmamba.volume import Volume

Finish = Callable[[NDArray[Any]], NDArray[Any]]
"""What is done to the labels (D, H, W) of a case in the end: postprocessing."""


@dataclass(frozen=True, eq=False)
class MemberLogits:
    """Logits of every member with the record of its working grid."""

    parts: tuple[tuple[Any, UndoRecord], ...]

    @property
    def nbytes(self) -> int:
        """Memory of all of them."""
        return sum(int(logits.nbytes) for logits, _ in self.parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class InferredByMembers:
    """What the members made of a case."""

    logits: MemberLogits
    fallbacks: tuple[str, ...] = ()


class EnsemblePredictor:
    """Members that may differ in network, spacing and patch, but not in labels or channels.

    Args:
        members: one predictor per network; one alone is used as it is.
        finish: applied to the labels of every case; None for nothing.
    """

    def __init__(self, members: Sequence[Predictor], finish: Finish | None = None) -> None:
        self.members = tuple(members)
        self.label_map = members[0].label_map
        self._finish = finish

    @property
    def settings(self) -> PredictionSettings:
        """Of the first member."""
        return self.members[0].settings

    @property
    def channels(self) -> int:
        """Image channels a case must have."""
        return self.members[0].channels

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Of the first member."""
        return self.members[0].patch_size

    def parameters(self) -> dict[str, Any]:
        """Everything that decides which labels come out, but for the model itself."""
        if len(self.members) == 1:
            return self.members[0].parameters()
        return {
            **self.members[0].parameters(),
            "members": [member.parameters() for member in self.members],
        }

    def numerics(self) -> dict[str, Any]:
        """What computes, as JSON values."""
        return self.members[0].numerics()

    def prepare(self, image: Volume) -> PreprocessedCase:
        """Bring an image to the working grid of every member."""
        first, *others = (member.prepare(image) for member in self.members)
        return replace(first, siblings=tuple(others))

    def infer(
        self, prepared: PreprocessedCase, *, on_tiles: TileProgress | None = None
    ) -> InferredByMembers:
        """Run the networks of every member.

        Raises:
            EnvironmentFault: the device has too little memory.
            MedMambaError: logits are not finite.
        """
        cases = (prepared, *prepared.siblings)
        parts: list[tuple[Any, UndoRecord]] = []
        fallbacks: list[str] = []
        for member, case in zip(self.members, cases, strict=True):
            found = member.infer(case, on_tiles=on_tiles)
            parts.append((found.logits, case.record))
            fallbacks += found.fallbacks
        return InferredByMembers(
            logits=MemberLogits(tuple(parts)), fallbacks=tuple(dict.fromkeys(fallbacks))
        )

    def restore(self, logits: MemberLogits, record: UndoRecord) -> NDArray[Any]:
        """Turn the members' logits into labels (D, H, W) on the grid of the raw image."""
        labels = self._labels(logits)
        return labels if self._finish is None else self._finish(labels)

    def predict(self, image: Volume) -> NDArray[Any]:
        """Return the labels (D, H, W) of one image."""
        prepared = self.prepare(image)
        return self.restore(self.infer(prepared).logits, prepared.record)

    def _labels(self, logits: MemberLogits) -> NDArray[Any]:
        if len(self.members) == 1:
            return self.members[0].restore(*logits.parts[0])
        total: NDArray[np.float32] | None = None
        for member, (part, record) in zip(self.members, logits.parts, strict=True):
            found = member.probabilities(part, record)
            total = found if total is None else np.add(total, found, out=total)
        assert total is not None
        return labels_from_probabilities(total / len(self.members), self.label_map)
