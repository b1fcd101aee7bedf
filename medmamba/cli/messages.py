"""Talk on standard error that never stops the work, even where nobody can hear it (a full disk)."""

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Write a line to standard error at once; a line that can't be written is lost."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def drop_unheard() -> None:
    """Give up on what standard error can't take, or Python would end with 120 because of it."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
