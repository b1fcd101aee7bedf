"""How far the passes of a case, one per flip and fold, are of one mind.

Counted on the tiles, where every pass speaks of the same voxels: of those that a label won, the
share of votes for something else. 0 says that each pass alone would have said the same.

Shapes: T tiles, K network outputs, (...) the patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from medmamba.labels import LabelMap


class Votes:
    """Counts over tiles, in any order.

    Args:
        label_map: what the outputs mean.
    """

    def __init__(self, label_map: LabelMap) -> None:
        self._label_map = label_map
        self._cast: Tensor | int = 0
        self._against: Tensor | int = 0

    def ballot(self, logits: Tensor) -> Tensor:
        """What one pass says: the winner of logits (T, K, ...), or per region whether it is in."""
        return logits > 0 if self._label_map.has_regions else logits.argmax(1)

    def count(self, ballots: Sequence[Tensor], mean: Tensor) -> None:
        """Compare what passes said with the mean of their logits (T, K, ...)."""
        channels, decided = mean.shape[1], self.ballot(mean)
        if self._label_map.has_regions:
            rest = [0, *range(2, decided.ndim)]
            self._cast = self._cast + decided.sum(rest) * len(ballots)
            for ballot in ballots:
                self._against = self._against + (decided & ~ballot).sum(rest)
            return
        self._cast = self._cast + torch.bincount(decided.flatten(), minlength=channels) * len(
            ballots
        )
        for ballot in ballots:
            lost = decided[decided != ballot]
            self._against = self._against + torch.bincount(lost, minlength=channels)

    def __add__(self, other: "Votes") -> "Votes":
        total = Votes(self._label_map)
        for votes in (self, other):
            if isinstance(votes._cast, Tensor) and isinstance(votes._against, Tensor):
                total._cast = total._cast + votes._cast.cpu()
                total._against = total._against + votes._against.cpu()
        return total

    @property
    def disagreement(self) -> dict[str, float]:
        """Share of votes against each label where it won, by name; {} where there was one pass."""
        if not isinstance(self._cast, Tensor) or not isinstance(self._against, Tensor):
            return {}
        first = 0 if self._label_map.has_regions else 1
        pairs = zip(self._against.tolist()[first:], self._cast.tolist()[first:], strict=True)
        return {
            name: round(against / cast, 5)
            for name, (against, cast) in zip(self._label_map.foreground, pairs, strict=True)
            if cast
        }
