"""Forward, loss and backward of a step as one CUDA graph, launched once.

On small patches a GPU waits for its launches: thousands a step, each some microseconds of the
host's time. A graph keeps them, and the memory between them, and is replayed with new contents of
the same inputs; kernels and results are those of the step it was recorded from.
"""

import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from medmamba.errors import TrainingError

logger = logging.getLogger(__name__)

WARMUP = 3
"""Steps taken as usual first: libraries choose algorithms and kernels are compiled in them."""

ROOM = 1.25
"""A graph holds its step's memory for good, and validation needs some beside it."""

recording = threading.Lock()
"""Held while a graph is recorded, and by whoever else uses the GPU from another thread: CUDA ends
a recording when a thread beside it allocates."""

Compute = Callable[[Tensor, Tensor], Tensor]
"""Writes the gradients of a batch (data, target) into parameters that have none; gives the loss."""


class StepGraph:
    """The gradients of one step after another, from a graph as soon as there is one.

    Args:
        network: whose parameters get the gradients.
        compute: one step's work as it is done without a graph. It must not ask the GPU for values.
    """

    def __init__(self, network: nn.Module, compute: Compute) -> None:
        self._parameters = tuple(network.parameters())
        self._compute = compute
        self._key: object = None
        self._steps = 0
        self._fits = True
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._loss: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether the last step was a replay."""
        return self._graph is not None

    def gradients(self, data: Tensor, target: Tensor) -> Tensor:
        """Give every trained parameter its gradient for a batch; return the loss.

        The tensors of gradients are the same from replay to replay.

        Raises:
            TrainingError: a step cannot be recorded.
        """
        key = (data.shape, target.shape, [p.requires_grad for p in self._parameters])
        if key != self._key:
            # A new size, or layers frozen or thawed: another graph.
            self._forget()
            self._key, self._steps = key, 0
        if self._graph is None and self._steps >= WARMUP and self._fits:
            with recording:
                self._record(data, target)
        if self._graph is None or self._inputs is None or self._loss is None:
            self._steps += 1
            self._without_gradients()
            return self._compute(data, target)
        for own, given in zip(self._inputs, (data, target), strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._loss

    def _record(self, data: Tensor, target: Tensor) -> None:
        self._without_gradients()
        self._fits = self._has_room(data.device)
        if not self._fits:
            logger.warning(
                "no CUDA graph: a step takes more than the GPU's memory has room for twice; "
                "steps are launched kernel by kernel"
            )
            return
        inputs = (data.clone(), target.clone())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(data.device), torch.cuda.graph(graph):
                loss = self._compute(*inputs).detach()
        except RuntimeError as error:
            # What CUDA and torch's random numbers are in now is not to be trained with.
            raise TrainingError(
                f"the training step cannot be recorded as a CUDA graph ({error}). "
                "Train without --cuda-graph.",
                code="E_TRAIN_GRAPH",
            ) from error
        self._graph, self._inputs, self._loss = graph, inputs, loss
        logger.info("training steps are replayed from a CUDA graph")

    def _has_room(self, device: torch.device) -> bool:
        """Whether what a step holds beyond the weights fits twice."""
        needed = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return free > ROOM * needed

    def _forget(self) -> None:
        self._graph = self._inputs = self._loss = None
        self._without_gradients()

    def _without_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def can_record(device: torch.device, processes: int) -> bool:
    """Tell whether steps on a device may become a graph; exchanges between processes may not."""
    return device.type == "cuda" and processes == 1
