"""Which implementation of the scan runs, and why: an ordered table; the first row that can, does.

The contract of a backend, a module of this package with four functions:

``refusal(arguments) -> str | None``
    Why it cannot take these arguments (device, type, size, option), None if it can. Looks at
    shapes, types, strides and devices only, never at values: it also answers for fake tensors.
``states_shape(arguments) -> tuple[int, ...]``
    Shape of the tensor of chunk states that forward saves (type ``arguments.compute_dtype``); a
    pure function of shapes and options. Its content belongs to the backend.
``forward(arguments, *, save_states) -> (out, h_last, states)``
    ``out`` (b, l, d) made by ``arguments.empty_rows(u, out_dtype)``; ``h_last`` (b, d, n) of the
    compute type, the causal state after the last position, never an alias of h0; ``states`` of
    ``states_shape``, or with ``save_states=False`` an empty tensor of shape (0,).
``backward(arguments, states, grad_out, grad_h_last, needs) -> Gradients``
    ``grad_out`` (b, l, d) and ``grad_h_last`` (b, d, n) may be None (zero) and may have any
    strides, 0 too. Each gradient wanted by ``needs`` (of arguments that are present) has its
    argument's shape and type; the others may be None. Must be bitwise repeatable.
``description() -> str`` is optional: what it runs on, for `medmamba doctor`.

All receive `ScanArguments` (arguments.py): canonical channels-last tensors whose strides are free
as long as the channels (states) or the tokens are adjacent; A, skip, delta_bias and h0 in the
compute type; ``order`` an int32 table read as token = order[position], or None; ``reverse``:
position t uses order[l - 1 - t]; ``reset_every``: the decay becomes 0 at positions r, 2r, ... (h0
enters at position 0 only); ``segment``: local-bidirectional segments of positions, the last may be
short; h_last stays the causal state.

``MEDMAMBA_SCAN`` = reference | torch | native | triton forces one; where that one cannot run the
arguments it is an error, not a fallback.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import time
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from medmamba.errors import KernelError
from medmamba.kernels.arguments import Gradients, Needs, ScanArguments

VARIABLE = "MEDMAMBA_SCAN"
MODULES = {
    "triton": "medmamba.kernels.triton",
    "native": "medmamba.kernels.native",
    "torch": "medmamba.kernels.chunked",
    "reference": "medmamba.kernels.reference",
}
ORDER = tuple(MODULES)  # fastest first
SLOW = ("torch", "reference")
SELF_TEST_SHAPE = (1, 1024, 64, 16)  # batch, length, channels, state
SELF_TEST_TOLERANCE = 1e-5
SELF_TEST_TIME_S = 0.05  # timing of one backend


class Backend(Protocol):
    """A module that implements the scan; see the contract above."""

    def refusal(self, arguments: ScanArguments) -> str | None:
        """Why it cannot run."""

    def states_shape(self, arguments: ScanArguments) -> tuple[int, ...]:
        """Shape of the saved states."""

    def forward(
        self, arguments: ScanArguments, *, save_states: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, last state, saved states."""

    def backward(
        self,
        arguments: ScanArguments,
        states: Tensor,
        grad_out: Tensor | None,
        grad_h_last: Tensor | None,
        needs: Needs,
    ) -> Gradients:
        """Gradients."""


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """One row of the table as `medmamba doctor` shows it.

    Args:
        chosen: this backend runs plain float32 scans on the device asked about.
        reason: why it cannot run, or what it runs on; empty when there is nothing to say.
        error: largest error of the self-test relative to float64, None where it did not run.
        ns_per_element: self-test time over batch x length x channels x state.
    """

    name: str
    available: bool
    chosen: bool
    reason: str
    error: float | None = None
    ns_per_element: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the self-test ran and agreed with the definition."""
        return self.error is not None and self.error <= SELF_TEST_TOLERANCE


def choose(arguments: ScanArguments) -> Backend:
    """The first backend of the table that can run these arguments.

    Raises:
        KernelError: MEDMAMBA_SCAN names an unknown backend, or one that cannot run them.
    """
    forced = forced_backend()
    if forced:
        return _forced(forced, arguments)
    passed_over: list[str] = []
    for name in ORDER:
        reason = _refusal(name, arguments)
        if reason is None:
            if name in SLOW and arguments.u.dtype is not torch.float64 and passed_over:
                _warn_slow(name, "; ".join(passed_over))
            return _module(name)
        passed_over.append(f"{name}: {reason}")
    raise KernelError("no backend can run this scan: " + "; ".join(passed_over))


def forced_backend() -> str:
    """Name of the backend that the environment forces; empty when it leaves the choice to us."""
    return os.environ.get(VARIABLE, "")


def backend_report(device: str = "cpu") -> tuple[BackendStatus, ...]:
    """State of every backend on a device, with a self-test of about a second in all."""
    arguments = _self_test_arguments(device)
    try:
        chosen = choose(arguments)
    except KernelError:
        chosen = None
    return tuple(_status(name, arguments, chosen) for name in ORDER)


def choice_problem(device: str = "cpu") -> str:
    """Why no backend runs plain scans on a device, as far as the environment is to blame."""
    try:
        choose(_self_test_arguments(device))
    except KernelError as error:
        return error.message
    return ""


def _forced(name: str, arguments: ScanArguments) -> Backend:
    if name not in MODULES:
        raise KernelError(f"{VARIABLE}={name} names no backend; give one of {', '.join(ORDER)}")
    reason = _refusal(name, arguments)
    if reason is not None:
        raise KernelError(f"{VARIABLE}={name} cannot run this scan: {reason}; unset {VARIABLE}")
    return _module(name)


def _refusal(name: str, arguments: ScanArguments) -> str | None:
    failure = _import_failure(name)
    if failure is not None:
        return failure
    return _module(name).refusal(arguments)


@functools.cache
def _import_failure(name: str) -> str | None:
    """Why the module cannot be imported; remembered, and told by the report."""
    try:
        importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        return f"cannot be imported ({error})"
    return None


@functools.cache
def _module(name: str) -> Backend:
    return cast("Backend", importlib.import_module(MODULES[name]))


@functools.cache
def _warn_slow(name: str, reasons: str) -> None:
    logging.getLogger(__name__).warning(
        "the scan runs in PyTorch (%s), 20 to 100 times slower than a compiled kernel: %s",
        name,
        reasons,
    )


def _status(name: str, arguments: ScanArguments, chosen: Backend | None) -> BackendStatus:
    reason = _refusal(name, arguments)
    if reason is not None:
        return BackendStatus(name=name, available=False, chosen=False, reason=reason)
    backend = _module(name)
    error, ns_per_element = _self_test(backend, arguments)
    return BackendStatus(
        name=name,
        available=True,
        chosen=backend is chosen,
        reason=_description(backend, chosen=backend is chosen),
        error=error,
        ns_per_element=ns_per_element,
    )


def _description(backend: Backend, *, chosen: bool) -> str:
    runs_on = str(getattr(backend, "description", lambda: "")())
    forced = f"forced by {VARIABLE}" if chosen and forced_backend() else ""
    return ", ".join(part for part in (forced, runs_on) if part)


def _self_test(backend: Backend, arguments: ScanArguments) -> tuple[float, float]:
    from medmamba.kernels import reference

    exact = ScanArguments(
        **{name: getattr(arguments, name).double() for name in ("u", "delta", "A", "B", "C")},
        out_dtype=torch.float64,
        delta_softplus=True,
    )
    expected = reference.forward(exact, save_states=False)[0]
    found = backend.forward(arguments, save_states=False)[0]
    best_s, spent_s = float("inf"), 0.0
    while spent_s < SELF_TEST_TIME_S:
        start = time.perf_counter()
        backend.forward(arguments, save_states=False)[0][0, 0, 0].item()
        elapsed_s = time.perf_counter() - start
        best_s, spent_s = min(best_s, elapsed_s), spent_s + elapsed_s
    error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
    elements = arguments.u.numel() * arguments.state
    return error, best_s / elements * 1e9


def _self_test_arguments(device: str) -> ScanArguments:
    batch, length, channels, state = SELF_TEST_SHAPE
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device)

    return ScanArguments(
        u=normal(batch, length, channels),
        delta=normal(batch, length, channels),
        A=-torch.rand((channels, state), generator=random).to(device) * state,
        B=normal(batch, length, 1, state),
        C=normal(batch, length, 1, state),
        delta_softplus=True,
    )
