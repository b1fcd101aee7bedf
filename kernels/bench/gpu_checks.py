"""What gpu.py verifies before it times anything: results, repeatability, addressing."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medmamba.kernels import reference, selective_scan
from medmamba.kernels import triton as backend
from medmamba.kernels.arguments import Needs, ScanArguments
from medmamba.kernels.causal_conv import conv_silu, conv_silu_backward
from medmamba.kernels.triton_cut import DEFAULT, Tuning

FORWARD = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRADIENT = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LONG_TOLERANCE = 1e-4
LONG_LENGTH = 2**21
HUGE_CHANNELS, HUGE_WINDOW = 1024, 1024
HUGE_LENGTH = 2**21 + HUGE_WINDOW  # times channels: more than 2^31 elements


def make(
    batch: int = 2,
    length: int = 200,
    channels: int = 70,
    state: int = 16,
    groups: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    bare: bool = False,
    **options: Any,
) -> ScanArguments:
    """Random arguments on the GPU, with every optional piece or none."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    def rows() -> Tensor:
        return normal(batch, length, channels).to(dtype)

    arguments = ScanArguments(
        u=rows(),
        delta=rows(),
        A=-torch.exp(normal(channels, state)),
        B=normal(batch, length, groups, state).to(dtype),
        C=normal(batch, length, groups, state).to(dtype),
        skip=None if bare else normal(channels),
        gate=None if bare else rows(),
        delta_bias=None if bare else normal(channels),
        h0=None if bare else normal(batch, channels, state),
        delta_softplus=True,
        out_dtype=dtype,
    )
    return replace(arguments, **options)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest exact value; infinite where anything is not a number."""
    largest = exact.abs().max().item() or 1.0
    error = (found.double() - exact).abs().max().item() / largest
    return error if error == error else float("inf")


def agrees(arguments: ScanArguments, tuning: Tuning = DEFAULT) -> tuple[bool, str]:
    """Outputs and all gradients against the definition in float64."""
    values = {name: getattr(arguments, name) for name in Needs._fields}
    wide = {name: None if value is None else value.double() for name, value in values.items()}
    exact = replace(arguments, **wide, out_dtype=torch.float64)
    exact_out, exact_last, exact_states = reference.forward(exact, save_states=True)
    out, last, states = backend.forward(arguments, save_states=True, tuning=tuning)
    grad_out, grad_last = torch.randn_like(out), torch.randn_like(last)
    needs = Needs(*(value is not None for value in values.values()))
    grads = backend.backward(arguments, states, grad_out, grad_last, needs, tuning=tuning)
    exact_grads = reference.backward(
        exact, exact_states, grad_out.double(), grad_last.double(), needs
    )
    dtype = arguments.u.dtype
    errors = {"out": (relative_error(out, exact_out), FORWARD[dtype])}
    errors["h_last"] = (relative_error(last, exact_last), FORWARD[torch.float32])
    for name, found, expected in zip(Needs._fields, grads, exact_grads, strict=True):
        if expected is not None:
            errors[name] = (relative_error(found, expected), GRADIENT[dtype])
    passed = all(error <= limit for error, limit in errors.values())
    return passed, " ".join(f"{name} {error:.1e}" for name, (error, _) in errors.items())


def check_views() -> tuple[bool, str]:
    """Halves of wider tensors and tokens-innermost rows."""
    arguments = make(length=130)
    assert arguments.gate is not None
    wide = torch.cat([arguments.u, arguments.gate], dim=-1).chunk(2, dim=-1)
    both = torch.cat([arguments.B, arguments.C], dim=-1).chunk(2, dim=-1)
    delta = arguments.delta.mT.contiguous().mT
    return agrees(replace(arguments, u=wide[0], gate=wide[1], delta=delta, B=both[0], C=both[1]))


def check_order() -> tuple[bool, str]:
    """A table of tokens, walked backwards."""
    order = torch.randperm(200, device="cuda").to(torch.int32)
    return agrees(make(order=order, reverse=True))


def check_operator() -> tuple[bool, str]:
    """The public function and its gradient, channels first, compiled as a whole graph."""
    arguments = make(length=300, channels=64, bare=True)
    inputs = [arguments.u.mT.contiguous(), arguments.delta.mT.contiguous(), arguments.A]
    inputs += [p.movedim(1, -1).contiguous() for p in (arguments.B, arguments.C)]

    def scan(*values: Tensor) -> Tensor:
        return selective_scan(*values, delta_softplus=True, layout="channels_first")

    def gradients(function: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
        leaves = [value.clone().requires_grad_() for value in values]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    found = gradients(torch.compile(scan, fullgraph=True, backend="aot_eager"), inputs)
    exact = gradients(scan, [value.double() for value in inputs])
    errors = [relative_error(a, b) for a, b in zip(found, exact, strict=True)]
    return max(errors) <= 2 * GRADIENT[torch.float32], " ".join(f"{e:.1e}" for e in errors)


def check_convolution() -> tuple[bool, str]:
    """The causal convolution of a chunk, all gradients and their bits, in every type."""
    errors: dict[str, tuple[float, float]] = {}
    same = True
    for dtype, limit in GRADIENT.items():
        x = torch.randn(2, 5000, 140, device="cuda").to(dtype).chunk(2, dim=-1)[0]
        weight, bias = torch.randn(70, 4, device="cuda"), torch.randn(70, device="cuda")
        history, grad = torch.randn_like(x[:, :3]), torch.randn_like(x)
        inputs = (x, weight, bias, history)
        exact = [value.double() for value in inputs]
        out = conv_silu(*inputs)
        errors[f"out {dtype}"] = (relative_error(out, conv_silu(*exact)), FORWARD[dtype])
        first, second = (conv_silu_backward(grad, *inputs) for _ in range(2))
        expected = conv_silu_backward(grad.double(), *exact)
        same &= all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for name, found, wanted in zip(first._fields, first, expected, strict=True):
            errors[f"{name} {dtype}"] = (relative_error(found, wanted), limit)
    passed = same and all(error <= limit for error, limit in errors.values())
    return passed, " ".join(f"{name} {error:.1e}" for name, (error, _) in errors.items())


def check_repeatable() -> tuple[bool, str]:
    """Two runs give the same bits in every output and gradient."""
    arguments = make(batch=2, length=50_000, channels=96, dtype=torch.bfloat16)
    grad_out = torch.randn_like(arguments.u)

    def run() -> list[Tensor]:
        out, last, states = backend.forward(arguments, save_states=True)
        return [out, last, *backend.backward(arguments, states, grad_out, last, Needs())]

    same = [torch.equal(a, b) for a, b in zip(run(), run(), strict=True)]
    return all(same), f"{sum(same)} of {len(same)} tensors"


def check_long() -> tuple[bool, str]:
    """2^21 tokens with steps of about 1e-3, against a log-depth scan in float64."""
    arguments = make(batch=1, length=LONG_LENGTH, channels=4, state=2, bare=True)
    arguments = replace(arguments, delta=(arguments.delta + 2.0) * 0.3 - 7.0)
    out, _, states = backend.forward(arguments, save_states=True)
    grad_out = torch.randn_like(out)
    grads = backend.backward(arguments, states, grad_out, None, Needs(h0=False))
    exact_out, exact = _long_reference(arguments, grad_out)
    errors = {"out": relative_error(out, exact_out)}
    for name, expected in exact.items():
        errors[name] = relative_error(getattr(grads, name), expected)
    detail = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return max(errors.values()) <= LONG_TOLERANCE, detail


def _long_reference(arguments: ScanArguments, grad_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    u, raw = arguments.u[0].double(), arguments.delta[0].double()
    A, dy = arguments.A.double(), grad_out[0].double()
    B, C = arguments.B[0].double(), arguments.C[0].double()  # (l, 1, n)
    dt = torch.logaddexp(raw, torch.zeros_like(raw))
    decay = torch.exp(dt[..., None] * A)
    h = _prefix(decay, (dt * u)[..., None] * B)
    out = (h * C).sum(-1)[None]
    following = torch.cat([decay[1:], torch.zeros_like(decay[:1])])
    g = _prefix(following.flip(0), (dy[..., None] * C).flip(0)).flip(0)
    before = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    q = g * decay * before
    fed = (g * B).sum(-1)
    exact = {
        "u": (dt * fed)[None],
        "delta": ((u * fed + (q * A).sum(-1)) * torch.sigmoid(raw))[None],
        "A": (q * dt[..., None]).sum(0),
        "B": (g * (dt * u)[..., None]).sum(1)[None, :, None],
        "C": (h * dy[..., None]).sum(1)[None, :, None],
    }
    return out, exact


def _prefix(decay: Tensor, value: Tensor) -> Tensor:
    """Inclusive first-order scan along the first dimension (Hillis and Steele)."""
    decay, value, step = decay.clone(), value.clone(), 1
    while step < len(value):
        value[step:] += decay[step:] * value[:-step].clone()
        decay[step:] *= decay[:-step].clone()
        step *= 2
    return value


def check_huge() -> tuple[bool, str]:
    """More than 2^31 elements: the last window equals a scan of its own."""

    def rows() -> Tensor:
        return torch.randn((1, HUGE_LENGTH, HUGE_CHANNELS), device="cuda", dtype=torch.bfloat16)

    def projection() -> Tensor:
        return torch.randn((1, HUGE_LENGTH, 1, 8), device="cuda", dtype=torch.bfloat16)

    whole = ScanArguments(
        u=rows(),
        delta=rows(),
        A=-torch.rand((HUGE_CHANNELS, 8), device="cuda"),
        B=projection(),
        C=projection(),
        delta_softplus=True,
        reset_every=HUGE_WINDOW,
        out_dtype=torch.bfloat16,
    )
    tail = slice(HUGE_LENGTH - HUGE_WINDOW, None)
    part = replace(
        whole, **{name: getattr(whole, name)[:, tail] for name in ("u", "delta", "B", "C")}
    )
    needs = Needs(A=False)
    out, _, states = backend.forward(whole, save_states=True)
    grads = backend.backward(whole, states, whole.u, None, needs)
    part_out, _, part_states = backend.forward(part, save_states=True)
    part_grads = backend.backward(part, part_states, part.u, None, needs)
    pairs = {"out": (out, part_out)}
    for name in ("u", "delta", "B", "C"):
        pairs[name] = (getattr(grads, name), getattr(part_grads, name))
    errors = {name: relative_error(a[:, tail], b.double()) for name, (a, b) in pairs.items()}
    detail = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return max(errors.values()) <= FORWARD[torch.bfloat16], detail


def check_not_a_number() -> tuple[bool, str]:
    """A NaN reaches what follows it in its channel, and nothing else."""
    arguments = make(batch=1, length=100, channels=64)
    arguments.delta[0, 40, 3] = float("nan")
    out, _, _ = backend.forward(arguments, save_states=False)
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 40:, 3] = True
    return torch.equal(out.isnan(), expected), ""


CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "huge": check_huge,
    "long": check_long,
    "full fp32": lambda: agrees(make()),
    "full bf16": lambda: agrees(make(dtype=torch.bfloat16)),
    "full fp16": lambda: agrees(make(dtype=torch.float16)),
    "bare": lambda: agrees(make(bare=True)),
    "whole tiles": lambda: agrees(make(batch=1, channels=128, length=300)),
    "short chunks": lambda: agrees(make(length=65), Tuning(chunk=16)),
    "one chunk": lambda: agrees(make(length=512), Tuning(chunk=512)),
    "one token": lambda: agrees(make(length=1)),
    "one channel": lambda: agrees(make(channels=1, length=64)),
    "narrow": lambda: agrees(make(channels=24, length=63)),
    "groups": lambda: agrees(make(channels=96, groups=3, length=100)),
    "state 1": lambda: agrees(make(state=1, length=100)),
    "state 8": lambda: agrees(make(state=8, length=100)),
    "state 24": lambda: agrees(make(state=24, length=100)),
    "state 64": lambda: agrees(make(state=64, length=100)),
    "resets": lambda: agrees(make(reset_every=49)),
    "long windows": lambda: agrees(make(reset_every=90), Tuning(chunk=32)),
    "local": lambda: agrees(make(segment=16, length=190)),
    "local reverse resets": lambda: agrees(
        make(segment=16, length=190, reverse=True, reset_every=64)
    ),
    "order": check_order,
    "views": check_views,
    "operator": check_operator,
    "convolution": check_convolution,
    "repeatable": check_repeatable,
    "not a number": check_not_a_number,
}


def run_check(job: tuple[str, int]) -> dict[str, Any]:
    """Run one check; every tensor torch leaves uninitialised is NaN meanwhile."""
    name, seed = job
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = name != "huge"
    try:
        passed, detail = CHECKS[name]()
    except Exception:
        passed, detail = False, traceback.format_exc(limit=-4)
    torch.cuda.empty_cache()
    return {"name": name, "seed": seed, "passed": passed, "detail": detail}
