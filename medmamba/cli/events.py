"""Events of a run as JSON Lines, to a file or to standard output."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from medmamba.errors import EnvironmentFault

if TYPE_CHECKING:
    from medmamba.inference.journal import OnEvent


@contextmanager
def events_to(target: str | None) -> "Iterator[OnEvent | None]":
    """Give what writes one line per event: appended to a file, or to standard output for ``-``.

    A reader that has gone, or a disk that is full, ends the lines and not the run.

    Raises:
        EnvironmentFault: the file cannot be opened.
    """
    if target is None:
        yield None
    elif target == "-":
        yield lambda event: _write(sys.stdout, event)
    else:
        with _opened(target) as stream:
            yield lambda event: _write(stream, event)


@contextmanager
def _opened(target: str) -> Iterator[IO[str]]:
    try:
        stream = Path(target).open("a", encoding="utf-8")  # noqa: SIM115 closed below
    except OSError as error:
        raise EnvironmentFault(
            f"{target}: events cannot be written there ({error.strerror}). Choose another file.",
            code="E_OUT_NOT_WRITABLE",
        ) from error
    try:
        yield stream
    finally:
        with suppress(OSError):
            stream.close()


def _write(stream: IO[str], event: dict[str, Any]) -> None:
    with suppress(OSError):
        stream.write(json.dumps(event, ensure_ascii=False, sort_keys=True) + "\n")
        stream.flush()
