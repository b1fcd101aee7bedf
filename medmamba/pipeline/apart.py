"""Runs of a comparison in processes of their own, which end when the comparison does.

A process (``python -m medmamba.pipeline.apart RUN``) reads its standard input, which nobody writes
to: when the comparison stops or dies, by whatever signal, the system closes it, and the process
saves its state and ends. Without this a killed comparison would leave runs behind that go on
beside those of the next one.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from medmamba.errors import MedMambaError, TrainingError
from medmamba.files import from_plain, read_json, to_json, write_atomic
from medmamba.pipeline.contest import (
    SPEC_FILE,
    ContestResult,
    ContestRun,
    read_result,
    run_here,
)

GRACE_S = 60.0
"""A step of the slowest network and a checkpoint take less."""


class RunsApart:
    """Does runs, each in a process of its own; any number at once."""

    def __init__(self) -> None:
        self._under_way: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._change = threading.Lock()

    def __call__(self, run: ContestRun, folder: Path) -> ContestResult:
        """Do a run.

        Raises:
            TrainingError: the process failed, its message has gone to stderr; or it was stopped.
        """
        write_atomic(folder / SPEC_FILE, to_json(run))
        command = [sys.executable, "-m", "medmamba.pipeline.apart", str(folder)]
        with self._change:
            if self._stopped:
                raise TrainingError(f"run {folder}: not begun, the comparison was stopped.")
            # A session of its own: Ctrl-C reaches the comparison alone, which then stops its runs.
            process = subprocess.Popen(  # noqa: S603 our own module
                command, stdin=subprocess.PIPE, start_new_session=True
            )
            self._under_way.add(process)
        code = process.wait()
        self._under_way.discard(process)
        result = read_result(folder, run.key)
        if code != 0 or result is None:
            raise TrainingError(
                f"run {folder}: ended with exit code {code}; its message is above. Finished runs "
                "are kept: correct the cause and run the same command again."
            )
        return result

    def stop(self) -> None:
        """Let the processes save and end; kill those that take longer than ``GRACE_S``."""
        with self._change:
            self._stopped = True
            processes = tuple(self._under_way)
        for process in processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in processes:
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _end_with_starter() -> None:
    """Send this process SIGTERM once its standard input ends; to be called by its main thread."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _main(folder: Path) -> int:
    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")  # in one piece: other runs write there too
        sys.stderr.flush()

    _end_with_starter()
    try:
        content = read_json(folder / SPEC_FILE, what="run", error=MedMambaError)
        run = from_plain(ContestRun, content, what=str(folder), error=MedMambaError)
        run_here(run, folder, say)
    except MedMambaError as error:
        say(f"error [{error.code}]: {error.message}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1])))
