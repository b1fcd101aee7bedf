"""Samples of a batch side by side on a CPU: one thread each, not all threads in one operation.

A network of many small operations gains little from a second thread in each, its samples do. Not
so one of dense convolutions: oneDNN divides those well, and with AMX its weight gradients wait for
each other when two run at once (five times slower steps). The loss still sees the whole batch.
Results do not depend on which thread is faster: every sample's gradients are computed apart and
added in the order of the batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch
from torch import Tensor, nn

from medmamba.networks.memory_format import is_dense_convolution
from medmamba.training.precision import autocast

Loss = Callable[[list[Tensor]], Tensor]


class SampleThreads:
    """Forward and backward of a network, one thread per sample.

    Args:
        network: on the CPU; must not draw random numbers, whose order would vary.
        precision: ``bf16`` or ``fp32``.
    """

    def __init__(self, network: nn.Module, *, precision: str) -> None:
        self._network = network
        self._precision = precision
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(
            threads, "sample", initializer=torch.set_num_threads, initargs=(1,)
        )
        everyone = Barrier(threads)
        for started in [self._pool.submit(everyone.wait) for _ in range(threads)]:
            started.result()
        # Setting it in a thread also sets the default of threads to come.
        torch.set_num_threads(threads)

    def gradients(self, data: Tensor, loss: Loss) -> Tensor:
        """Set the gradients of all parameters and return the loss.

        Args:
            data: (B, C, *spatial).
            loss: of the network's outputs for the whole batch, highest resolution first.
        """
        parameters = [p for p in self._network.parameters() if p.requires_grad]
        samples = list(self._pool.map(self._outputs, torch.split(data, 1)))
        joined = [
            torch.cat(level).detach().requires_grad_() for level in zip(*samples, strict=True)
        ]
        value = loss(joined)
        value.backward()  # type: ignore[no-untyped-call]
        shares = list(
            self._pool.map(
                lambda number: _shares(samples[number], joined, number, parameters),
                range(len(samples)),
            )
        )
        for parameter, parts in zip(parameters, zip(*shares, strict=True), strict=True):
            found = [part for part in parts if part is not None]
            parameter.grad = sum(found[1:], start=found[0]) if found else None
        return value

    def _outputs(self, sample: Tensor) -> list[Tensor]:
        with torch.enable_grad(), autocast(sample.device, self._precision):
            outputs = self._network(sample)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def suits(network: nn.Module, device: torch.device, batch_size: int) -> bool:
    """Tell whether samples should run side by side.

    On few cores, where there are no dense convolutions, and no random numbers inside, whose order
    would vary.
    """
    threads = torch.get_num_threads()
    draws = any(getattr(module, "rate", 0.0) for module in network.modules())
    dense = any(is_dense_convolution(module) for module in network.modules())
    return device.type == "cpu" and 2 <= threads <= batch_size and not draws and not dense


def _shares(
    outputs: Sequence[Tensor], joined: Sequence[Tensor], number: int, parameters: list[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    """One sample's share of every parameter's gradient."""
    used = [level for level, whole in enumerate(joined) if whole.grad is not None]
    grads = [joined[level].grad[number : number + 1] for level in used]  # type: ignore[index]
    return torch.autograd.grad(
        [outputs[level] for level in used], parameters, grads, allow_unused=True
    )
