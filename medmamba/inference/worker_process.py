"""A child process and the messages to and from it: JSON, one a line, over its standard streams.

Plain pipes need no network, no shared memory and no importable main module, so that this works from
scripts, notebooks and locked-down containers alike. What the child prints goes to standard error.
"""

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

Message = dict[str, Any]

EXIT_DEVICE_LOST = 70
"""Of a worker whose GPU context is beyond use."""

SPINS = 20_000
"""Looks of a waiting thread before it sleeps. plain_unet on a patch, 2 threads: idle machine 54 ms
sleeping at once, 47 with these, 47 with 300,000 (what is usual); 2 busy cores 0.09, 0.13, 0.12
to 0.36 s."""

PATIENCE_S = 5.0
"""A process that has not ended so long after being killed waits for a dead disk or server."""


class WorkerDiedError(Exception):
    """The process has ended without saying so.

    Args:
        cause: how, for people.
    """

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def worker_command(module: str) -> list[str]:
    """Return the command that runs a module of this package in a process of its own."""
    # -P: a file in the working folder must never be taken for a module.
    return [sys.executable, "-P", "-m", module]


def can_start_workers() -> bool:
    """Tell whether this process can start another Python; one frozen into a program cannot."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


class WorkerProcess:
    """A child process that is talked to.

    Args:
        command: what to run.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603 a command of our own
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()
        )
        self._inbox: queue.Queue[Message | None] = queue.Queue()
        self._over = False
        assert self._process.stdout is not None
        threading.Thread(
            target=_listen, args=(self._process.stdout, self._inbox), daemon=True
        ).start()

    def send(self, message: Message) -> None:
        """Send a message; to a dead process it is lost, as `receive` will tell."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message, None when there was none in time.

        Raises:
            WorkerDiedError: there will be none.
        """
        if self._over:
            raise WorkerDiedError("it has ended")
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self._over = True
            raise WorkerDiedError(self._cause())
        return message

    def kill(self) -> bool:
        """End the process at once; False if even that did not help within `PATIENCE_S`."""
        self._over = True
        self._process.kill()
        return self._wait()

    def close(self) -> None:
        """End the process if it runs, and let go of its streams."""
        if self._process.poll() is None and not self.kill():
            logger.warning("process %d cannot be ended; leaving it behind", self._process.pid)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _wait(self) -> bool:
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _cause(self) -> str:
        if not self._wait():
            self.kill()
            return "it closed its streams"
        code = self._process.returncode
        if code == EXIT_DEVICE_LOST:
            return "it lost its device"
        if code >= 0:
            return f"it ended with exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hints = {
            "SIGKILL": ", as the system does when memory runs out",
            "SIGSEGV": ", a crash in native code",
        }
        return f"it was ended by {name}{hints.get(name, '')}"


class Supervisor:
    """The other end: what a worker process says to, and hears from, the process that started it."""

    def __init__(self) -> None:
        self._reader: IO[bytes] = os.fdopen(os.dup(0), "rb")
        self._writer: IO[bytes] = os.fdopen(os.dup(1), "wb")
        self._lock = threading.Lock()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        try:
            os.dup2(2, 1)
        except OSError:  # standard error is closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # A terminal signals its whole group; when to stop is the supervisor's to say.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def tell(self, **message: Any) -> None:
        """Send a message."""
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            self._writer.write(line)
            self._writer.flush()

    def hear(self) -> Message:
        """Wait for a message; without a supervisor there is nothing left to live for."""
        line = self._reader.readline()
        if not line.endswith(b"\n"):
            os._exit(1)
        message: Message = json.loads(line)
        return message


def _listen(stream: IO[bytes], inbox: "queue.Queue[Message | None]") -> None:
    with stream:
        for line in stream:
            if line.endswith(b"\n"):  # else its writer was killed amid the line
                inbox.put(json.loads(line))
    inbox.put(None)


def _environment() -> Mapping[str, str]:
    """Let the child find what this process can import, and wait without burning processors.

    Threads that spin between operations for as long as torch's runtime does by itself cost four
    times the whole run on a machine where others work too; threads that sleep at once make
    every pass of an idle one a sixth slower.
    """
    places = [str(Path(entry or ".").resolve()) for entry in sys.path]
    waiting = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": str(SPINS)}
    return {**waiting, **os.environ, "PYTHONPATH": os.pathsep.join(places)}
