"""The operator as people and torch see it: goldens, registration, compile, export, errors."""

from pathlib import Path

import pytest
import torch
from scan_cases import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    Sizes,
    golden_cases,
    make_arguments,
    relative_error,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from medmamba.errors import KernelError
from medmamba.kernels import (
    ScanOrder,
    selective_scan,
    selective_scan_fn,
    selective_scan_multi,
)
from medmamba.kernels.arguments import Needs
from medmamba.kernels.backend import VARIABLE

SCAN = torch.ops.medmamba.selective_scan.default


ACTIVATIONS = ("u", "delta", "B", "C", "z")


def run_golden(
    case: dict[str, object], tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of one golden case with activations of one type."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    inputs = {
        name[3:]: value.to(dtype if name[3:] in ACTIVATIONS else wide).requires_grad_()
        for name, value in tensors.items()
        if name.startswith("in.")
    }
    out, last = selective_scan_fn(
        **inputs, delta_softplus=bool(case["delta_softplus"]), return_last_state=True
    )
    out.backward(tensors["grad_out"].to(dtype))
    results = {"out": out.detach(), "last_state": last.detach()}
    for name, value in inputs.items():
        assert value.grad is not None
        results[f"grad.{name}"] = value.grad
    return results


def tolerance_of(name: str, dtype: torch.dtype) -> float:
    if dtype is torch.float64:
        return 1e-10
    return (GRADIENT_TOLERANCE if name.startswith("grad.") else FORWARD_TOLERANCE)[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_cases(fixtures_dir: Path, dtype: torch.dtype) -> None:
    cases = list(golden_cases(fixtures_dir))
    assert cases, "no golden case of the scan was found"
    for case, tensors in cases:
        for name, found in run_golden(case, tensors, dtype).items():
            error = relative_error(found, tensors[name])
            assert error <= tolerance_of(name, dtype), f"{case['case']}: {name} {error:.2e}"


def test_golden_cases_in_bfloat16(fixtures_dir: Path) -> None:
    """Within the bound, or within what rounding the arguments and the result costs by itself.

    Exact arithmetic on the rounded arguments of the stored cases is off by up to 8.8e-3, so no
    kernel can keep 4e-3 against them. Against those exact results it does.
    """
    for case, tensors in golden_cases(fixtures_dir):
        rounds = {f"in.{name}" for name in ACTIVATIONS} | {"grad_out"}
        rounded = {
            name: value.bfloat16().double() if name in rounds else value.float().double()
            for name, value in tensors.items()
        }
        exact = run_golden(case, rounded, torch.float64)
        for name, found in run_golden(case, tensors, torch.bfloat16).items():
            tolerance = tolerance_of(name, torch.bfloat16)
            own = relative_error(found, exact[name])
            assert own <= tolerance, f"{case['case']}: {name} {own:.2e}"
            unavoidable = relative_error(exact[name].to(found.dtype), tensors[name])
            error = relative_error(found, tensors[name])
            allowed = max(tolerance, 1.01 * unavoidable)
            assert error <= allowed, f"{case['case']}: {name} {error:.2e}"


def call(sizes: Sizes, **options: object) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Leaves that require gradients, and the keyword arguments of a full call."""
    arguments = make_arguments(sizes)
    tensors = {name: getattr(arguments, name) for name in Needs._fields}
    leaves = {name: value.detach().requires_grad_() for name, value in tensors.items()}
    return leaves, {"delta_softplus": True, **options}


@pytest.mark.parametrize("name", Needs._fields)
def test_gradients_by_differences(name: str) -> None:
    arguments = make_arguments(Sizes(batch=1, length=5, channels=3, state=2))
    values = {field: getattr(arguments, field).double() for field in Needs._fields}

    def scan(value: Tensor) -> tuple[Tensor, Tensor]:
        changed = {**values, name: value}
        result: tuple[Tensor, Tensor] = selective_scan(
            **changed, delta_softplus=True, return_last_state=True, segment=3
        )
        return result

    torch.autograd.gradcheck(scan, (values[name].requires_grad_(),))


def operator_values(dtype: torch.dtype = torch.float32) -> list[object]:
    arguments = make_arguments(Sizes(batch=1, length=9, channels=4, state=3, dtype=dtype))
    tensors = [getattr(arguments, name) for name in Needs._fields]
    if dtype is torch.float64:
        tensors = [tensor.double() for tensor in tensors]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    order = torch.arange(8, -1, -1, dtype=torch.int32)
    return [*tensors, order, True, False, 0, 0, dtype, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_registration(dtype: torch.dtype) -> None:
    torch.library.opcheck(SCAN, tuple(operator_values(dtype)))


def test_registration_without_optional_pieces() -> None:
    values = operator_values()
    bare = [None if 5 <= at <= 9 else value for at, value in enumerate(values)]
    torch.library.opcheck(SCAN, tuple(bare))


def test_compiles_without_a_graph_break() -> None:
    leaves, options = call(Sizes(batch=1, length=20, channels=16, state=4))

    def scan(**values: Tensor) -> Tensor:
        out, last = selective_scan(**values, **options, return_last_state=True)
        return (out * 2).sum() + last.sum()

    eager = torch.autograd.grad(scan(**leaves), list(leaves.values()))
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    for first, second in zip(eager, found, strict=True):
        torch.testing.assert_close(first, second)


def test_exports() -> None:
    class Scan(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = torch.nn.Parameter(-torch.ones(4, 2))

        def forward(self, u: Tensor, B: Tensor) -> Tensor:
            out: Tensor = selective_scan(u, u, self.A, B, B, delta_softplus=True)
            return out

    module = Scan()
    inputs = (torch.randn(1, 6, 4), torch.randn(1, 6, 2))
    length = torch.export.Dim("length")
    program = torch.export.export(module, inputs, dynamic_shapes=({1: length}, {1: length}))
    for tokens in (6, 40):
        inputs = (torch.randn(1, tokens, 4), torch.randn(1, tokens, 2))
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


class Seen(TorchDispatchMode):
    """The operators that are called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def step(inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = selective_scan(**leaves, delta_softplus=True)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


def test_whoever_looks_sees_one_operator() -> None:
    """Plain calls go past the dispatcher; modes and profilers are shown the same by name."""
    inputs = {name: torch.randn(1, 9, 4) for name in ("u", "delta", "B", "C", "gate")}
    inputs["A"] = -torch.rand(4, 4)
    plain = step(inputs)
    with Seen() as seen:
        shown = step(inputs)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(inputs)
    names = {"medmamba::selective_scan", "medmamba::selective_scan_bwd"}
    assert names <= set(seen.names)
    assert names <= {event.key for event in profiled.key_averages()}
    assert all(torch.equal(a, b) for a, b in zip(plain, shown, strict=True))


def test_works_under_autocast() -> None:
    projection = torch.nn.Linear(16, 16)
    A = -torch.rand(16, 4)
    u = torch.randn(2, 30, 16)
    B = torch.randn(2, 30, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = projection(u)
        out = selective_scan(delta, delta, A, B, B, delta_softplus=True)
        out.float().sum().backward()
    assert delta.dtype is torch.bfloat16
    assert out.dtype is torch.bfloat16
    assert projection.weight.grad is not None


def test_layouts_agree() -> None:
    leaves, options = call(Sizes(length=33, channels=12, groups=3, state=4))
    last = selective_scan(**leaves, **options)
    first = {
        name: value.mT if name in ("u", "delta", "gate") else value
        for name, value in leaves.items()
    }
    first |= {name: first[name].movedim(1, -1) for name in ("B", "C")}
    found = selective_scan(**first, **options, layout="channels_first")
    torch.testing.assert_close(found.mT, last, rtol=0, atol=0)


def test_state_carries_over_a_cut() -> None:
    leaves, options = call(Sizes(length=50))
    whole, last = selective_scan(**leaves, **options, return_last_state=True)
    part = {name: leaves[name][:, :21] for name in ("u", "delta", "B", "C", "gate")}
    rest = {name: leaves[name][:, 21:] for name in ("u", "delta", "B", "C", "gate")}
    first, state = selective_scan(**{**leaves, **part}, **options, return_last_state=True)
    second, final = selective_scan(
        **{**leaves, **rest, "h0": state}, **options, return_last_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(final, last)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum() + last.sum(), leaves["h0"])[0]
    loss = (torch.cat([first, second], dim=1) * weights).sum() + final.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, leaves["h0"])[0], expected)


def test_order_equals_permuted_input() -> None:
    leaves, options = call(Sizes(length=40))
    index = torch.randperm(40)
    order = ScanOrder(index=index.int(), reverse=True)
    rows = ("u", "delta", "B", "C", "gate")
    permuted = {name: leaves[name][:, index.flip(0)] for name in rows}
    expected = selective_scan(**{**leaves, **permuted}, **options)
    found = selective_scan(**leaves, **options, order=order)
    torch.testing.assert_close(found[:, index.flip(0)], expected, rtol=0, atol=0)
    as_table = selective_scan(**leaves, **options, order=index.flip(0))
    torch.testing.assert_close(as_table, found, rtol=0, atol=0)


def test_multi_sums_its_directions() -> None:
    leaves, _ = call(Sizes(length=24, channels=16))
    orders = [ScanOrder(), ScanOrder(reverse=True), torch.randperm(24)]
    names = ("delta", "A", "B", "C")
    deltas, A, B, C = ([leaves[name] * (1 + k) for k in range(3)] for name in names)
    found = selective_scan_multi(
        leaves["u"],
        deltas,
        A,
        B,
        C,
        orders=orders,
        skip=[leaves["skip"]] * 3,
        gate=leaves["gate"],
        delta_softplus=True,
    )
    parts = [
        selective_scan(
            leaves["u"],
            deltas[k],
            A[k],
            B[k],
            C[k],
            skip=leaves["skip"],
            order=orders[k],
            delta_softplus=True,
        )
        for k in range(3)
    ]
    expected = sum(parts) * torch.nn.functional.silu(leaves["gate"])
    torch.testing.assert_close(found, expected)
    with pytest.raises(KernelError, match="directions"):
        selective_scan_multi(leaves["u"], deltas, A, B, C, orders=orders[:2])
    with pytest.raises(KernelError, match=r"gate has shape \(2, 5, 16\)"):
        gate = torch.zeros(2, 5, 16)
        selective_scan_multi(leaves["u"], deltas, A, B, C, orders=orders, gate=gate)


def test_second_order_is_refused() -> None:
    leaves, options = call(Sizes(length=4))
    out = selective_scan(**leaves, **options)
    grad = torch.autograd.grad(out.sum(), leaves["u"], create_graph=True)[0]
    with pytest.raises(KernelError, match="second-order"):
        grad.sum().backward()


# torch's forward mode imports a function that torch itself has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    arguments = good()
    u = arguments.pop("u")
    with pytest.raises(KernelError, match="no forward-mode gradient"):
        torch.func.jvp(lambda value: selective_scan(value, **arguments), (u,), (u,))


def good() -> dict[str, object]:
    arguments = make_arguments(Sizes(batch=2, length=6, channels=4, groups=2, state=3))
    return {name: getattr(arguments, name) for name in Needs._fields}


BAD = {
    "u": (torch.zeros(2, 6), r"u has shape \(2, 6\)"),
    "delta": (torch.zeros(2, 5, 4), r"delta has shape \(2, 5, 4\).*\(2, 6, 4\)"),
    "A": (torch.zeros(4, 3, dtype=torch.complex64), "A .*complex64.*real"),
    "B": (torch.zeros(2, 6, 3, 3), r"B has shape .*divides 4"),
    "C": (torch.zeros(2, 6, 1, 3), r"C .*as many groups as B"),
    "skip": (torch.zeros(5), r"skip has shape \(5,\).*\(4,\)"),
    "gate": (torch.zeros(2, 6, 4, dtype=torch.int32), "gate .*int32"),
    "delta_bias": (torch.zeros(4, dtype=torch.int64), "delta_bias .*int64"),
    "h0": (torch.zeros(2, 3, 4), r"h0 has shape \(2, 3, 4\).*\(2, 4, 3\)"),
    "order": (torch.zeros(5, dtype=torch.int64), r"order has shape \(5,\)"),
    "reset_every": (-1, "reset_every is -1"),
    "segment": ("4", "segment is '4'; give 0"),
    "layout": ("rows", "layout is 'rows'"),
    "out_dtype": (torch.int32, "out_dtype"),
}


TABLES = {
    "twice": (torch.tensor([0, 1, 2, 2, 4, 5]), "position 3 holds 2"),
    "beyond": (torch.tensor([0, 1, 2, 3, 4, 6]), "position 5 holds 6"),
    "negative": (torch.tensor([-1, 1, 2, 3, 4, 5]), "position 0 holds -1"),
    "beyond 32 bits": (torch.arange(6) + 2**33, "position 0 holds 8589934592"),
    "broken": (torch.arange(6.0), "float32"),
    "boolean": (torch.zeros(6, dtype=torch.bool), "bool"),
}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_an_order_is_a_permutation(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, backend)
    table, message = TABLES[kind]
    with pytest.raises(KernelError, match=f"order .*{message}"):
        selective_scan(**good(), order=table)
    with pytest.raises(KernelError, match=f"order .*{message}"):
        ScanOrder(index=table)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("B", torch.zeros(3), r"B has shape \(3,\); expected \(batch, groups, state, length\)"),
        ("gate", torch.zeros(2, 6), r"gate has shape \(2, 6\); expected \(batch, channels"),
        ("A", None, "A is NoneType; expected a tensor"),
        ("u", [[1.0]], "u is list; expected a tensor"),
    ],
)
def test_bad_arguments_are_named_channels_first(name: str, value: object, message: str) -> None:
    values = {
        key: tensor.movedim(1, -1) if key in (*ACTIVATIONS, "gate") else tensor
        for key, tensor in good().items()
    }
    with pytest.raises(KernelError, match=message):
        selective_scan(**{**values, name: value}, layout="channels_first")


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(KernelError, match=message):
        selective_scan(**{**good(), name: value})


def test_devices_must_agree() -> None:
    values = good()
    with pytest.raises(KernelError, match=r"delta is on meta but u is on cpu"):
        selective_scan(**{**values, "delta": torch.zeros(2, 6, 4, device="meta")})


def test_rows_must_be_viewable() -> None:
    values = good()
    scattered = torch.zeros(2, 12, 8)[:, ::2, ::2]
    with pytest.raises(KernelError, match=r"u .*strides.*contiguous"):
        selective_scan(**{**values, "u": scattered})


def test_reset_must_fall_between_segments() -> None:
    with pytest.raises(KernelError, match="multiple of the segment"):
        selective_scan(**good(), segment=4, reset_every=6)


def test_sizes_beyond_32_bits_are_described() -> None:
    u = torch.empty(2, 2**21, 1024, dtype=torch.bfloat16, device="meta")
    B = torch.empty(2, 2**21, 16, dtype=torch.bfloat16, device="meta")
    A = torch.empty(1024, 16, device="meta")
    out, last = selective_scan(u, u, A, B, B, return_last_state=True)
    assert out.numel() > 2**31
    assert out.shape == u.shape
    assert last.shape == (2, 1024, 16)


@pytest.mark.slow
def test_two_million_tokens() -> None:
    length = 2**21
    random = torch.Generator().manual_seed(0)
    u, B, C = (torch.randn(1, length, 2, generator=random) for _ in range(3))
    delta = torch.rand(1, length, 2, generator=random) * 2e-3
    A = -torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    found = selective_scan(u, delta, A, B, C)
    exact = selective_scan(*(tensor.double() for tensor in (u, delta, A, B, C)))
    assert relative_error(found, exact) <= 1e-4
