"""Working ahead: order, errors with the case's name, and never a hang."""

import threading
import time

import pytest
import torch

from medmamba.errors import EnvironmentFault, TrainingError
from medmamba.training import loading
from medmamba.training.loading import BatchLoader
from medmamba.training.sampling import Batch


class Sampler:
    """Makes empty batches; ``fail`` may raise for a batch number."""

    def __init__(self, fail=lambda number, attempt: None) -> None:
        self.current_case = ""
        self.made: list[int] = []
        self.threads: set[int] = set()
        self._fail = fail

    def batch(self, iteration: int, samples=None) -> Batch:
        self.current_case = f"case_{iteration}"
        self.made.append(iteration)
        self.threads.add(torch.get_num_threads())
        self._fail(iteration, self.made.count(iteration))
        empty = torch.zeros(1)
        return Batch(data=empty, labels=empty, cases=(self.current_case,), iteration=iteration)


def test_batches_come_in_order_and_a_few_ahead() -> None:
    sampler = Sampler()
    with BatchLoader(sampler, first=5, ahead=2) as loader:
        assert [loader.next().iteration for _ in range(4)] == [5, 6, 7, 8]
        time.sleep(0.1)
        assert len(sampler.made) <= 4 + 2 + 1
    assert threading.active_count() == 1 or not loader._thread.is_alive()


def test_the_loader_computes_with_one_thread_and_leaves_the_caller_its_own() -> None:
    torch.set_num_threads(2)
    sampler = Sampler()
    with BatchLoader(sampler, first=0) as loader:
        loader.next()
        assert torch.get_num_threads() == 2
    assert sampler.threads == {1}


def test_a_batch_that_fails_once_is_made_again() -> None:
    def fail(number: int, attempt: int) -> None:
        if number == 1 and attempt == 1:
            raise OSError("gone for a moment")

    sampler = Sampler(fail)
    with BatchLoader(sampler, first=0) as loader:
        assert [loader.next().iteration for _ in range(3)] == [0, 1, 2]


def test_a_batch_that_cannot_be_made_ends_with_the_case_and_the_cause() -> None:
    def fail(number: int, attempt: int) -> None:
        if number == 2:
            raise RuntimeError("corrupt chunk")

    with BatchLoader(Sampler(fail), first=0) as loader:
        loader.next()
        loader.next()
        with pytest.raises(TrainingError, match=r"case case_2.*corrupt chunk") as caught:
            loader.next()
    assert caught.value.code == "E_TRAIN_LOADER"
    assert "fail" in [entry.name for entry in caught.traceback] or caught.value.__cause__
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_no_memory_is_told_apart() -> None:
    def fail(number: int, attempt: int) -> None:
        raise MemoryError

    with BatchLoader(Sampler(fail), first=0) as loader, pytest.raises(EnvironmentFault) as caught:
        loader.next()
    assert caught.value.code == "E_MEM_HOST"


def test_asking_for_more_than_there_is_does_not_hang(monkeypatch) -> None:
    monkeypatch.setattr(loading, "POLL_S", 0.05)
    with BatchLoader(Sampler(), first=0, stop=1) as loader:
        loader.next()
        with pytest.raises(TrainingError, match="ended without a batch"):
            loader.next()


def test_a_thread_stuck_in_a_read_does_not_hold_up_the_end(monkeypatch, caplog) -> None:
    monkeypatch.setattr(loading, "CLOSE_S", 0.2)
    release = threading.Event()

    def stuck(number: int, attempt: int) -> None:
        release.wait(10)

    begun = time.monotonic()
    with BatchLoader(Sampler(stuck), first=0):
        pass
    assert time.monotonic() - begun < 5
    assert "case_0 is still being read" in caplog.text
    release.set()


def test_a_slow_case_is_named_while_waiting(monkeypatch, caplog) -> None:
    monkeypatch.setattr(loading, "POLL_S", 0.05)
    monkeypatch.setattr(loading, "SLOW_S", 0.1)
    with BatchLoader(Sampler(lambda number, attempt: time.sleep(0.4)), first=7) as loader:
        assert loader.next().iteration == 7
    assert "waiting for case case_7" in caplog.text


def test_a_read_that_never_ends_is_given_up_and_named(monkeypatch) -> None:
    monkeypatch.setattr(loading, "POLL_S", 0.05)
    monkeypatch.setattr(loading, "STALLED_S", 0.3)
    monkeypatch.setattr(loading, "CLOSE_S", 0.1)
    release = threading.Event()
    with (
        BatchLoader(Sampler(lambda number, attempt: release.wait(20)), first=3) as loader,
        pytest.raises(TrainingError, match=r"case case_3.*hangs") as caught,
    ):
        loader.next()
    assert caught.value.code == "E_TRAIN_LOADER"
    release.set()
