"""Where code would run: on the CPU, or, for estimates made without one, on a GPU.

Some layers have a form for CPUs, which keeps other tensors for the backward pass than the common
one. Whoever counts what a GPU would need asks for the common forms on fake CPU tensors.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

_gpu: ContextVar[bool] = ContextVar("gpu", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let layers take the forms that they have on a GPU; for fake tensors."""
    token = _gpu.set(True)
    try:
        yield
    finally:
        _gpu.reset(token)


def is_on_gpu() -> bool:
    """Tell whether an estimate for a GPU is being made."""
    return _gpu.get()


def is_fake(tensor: Tensor) -> bool:
    """Tell whether a tensor has a size and no values, so that one chunk stands for all."""
    return tensor.untyped_storage().device.type == "meta"


def on_cpu(tensor: Tensor) -> bool:
    """Tell whether the forms for CPUs are to be taken; ``torch.compile`` makes its own."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" and not _gpu.get()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the GPU that a tensor is on the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
