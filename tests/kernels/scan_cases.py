"""Inputs and comparisons shared by the tests of the scan."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file
from torch import Tensor

from medmamba.kernels import reference
from medmamba.kernels.arguments import Needs, ScanArguments

# max-norm relative to float64, by activation type
FORWARD_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRADIENT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shape and type of one problem."""

    batch: int = 2
    length: int = 70
    channels: int = 20
    groups: int = 1
    state: int = 16
    dtype: torch.dtype = torch.float32


def make_arguments(
    sizes: Sizes, *, bare: bool = False, seed: int = 0, **options: object
) -> ScanArguments:
    """Random arguments with every optional piece, or none of them."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    def rows() -> Tensor:
        return normal(sizes.batch, sizes.length, sizes.channels).to(sizes.dtype)

    def projection() -> Tensor:
        shape = (sizes.batch, sizes.length, sizes.groups, sizes.state)
        return normal(*shape).to(sizes.dtype)

    arguments = ScanArguments(
        u=rows(),
        delta=rows(),
        A=-torch.exp(normal(sizes.channels, sizes.state)),
        B=projection(),
        C=projection(),
        skip=None if bare else normal(sizes.channels),
        gate=None if bare else rows(),
        delta_bias=None if bare else normal(sizes.channels),
        h0=None if bare else normal(sizes.batch, sizes.channels, sizes.state),
        delta_softplus=True,
        out_dtype=sizes.dtype,
    )
    return replace(arguments, **options)


def in_float64(arguments: ScanArguments) -> ScanArguments:
    """The same problem for the definition."""
    values = {name: getattr(arguments, name) for name in Needs._fields}
    wide = {name: None if value is None else value.double() for name, value in values.items()}
    return replace(arguments, **wide, out_dtype=torch.float64)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value (at least the smallest normal number)."""
    if exact.numel() == 0:
        return 0.0
    largest = max(exact.abs().max().item(), 1e-30)
    return (found.double() - exact).abs().max().item() / largest


def assert_agrees(backend: ModuleType, arguments: ScanArguments) -> None:
    """Outputs and all gradients of a backend against the definition in float64."""
    dtype = arguments.u.dtype
    exact = in_float64(arguments)
    out, last, states = backend.forward(arguments, save_states=True)
    exact_out, exact_last, exact_states = reference.forward(exact, save_states=True)
    assert out.dtype == arguments.out_dtype
    assert states.shape == tuple(backend.states_shape(arguments))
    assert relative_error(out, exact_out) <= FORWARD_TOLERANCE[dtype]
    assert relative_error(last, exact_last) <= FORWARD_TOLERANCE[torch.float32]
    random = torch.Generator().manual_seed(7)
    grad_out = torch.randn(out.shape, generator=random).to(out.dtype)
    grad_last = torch.randn(last.shape, generator=random)
    needs = Needs(*(getattr(arguments, name) is not None for name in Needs._fields))
    grads = backend.backward(arguments, states, grad_out, grad_last, needs)
    exact_grads = reference.backward(
        exact, exact_states, grad_out.double(), grad_last.double(), needs
    )
    for name, found, expected in zip(Needs._fields, grads, exact_grads, strict=True):
        if expected is None:
            continue
        tolerance = GRADIENT_TOLERANCE[found.dtype if found.dtype != torch.float32 else dtype]
        assert found.dtype == getattr(arguments, name).dtype, name
        assert found.shape == getattr(arguments, name).shape, name
        error = relative_error(found, expected)
        assert error <= tolerance, f"gradient of {name}: {error:.2e}"


def golden_cases(fixtures: Path) -> Iterator[tuple[dict[str, object], dict[str, Tensor]]]:
    """Every golden case of the operator."""
    for description in sorted((fixtures / "scan").glob("*/case.json")):
        case = json.loads(description.read_text())
        yield case, load_file(description.parent / "io.safetensors")
