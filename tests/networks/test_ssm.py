"""The Mamba block and the directional scan: equations, initial values, orders, precision."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.errors import PlanError
from medmamba.kernels import mamba_block
from medmamba.networks.directions import ORDERS, SEGMENT
from medmamba.networks.ssm import DirectionalScan, Mamba

WIDTH, STATE = 6, 4
SHAPES: dict[int, tuple[int, ...]] = {2: (6, 16), 3: (5, 8, 12)}


def seeded(build: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = build(WIDTH, **{"d_state": STATE, **options})
    return module.double()


def tokens_for(shape: tuple[int, ...], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, math.prod(shape), WIDTH, generator=generator, dtype=torch.float64)


def step_by_step(block: Mamba, tokens: Tensor) -> Tensor:
    """Mamba's equations, one token at a time."""
    x, gate = (tokens @ block.in_proj.weight.T).chunk(2, dim=-1)
    taps, rank = block.conv1d.weight[:, 0], block.dt_proj.weight.shape[1]
    padded = functional.pad(x, (0, 0, taps.shape[1] - 1, 0))
    state = torch.zeros(tokens.shape[0], x.shape[2], STATE, dtype=x.dtype)
    outputs = []
    for t in range(tokens.shape[1]):
        window = padded[:, t : t + taps.shape[1]]
        u = functional.silu((window * taps.T).sum(1) + block.conv1d.bias)
        step, B, C = (u @ block.x_proj.weight.T).split([rank, STATE, STATE], dim=-1)
        dt = functional.softplus(step @ block.dt_proj.weight.T + block.dt_proj.bias)
        decay = torch.exp(-dt[..., None] * torch.exp(block.A_log))
        state = decay * state + (dt * u)[..., None] * B[:, None]
        y = (state * C[:, None]).sum(-1) + block.D * u
        outputs.append((y * functional.silu(gate[:, t])) @ block.out_proj.weight.T)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 37])
def test_block_follows_the_equations(length: int) -> None:
    block = seeded(Mamba)
    assert isinstance(block, Mamba)
    tokens = tokens_for((length,))
    torch.testing.assert_close(block(tokens), step_by_step(block, tokens), rtol=0, atol=1e-12)


def test_initial_values_are_mambas() -> None:
    block = Mamba(40, d_state=8)
    assert torch.equal(block.A_log, torch.log(torch.arange(1.0, 9.0)).expand(80, 8))
    assert torch.equal(block.D, torch.ones(80))
    assert block.dt_proj.weight.shape == (80, 3)
    assert block.dt_proj.weight.abs().max() <= 3**-0.5
    steps = functional.softplus(block.dt_proj.bias)
    assert steps.min() >= 0.99e-3
    assert steps.max() <= 1.01e-1
    # log-uniform: half of the steps lie below the geometric mean of the range
    assert (steps < 1e-2).float().mean() == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("build", [Mamba, DirectionalScan])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_reaches_every_parameter(build: Any, dimension: int, order: str) -> None:
    module = seeded(build, dimension=dimension, order=order)
    shape = SHAPES[dimension]
    tokens = tokens_for(shape)
    out = module(tokens, shape)
    assert out.shape == tokens.shape
    alone = module(tokens[1:], shape)
    torch.testing.assert_close(out[1:], alone, rtol=0, atol=1e-12)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def swapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exchange the two directions of a bidirectional Mamba block."""
    shared = ("in_proj.weight", "out_proj.weight")
    other = {
        key.removeprefix("directions.0.") if key.startswith("directions.0.") else key: tensor
        for key, tensor in state.items()
        if key.startswith("directions.0.") or key in shared
    }
    first = {
        f"directions.0.{key}": tensor
        for key, tensor in state.items()
        if not key.startswith("directions.0.") and key not in shared
    }
    return {**other, **first}


def test_reversing_tokens_equals_swapping_the_directions_of_a_block() -> None:
    module, mirror = seeded(Mamba, order="bidirectional"), seeded(Mamba, order="bidirectional")
    mirror.load_state_dict(swapped(module.state_dict()))
    tokens = tokens_for((23,))
    found = mirror(tokens.flip(1)).flip(1)
    torch.testing.assert_close(found, module(tokens), rtol=0, atol=1e-12)
    assert not torch.allclose(module(tokens.flip(1)).flip(1), module(tokens))


def test_reversing_the_map_equals_swapping_the_directions_of_a_scan() -> None:
    options = {"dimension": 3, "order": "bidirectional"}
    module, mirror = seeded(DirectionalScan, **options), seeded(DirectionalScan, **options)
    state = module.state_dict()
    for key in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        state[key] = state[key].flip(0)
    for key in ("A_logs", "Ds"):
        state[key] = torch.cat(state[key].chunk(2)[::-1])
    state["conv3d.weight"] = state["conv3d.weight"].flip(2, 3, 4)
    mirror.load_state_dict(state)
    shape = (3, 4, 5)
    tokens = tokens_for(shape)
    found = mirror(tokens.flip(1), shape).flip(1)
    torch.testing.assert_close(found, module(tokens, shape), rtol=0, atol=1e-12)


def test_windows_of_a_reset_order_do_not_see_each_other() -> None:
    module = seeded(Mamba, dimension=2, order="local-window-reset")
    shape = (16, 8)
    tokens = tokens_for(shape)
    changed = tokens.clone()
    changed[:, :64] += 1.0
    before, after = module(tokens, shape), module(changed, shape)
    assert torch.equal(before[:, 64:], after[:, 64:])
    assert not torch.allclose(before[:, :64], after[:, :64])


def test_siamese_views_share_weights_and_are_averaged() -> None:
    single = seeded(Mamba)
    module = seeded(Mamba, order="siamese-flip")
    module.load_state_dict(single.state_dict())
    tokens = tokens_for((11,))
    views = [
        single(tokens),
        single(tokens.flip(1)).flip(1),
        single(tokens.flip(2)).flip(2),
        single(tokens.flip(1, 2)).flip(1, 2),
    ]
    torch.testing.assert_close(module(tokens), sum(views) / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_local_scan_looks_ahead_inside_its_segment_only(reverse: bool) -> None:
    module = seeded(Mamba, order="local-bidirectional", reverse=reverse)
    tokens = tokens_for((3 * SEGMENT,), batch=1).requires_grad_()
    watched = SEGMENT + 4
    module(tokens)[0, watched].sum().backward()
    assert tokens.grad is not None
    seen = tokens.grad[0].abs().sum(-1) > 0
    if reverse:
        seen = seen.flip(0)
        watched = 3 * SEGMENT - 1 - watched
    end = (watched // SEGMENT + 1) * SEGMENT
    assert seen[:end].all()
    assert not seen[end:].any()


def test_reverse_leaves_other_orders_alone() -> None:
    module, same = seeded(Mamba), seeded(Mamba, reverse=True)
    tokens = tokens_for((9,))
    assert torch.equal(module(tokens), same(tokens))


def test_attention_with_open_gates_is_the_sum() -> None:
    options = {"dimension": 2, "order": "cross"}
    plain = seeded(DirectionalScan, **options)
    module = seeded(DirectionalScan, **options, merge="attention")
    state = module.state_dict()
    state.update(plain.state_dict())
    state["attention.weight"].zero_()
    state["attention.bias"].fill_(50.0)
    module.load_state_dict(state)
    tokens = tokens_for((4, 5))
    torch.testing.assert_close(module(tokens, (4, 5)), plain(tokens, (4, 5)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"merge": "attention"}, {"order": "siamese-flip"}])
def test_a_streamed_scan_keeps_its_input_and_changes_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, shape = seeded(DirectionalScan, dimension=2, **options), (30, 40)
    tokens = tokens_for(shape)
    leaves = (tokens.requires_grad_(), *module.parameters())
    weights = torch.randn_like(tokens)
    plain = module(tokens, shape)
    expected = torch.autograd.grad(plain, leaves, weights)
    monkeypatch.setattr(mamba_block, "STREAM_FROM_VALUES", 0)
    monkeypatch.setattr(mamba_block, "CPU_CHUNK_VALUES", 1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        streamed = module(tokens, shape)
    assert {tensor.data_ptr() for tensor in kept} == {tokens.data_ptr()}
    torch.testing.assert_close(streamed, plain, rtol=0, atol=1e-11)
    found = torch.autograd.grad(streamed, leaves, weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_mean_is_the_sum_over_the_number_of_directions() -> None:
    total = seeded(Mamba, order="cross")
    mean = seeded(Mamba, order="cross", merge="mean")
    tokens = tokens_for((2, 3, 4))
    torch.testing.assert_close(mean(tokens, (2, 3, 4)) * 6, total(tokens, (2, 3, 4)))


@pytest.mark.parametrize("build", [Mamba, DirectionalScan])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": "spiral"}, "scan order 'spiral' does not exist. Choose one of: raster"),
        ({"merge": "product"}, "merge 'product' does not exist. Choose one of: sum, mean"),
        ({"d_state": "many"}, "option d_state is 'many'; give a whole number from 1"),
        ({"expand": 0}, "option expand is 0"),
        ({"d_conv": 3.5}, r"option d_conv is 3\.5"),
    ],
)
def test_options_that_cannot_be_are_named(build: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        build(WIDTH, dimension=3, **options)


def test_side_of_a_depthwise_kernel_is_odd() -> None:
    with pytest.raises(PlanError, match="option d_conv is 4; give an odd number"):
        DirectionalScan(WIDTH, 2, d_conv=4)


@pytest.mark.parametrize("build", [Mamba, DirectionalScan])
def test_bf16_autocast_stays_near_float32_and_keeps_float32_gradients(build: Any) -> None:
    module = seeded(build, dimension=2).float()
    tokens = tokens_for((6, 7)).float()
    exact = module(tokens, (6, 7))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(tokens, (6, 7))
    assert rounded.dtype is torch.bfloat16
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()
    rounded.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32


@pytest.mark.parametrize("build", [Mamba, DirectionalScan])
def test_float64_stays_float64(build: Any) -> None:
    module = seeded(build, dimension=2)
    assert module(tokens_for((3, 4)), (3, 4)).dtype is torch.float64
