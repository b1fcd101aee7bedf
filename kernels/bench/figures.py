"""The figures that the scan is held to on a CPU, and what a measurement says about each.

A must decides whether the work is done, a stretch is what it aims at. Lengths are 4096 tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure; ``at_least`` tells on which side of must and stretch it has to lie."""

    name: str
    value: float
    must: float
    stretch: float | None
    unit: str
    at_least: bool

    def verdict(self) -> str:
        """Which of the two was reached."""
        for goal, word in ((self.stretch, "stretch"), (self.must, "must")):
            if goal is not None and (self.value >= goal if self.at_least else self.value <= goal):
                return word
        return "not reached"

    def cells(self) -> tuple[str, ...]:
        """Name, value, must, stretch and verdict as text."""
        sign = "≥" if self.at_least else "≤"
        stretch = "-" if self.stretch is None else f"{sign} {self.stretch:g} {self.unit}"
        return (
            self.name,
            f"{self.value:.3g} {self.unit}",
            f"{sign} {self.must:g} {self.unit}",
            stretch,
            self.verdict(),
        )

    def line(self) -> str:
        """The same in one line."""
        name, value, must, stretch, verdict = self.cells()
        return f"{name}: {value} (must {must}, stretch {stretch}): {verdict}"


RATIOS = (
    ("forward", "step_by_step", 60.0, 120.0),
    ("forward", "parallel_scan", 20.0, 35.0),
    ("forward_backward", "linear_loop", 60.0, 150.0),
    ("forward_backward", "parallel_scan", 22.0, 40.0),
)
REFERENCE = 64  # channels
WIDE = 64  # channels from which the ratios count
NARROW = (16, 32)


def figures(results: dict) -> Iterator[Figure]:
    """Every figure for which the results hold a measurement."""
    rows = {row["channels"]: row for row in results["rows"] if row["length"] == 4096}
    if REFERENCE not in rows:
        return
    reference = rows[REFERENCE]
    for kind, must, stretch in (("forward", 0.20, 0.14), ("forward_backward", 0.70, 0.42)):
        yield _time(f"{_words(kind)}, {REFERENCE} channels", reference[kind], must, stretch)
    for kind, form, must, stretch in RATIOS:
        for channels, row in rows.items():
            if channels >= WIDE:
                yield Figure(
                    name=f"{_words(kind)} against the {_words(form)}, {channels} channels",
                    value=row[kind]["times_longer"][form],
                    must=must,
                    stretch=stretch,
                    unit="times",
                    at_least=True,
                )
    for channels in NARROW:
        for kind in ("forward", "forward_backward"):
            if channels in rows:
                yield Figure(
                    name=f"{_words(kind)}, {channels} channels over {REFERENCE}, per element",
                    value=rows[channels][kind]["ns_per_element"]
                    / reference[kind]["ns_per_element"],
                    must=1.5,
                    stretch=None,
                    unit="times",
                    at_least=False,
                )
    threads = results["two_threads_over_one"]
    for kind in ("forward", "forward_backward"):
        name = f"{_words(kind)}, two threads over one by the wall, {threads['channels']} channels"
        yield Figure(
            name=name, value=threads[kind], must=1.5, stretch=1.9, unit="times", at_least=True
        )
    if "v3" in results["instruction_sets"]:
        found = {"ns_per_element": results["instruction_sets"]["v3"]["forward"]}
        yield _time(f"forward with AVX2, {REFERENCE} channels", found, 0.40, 0.26)


def _time(name: str, found: dict, must: float, stretch: float) -> Figure:
    value = found["ns_per_element"]
    return Figure(
        name=name, value=value, must=must, stretch=stretch, unit="ns per element", at_least=False
    )


def _words(kind: str) -> str:
    return kind.replace("forward_backward", "forward + backward").replace("_", " ")
