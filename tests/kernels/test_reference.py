"""The definition against the formulas written out token by token."""

import math

import pytest
import torch
from scan_cases import Sizes, in_float64, make_arguments, relative_error

from medmamba.kernels import reference
from medmamba.kernels.arguments import ScanArguments


def quadratic_scan(arguments: ScanArguments) -> torch.Tensor:
    """y_t as the sum over every earlier token s, O(length^2): no state is carried."""
    dt = reference.step_sizes(arguments)
    total = dt.cumsum(dim=1)
    repeat = arguments.channels // arguments.groups
    B = arguments.B.repeat_interleave(repeat, dim=2)
    C = arguments.C.repeat_interleave(repeat, dim=2)
    y = torch.zeros_like(arguments.u)
    for t in range(arguments.length):
        for s in range(arguments.length):
            segment = arguments.segment
            behind = segment and s > t and s // segment == t // segment
            if s <= t:
                elapsed = total[:, t] - total[:, s]
            elif behind:
                elapsed = total[:, s - 1] - (total[:, t - 1] if t else 0)
            else:
                continue
            decay = torch.exp(elapsed[..., None] * arguments.A)
            added = (dt[:, s] * arguments.u[:, s])[..., None] * B[:, s]
            y[:, t] += (C[:, t] * decay * added).sum(dim=-1)
    if arguments.h0 is not None:
        decay = torch.exp(total[..., None] * arguments.A)
        y += (C * decay * arguments.h0[:, None]).sum(dim=-1)
    if arguments.skip is not None:
        y = y + arguments.skip * arguments.u
    return y if arguments.gate is None else y * torch.nn.functional.silu(arguments.gate)


@pytest.mark.parametrize("segment", [0, 1, 4, 16])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_quadratic_form(segment: int, groups: int) -> None:
    sizes = Sizes(batch=2, length=18, channels=4, state=3, groups=groups)
    arguments = in_float64(make_arguments(sizes, segment=segment))
    found = reference.forward(arguments, save_states=False)[0]
    assert relative_error(found, quadratic_scan(arguments)) <= 1e-12


def test_resets_cut_the_sequence() -> None:
    arguments = in_float64(make_arguments(Sizes(length=30), bare=True, reset_every=10))
    whole = reference.forward(arguments, save_states=False)[0]
    plain = in_float64(make_arguments(Sizes(length=30), bare=True))
    for first in (0, 10, 20):
        rows = {
            name: getattr(plain, name)[:, first : first + 10] for name in ("u", "delta", "B", "C")
        }
        part = ScanArguments(**rows, A=plain.A, delta_softplus=True, out_dtype=torch.float64)
        expected = reference.forward(part, save_states=False)[0]
        torch.testing.assert_close(whole[:, first : first + 10], expected)


def test_softplus_has_no_threshold() -> None:
    arguments = make_arguments(Sizes(batch=1, length=3, channels=1, state=1), bare=True)
    arguments.delta[0, :, 0] = torch.tensor([-50.0, 0.0, 50.0])
    exact = reference.step_sizes(in_float64(arguments))[0, :, 0]
    expected = [math.log1p(math.exp(-50.0)), math.log(2.0), 50.0]
    torch.testing.assert_close(exact, torch.tensor(expected, dtype=torch.float64))
