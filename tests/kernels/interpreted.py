"""The Triton scan under Triton's interpreter, which must be switched on before triton is imported.

So it runs in a process of its own, which looks like a backend to the tests of scan_cases.py.
"""

import importlib
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from medmamba.kernels.arguments import Gradients, Needs, ScanArguments
from medmamba.kernels.triton_cut import Tuning


class Interpreted:
    """A backend module's functions, executed elsewhere.

    Args:
        tuning: small chunks, so that short sequences already take several.
    """

    def __init__(self, tuning: Tuning) -> None:
        self.tuning = tuning
        context = multiprocessing.get_context("spawn")
        before = os.environ.get("TRITON_INTERPRET")
        os.environ["TRITON_INTERPRET"] = "1"
        try:
            self.pool = ProcessPoolExecutor(1, mp_context=context)
            self.pool.submit(torch.set_num_threads, 1).result()
        finally:
            del os.environ["TRITON_INTERPRET"]
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before

    def tuned(self, **sizes: Any) -> Self:
        """The same process with other sizes."""
        other = object.__new__(type(self))
        other.pool, other.tuning = self.pool, Tuning(**sizes)
        return other

    def refusal(self, arguments: ScanArguments) -> str | None:
        return self._call("refusal", arguments)

    def states_shape(self, arguments: ScanArguments) -> tuple[int, ...]:
        return self._call("states_shape", arguments, tuning=self.tuning)

    def forward(
        self, arguments: ScanArguments, *, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._call("forward", arguments, save_states=save_states, tuning=self.tuning)

    def backward(
        self,
        arguments: ScanArguments,
        states: Tensor,
        grad_out: Tensor | None,
        grad_h_last: Tensor | None,
        needs: Needs,
    ) -> Gradients:
        rest = (states, grad_out, grad_h_last, needs)
        return self._call("backward", arguments, *rest, tuning=self.tuning)

    def convolution(self, name: str, *values: Any) -> Any:
        """A function of triton_conv.py."""
        return self._call(name, *values, module="triton_conv")

    def _call(self, name: str, *values: Any, module: str = "triton", **options: Any) -> Any:
        return _unpack(self.pool.submit(_run, module, name, _pack((values, options))).result())


def _run(module: str, name: str, message: bytes) -> bytes:
    functions = importlib.import_module(f"medmamba.kernels.{module}")
    values, options = _unpack(message)
    return _pack(getattr(functions, name)(*values, **options))


def _pack(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(message: bytes) -> Any:
    return torch.load(io.BytesIO(message), weights_only=False)
