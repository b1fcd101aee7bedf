"""The processes that train one network together: each computes a part of every batch.

Started by ``torchrun``, which sets the environment read here. The loss is that of the whole batch:
sums a loss divides by go through ``Team.total``, so that even Dice over the batch is exact, and
gradients are added up over ranks, not averaged. Alone, every method does nothing.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from medmamba.errors import MedMambaError, TrainingError, UsageError
from medmamba.training.interruption import InterruptedTrainingError, TerminatedTrainingError

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Decisions travel as CPU tensors, gradients where they are."""

TIMEOUT = timedelta(minutes=30)
"""For a rank that hangs; one that ends closes its connections and is noticed at once."""

BUCKET_BYTES = 64 * 2**20
"""Gradients are added up in pieces of about this size, all under way together."""


class LostRankError(TrainingError):
    """Another rank has ended; it says itself why."""

    default_code = "E_TRAIN_RANK"


@dataclass(frozen=True)
class Team:
    """This process among those that share a batch.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides, writes files and talks."""
        return self.rank == 0

    def share(self, batch_size: int) -> tuple[int, ...] | None:
        """Return the places of the batch this rank computes; None for all of them.

        Raises:
            UsageError: there are more ranks than patches.
        """
        if self.size == 1:
            return None
        if self.size > batch_size:
            raise UsageError(
                f"{self.size} processes for a batch of {batch_size}: start at most {batch_size}, "
                "or give a larger --batch-size."
            )
        return tuple(range(self.rank, batch_size, self.size))

    def total(self, value: Tensor) -> Tensor:
        """Sum over ranks; the gradient of the sum reaches this rank's part only."""
        if self.size == 1:
            return value
        summed: Tensor = _Total.apply(value)  # type: ignore[no-untyped-call]
        return summed

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up every parameter's gradient over ranks."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        pending = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            pending.append((bucket, flat, _collective(distributed.all_reduce, flat, async_op=True)))
        for bucket, flat, work in pending:
            _collective(work.wait)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def agree(self, leading: Sequence[float], *, any_of: bool = False) -> tuple[list[float], bool]:
        """Return rank 0's numbers, and whether ``any_of`` holds on any rank, in one exchange."""
        if self.size == 1:
            return list(leading), any_of
        values = list(leading) if self.leads else [0.0] * len(leading)
        exchanged = torch.tensor([*values, float(any_of)], dtype=torch.float64)
        _collective(distributed.all_reduce, exchanged)
        *numbers, count = exchanged.tolist()
        return numbers, count > 0

    def decide(self, flag: bool) -> bool:
        """Return what rank 0 says."""
        return bool(self.agree([float(flag)])[0][0])

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        _collective(distributed.all_gather_object, found, value)
        return found

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.agree([0.0])


ALONE = Team()


class _Total(torch.autograd.Function):
    """Sum over ranks whose gradient is handed to the own summand unchanged."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        summed = value.detach().clone()
        _collective(distributed.all_reduce, summed)
        return summed

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def world_size() -> int:
    """Return the number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_of_team() -> bool:
    """Whether this process will lead, or is alone; known before the team meets."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """Return the number of this process on its machine, and so that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def join_team(device: torch.device) -> Iterator[Team]:
    """Meet the processes that ``torchrun`` started; alone when it did not.

    A rank that fails prints its traceback and ends its process at once, so that the others notice.
    """
    if world_size() == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(BACKENDS[device.type], timeout=TIMEOUT)
    team = Team(distributed.get_rank(), distributed.get_world_size())
    try:
        yield team
    except (InterruptedTrainingError, TerminatedTrainingError):
        distributed.destroy_process_group()
        raise
    except BaseException as error:
        _end_process(team, error)
    else:
        distributed.destroy_process_group()


def _end_process(team: Team, error: BaseException) -> None:
    # Not by raising: closing a process group whose other ranks wait can take as long as they do.
    text = f"{error}\n" if isinstance(error, LostRankError) else traceback.format_exc()
    sys.stderr.write(f"rank {team.rank} of {team.size} failed: {text}")
    if isinstance(error, MedMambaError):
        sys.stderr.write(f"error [{error.code}]: rank {team.rank}: {error.message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code if isinstance(error, MedMambaError) else 1)


def _collective(exchange: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return exchange(*arguments, **options)
    except RuntimeError as error:
        raise LostRankError(
            f"another process of this training has ended or cannot be reached ({error}). "
            "See its own message; go on with --resume."
        ) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    # Backward order: the last layers' gradients are the first that exist.
    for tensor in reversed(tensors):
        if bucket and (size >= BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
