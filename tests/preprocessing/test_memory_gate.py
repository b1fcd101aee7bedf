import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from medmamba.preprocessing.memory_gate import MemoryGate, free_memory_gate


def test_what_is_held_together_stays_below_the_limit() -> None:
    gate, lock, held, most = MemoryGate(100), threading.Lock(), 0, 0

    def work(size: int) -> None:
        nonlocal held, most
        with gate.hold(size):
            with lock:
                held += size
                most = max(most, held)
            time.sleep(0.002)
            with lock:
                held -= size

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [40, 30, 60, 10, 50, 90, 20, 70] * 4))
    assert 50 < most <= 100


def test_a_case_larger_than_the_limit_runs_alone() -> None:
    gate = MemoryGate(10)
    entered = threading.Event()

    def small() -> None:
        with gate.hold(1):
            entered.set()

    with gate.hold(1000):
        thread = threading.Thread(target=small)
        thread.start()
        assert not entered.wait(0.05)
    thread.join(5)
    assert entered.is_set()


def test_a_failure_gives_the_bytes_back() -> None:
    gate = MemoryGate(10)
    with pytest.raises(RuntimeError, match="broken"), gate.hold(10):
        raise RuntimeError("broken")
    with gate.hold(10):
        pass


def test_there_is_some_memory_on_this_machine() -> None:
    with free_memory_gate().hold(1):
        pass
