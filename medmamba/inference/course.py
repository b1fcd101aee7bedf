"""What happened while networks ran over a case, and what becomes of it in the end."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from numpy.typing import NDArray

from medmamba.inference.job import Segmented
from medmamba.inference.records import TileCount
from medmamba.inference.sliding_window import PlaneStream
from medmamba.inference.votes import Votes
from medmamba.preprocessing.confidence import Confidence


@dataclass
class Course:
    """What happened while networks ran.

    Args:
        fallbacks: what had to be done differently than settings say.
        tiles: of all networks that did not see the same ones.
        votes: of flips and folds; None before any were counted.
    """

    fallbacks: tuple[str, ...] = ()
    tiles: TileCount = field(default_factory=TileCount)
    votes: Votes | None = None

    def note(self, fallback: str) -> None:
        """Add a fallback, once."""
        self.fallbacks = tuple(dict.fromkeys((*self.fallbacks, fallback)))

    def add(self, stream: PlaneStream, votes: Votes) -> None:
        """Add what a stream that came to its end has counted."""
        self.tiles += TileCount(total=stream.tiles, reused=stream.reused)
        self.votes = votes if self.votes is None else self.votes + votes


class _Stream(Protocol):
    """``restore.LabelStream`` or ``restore_mean.MeanStream``."""

    def finish(self) -> NDArray[Any]:
        """Return the labels."""

    @property
    def confidence(self) -> dict[str, Confidence]:
        """By label name."""


def segmented(stream: _Stream, course: Course) -> Segmented:
    """Put together what a case became."""
    labels = stream.finish()
    apart = {} if course.votes is None else course.votes.disagreement
    return Segmented(
        labels=labels,
        confidence={
            name: replace(found, disagreement=apart.get(name))
            for name, found in stream.confidence.items()
        },
        fallbacks=course.fallbacks,
        tiles=course.tiles,
    )
