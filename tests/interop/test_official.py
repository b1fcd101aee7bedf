"""Official networks against golden numbers, and the names of their tensors.

Every case under the fixtures folder runs, found by its ``case.json``; parameters follow the rule
stated in the folder's README, so a case needs no stored weights.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medmamba.errors import BundleError
from medmamba.interop.official import build, load_official_state, official_state
from medmamba.networks.lightm_unet import MambaLayer as LightMambaLayer
from medmamba.networks.mambaclinix import MambaLayer as ClinixMambaLayer
from medmamba.networks.mambaclinix import RecursiveBlock
from medmamba.networks.mixer import make_mixer
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.ssm import DirectionalScan, Mamba
from medmamba.networks.token_layer import OPTIONS, TokenLayer

EXACT = 1e-8
"""Relative, max-norm, float64 against float64."""
STORED_FLOAT32 = 1e-6
"""Relative, for outputs that the case stores as float32, where their own error is below that."""
STATED = 0.01
"""Lower-resolution outputs are stored as the official code computed them in float32, which is
mostly farther than 1e-6 from the exact values. Each case states that distance, maximum and mean
square, to three digits; ours in float64 must lie at the very same distance from what is stored."""
VANISHES = 1e-12
"""A gradient below this part of the largest one is a true zero (a bias before a norm)."""
OFFICIAL_ERROR_FACTOR = 10
"""Our float32 error against float64 may be this many times the official code's own."""
LARGE = 20_000_000
"""Parameters from which a case belongs to the slow tier."""


def fixtures_folder(config: pytest.Config) -> Path:
    plugins = config.pluginmanager.get_plugins()
    root = next(
        plugin
        for plugin in plugins
        if isinstance(plugin, ModuleType) and hasattr(plugin, "fixtures_folder")
    )
    return Path(root.fixtures_folder(config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name in ("networks", "blocks"):
        argument = f"{name.removesuffix('s')}_case"
        if argument in metafunc.fixturenames:
            folder = fixtures_folder(metafunc.config) / name
            files = sorted(folder.glob("*/case.json"))
            metafunc.parametrize(argument, [_parameter(file) for file in files])


def _parameter(file: Path) -> Any:
    count = json.loads(file.read_text()).get("n_parameters", 0)
    marks = [pytest.mark.slow] if count > LARGE else []
    return pytest.param(file.parent, id=file.parent.name, marks=marks)


def draw(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.RandomState(zlib.crc32(tag.encode()))
    return generator.standard_normal(int(np.prod(shape))).reshape(shape)


def draw_parameter(row: dict[str, Any]) -> np.ndarray:
    shape = tuple(row["shape"])
    value = draw(row["key"], shape) * row["std"] + row["mean"]
    if row["base"] == "log_arange":
        value = value + np.log(np.arange(1, shape[-1] + 1))
    else:
        assert row["base"] == "const"
    return value.astype(np.float32)


def draw_state(case: dict[str, Any]) -> dict[str, Tensor]:
    """The official state dict of a case, aliases included."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = {}
    for row in case["params"]:
        value = draw_parameter(row)
        digest.update(value.astype("<f4").tobytes())
        state[row["key"]] = torch.from_numpy(value)
    assert digest.hexdigest() == case["params_sha256"]
    return state | {alias: state[key] for alias, key in case["aliases"].items()}


def relative(found: Tensor, golden: Tensor) -> float:
    assert found.shape == golden.shape
    found = found.detach()
    scale = golden.abs().max().double()
    return float((found.double() - golden.double()).abs().max() / scale)


def read_case(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "case.json").read_text()), load_file(folder / "io.safetensors")


def filled(case: dict[str, Any]) -> nn.Module:
    network = build(case["network"], case["constructor"])
    load_official_state(network, draw_state(case))
    return network.eval()


def test_count_and_round_trip_are_official(network_case: Path) -> None:
    case, _ = read_case(network_case)
    state = draw_state(case)
    network = build(case["network"], case["constructor"])
    assert sum(parameter.numel() for parameter in network.parameters()) == case["n_parameters"]
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    load_official_state(network, wrapped)
    assert len(network.state_dict()) == len(case["params"])
    written = official_state(network)
    assert set(written) == set(state)
    assert all(torch.equal(written[key], state[key]) for key in state)


def test_outputs_equal_golden(network_case: Path) -> None:
    case, golden = read_case(network_case)
    network = filled(case).double()
    # The stored input is float32, and the official code was run on it.
    image = golden["input"].double()
    with torch.no_grad():
        single = network(image)
        network.deep_supervision = True
        several = network(image)
    assert relative(single, golden["output_f64"]) < EXACT
    assert isinstance(several, list)
    assert torch.equal(several[0], single)
    lower = [key for key in golden if key.startswith("ds_output.")]
    assert len(several) - 1 == len(lower)
    assert [list(output.shape) for output in several] == case.get("ds_shapes", [list(single.shape)])
    for level, output in enumerate(several[1:], start=1):
        check_stored(
            output, golden[f"ds_output.{level}"], case["ds_fp32_vs_f64_max_and_rms"][level]
        )


def check_stored(output: Tensor, stored: Tensor, stated: list[float]) -> None:
    error = (output - stored.double()).abs()
    found = [float(error.max()), float(error.square().mean().sqrt())]
    assert found == pytest.approx(stated, rel=STATED)
    if stated[0] < STORED_FLOAT32 * float(stored.abs().max()):
        assert relative(output, stored) < STORED_FLOAT32


def test_float32_outputs_are_as_near_as_the_official_ones(network_case: Path) -> None:
    # Outputs only: a leaky ReLU whose input rounds to the other side of zero changes gradients by
    # far more than rounding, in the official code too.
    case, golden = read_case(network_case)
    network = filled(case)
    network.deep_supervision = True
    with torch.no_grad():
        found = network(golden["input"])
        exact = network.double()(golden["input"].double())
    stated = case.get("ds_fp32_vs_f64_max_and_rms", [case["fp32_vs_f64_max_and_rms"]])
    require_rounding(found[0].double() - golden["output_f64"], stated[0])
    for output, expected, allowed in zip(found, exact, stated, strict=True):
        require_rounding(output.double() - expected, allowed)


def require_rounding(error: Tensor, stated: list[float]) -> None:
    assert float(error.abs().max()) < OFFICIAL_ERROR_FACTOR * stated[0]
    assert float(error.square().mean().sqrt()) < OFFICIAL_ERROR_FACTOR * stated[1]


def backward(network: nn.Module, case: dict[str, Any], image: Tensor) -> Tensor:
    """Run the case's loss over all outputs and its backward pass; return the loss."""
    network.deep_supervision = True  # type: ignore[assignment]
    loss = torch.zeros((), dtype=image.dtype)
    for level, output in enumerate(network(image)):
        weight = draw(f"{case['case']}/w.{level}", tuple(output.shape))
        loss = loss + (output * torch.from_numpy(weight).to(output)).sum()
    loss.backward()
    return loss.detach()


def test_float64_gradients_equal_golden(network_case: Path) -> None:
    case, golden = read_case(network_case)
    if "param_grads" not in case:
        pytest.skip("the case states no gradients")
    network = filled(case).double()
    image = golden["input"].double().requires_grad_()
    loss = backward(network, case, image)
    assert float(loss) == pytest.approx(case["loss_f64"], rel=EXACT)
    assert image.grad is not None
    assert relative(image.grad, golden["grad_input_f64"]) < EXACT
    compare_gradients(case["param_grads"], dict(network.named_parameters()))


def compare_gradients(golden: dict[str, Any], parameters: dict[str, nn.Parameter]) -> None:
    """Compare norms and probes; null means none, and what vanishes must do so here too."""
    assert set(golden) == set(parameters)
    largest = max(norm for norm, _ in filter(None, golden.values()))
    wrong = []
    for key, expected in golden.items():
        gradient = parameters[key].grad
        if expected is None:
            assert gradient is None or not gradient.any(), f"{key} must get no gradient"
            continue
        assert gradient is not None, f"{key} gets no gradient"
        norm = float(gradient.norm())
        if expected[0] < VANISHES * largest:
            assert norm < VANISHES * largest, f"{key}: {norm}, zero expected"
            continue
        probe = torch.from_numpy(draw(f"{key}/probe", tuple(gradient.shape)))
        dot = float((gradient * probe).sum())
        error = max(abs(norm - expected[0]), abs(dot - expected[1])) / max(map(abs, expected))
        if error > EXACT:
            wrong.append((key, error))
    assert not wrong


def channels_first(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x.movedim(1, -1)).movedim(-1, 1)


def block_spec(dimension: int) -> NetworkSpec:
    return NetworkSpec(
        name="block",
        in_channels=1,
        out_channels=1,
        patch_size=(1,) * dimension,
        features=(1,),
        strides=((1,) * dimension,),
        kernel_sizes=((3,) * dimension,),
        encoder_blocks=(1,),
        decoder_blocks=(),
    )


def make_mamba(arguments: dict[str, Any], _: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = Mamba(**arguments)
    return layer, layer


def make_lightm(
    arguments: dict[str, Any], dimension: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    width, out = arguments["input_dim"], arguments["output_dim"]
    layer = LightMambaLayer(width, out, make_mixer("mamba", width, dimension))
    return layer, channels_first(layer)


def make_recursive(
    arguments: dict[str, Any], dimension: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    assert arguments["transform_channels"] * 2 == arguments["channels"]
    kernel = (arguments["kernel_size"],) * dimension
    layer = RecursiveBlock(arguments["channels"], arguments["order"], kernel)
    return layer, layer


def make_clinix_layer(
    arguments: dict[str, Any], dimension: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    width = arguments["input_dim"]
    layer = ClinixMambaLayer(width, make_mixer("mamba", width, dimension))
    return layer, layer


def make_token_layer(
    arguments: dict[str, Any], dimension: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    width, over_channels = arguments["dim"], arguments["channel_token"]
    layer = TokenLayer(
        block_spec(dimension), width, dict(OPTIONS), voxels=width if over_channels else None
    )
    return layer, layer


def make_ss2d(
    arguments: dict[str, Any], dimension: int
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    sizes = {key: arguments[key] for key in ("d_state", "d_conv", "expand")}
    layer = DirectionalScan(arguments["d_model"], dimension, **sizes)
    return layer, lambda x: layer(x.flatten(1, -2), x.shape[1:-1]).reshape(x.shape)


BLOCKS: dict[str, Callable[..., tuple[nn.Module, Callable[[Tensor], Tensor]]]] = {
    "mamba": make_mamba,
    "hgcn": make_recursive,
    "lightm_mamba_layer": make_lightm,
    "mambaclinix_mamba_layer": make_clinix_layer,
    "ss2d": make_ss2d,
    "umamba_mamba_layer": make_token_layer,
}


def test_block_equals_golden(block_case: Path) -> None:
    case, golden = read_case(block_case)
    dimension = len(case["input_shape"]) - 2
    layer, call = BLOCKS[case["block"]](case["constructor"], dimension)
    state = draw_state(case)
    layer.load_state_dict({row["key"]: state[row["key"]] for row in case["params"]})
    layer.double().eval()
    image = golden["input"].requires_grad_()
    output = call(image)
    assert relative(output, golden["output"]) < EXACT
    output.backward(golden["grad_output"])
    assert image.grad is not None
    assert relative(image.grad, golden["grad_input"]) < EXACT
    for key, parameter in layer.named_parameters():
        if key in case["unused_params"]:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad is not None
            assert relative(parameter.grad, golden[f"grad.{key}"]) < EXACT


TINY = {
    "input_channels": 1,
    "n_stages": 2,
    "features_per_stage": [4, 8],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2]],
    "n_conv_per_stage": 2,
    "num_classes": 2,
    "n_conv_per_stage_decoder": [2],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def test_plan_arguments_build_nnunets_baseline() -> None:
    network = build("PlainConvUNet", TINY)
    state = official_state(network)
    assert "encoder.stages.1.0.convs.1.all_modules.1.bias" in state
    assert "decoder.encoder.stages.0.0.convs.0.all_modules.0.weight" in state
    assert "decoder.transpconvs.0.weight" in state
    assert state["decoder.transpconvs.0.weight"].shape == (8, 4, 1, 2, 2)
    assert network(torch.zeros(1, 1, 3, 8, 8)).shape == (1, 2, 3, 8, 8)


def test_aliases_alone_are_enough() -> None:
    network = build("ResidualEncoderUNet", TINY)
    state = official_state(network)
    # Every encoder tensor under its rarest name only.
    kept = {
        key: value + 1
        for key, value in state.items()
        if key.startswith("decoder.")
        and f"{key.replace('.conv.', '.all_modules.0.').replace('.norm.', '.all_modules.1.')}"
        not in set(state) - {key}
    }
    load_official_state(network, kept)
    loaded = official_state(network)
    assert all(torch.equal(loaded[key], state_value) for key, state_value in kept.items())


def test_contradicting_aliases_are_refused() -> None:
    network = build("PlainConvUNet", TINY)
    state = {key: value.clone() for key, value in official_state(network).items()}
    state["decoder.encoder.stages.0.0.convs.0.conv.weight"] += 1
    with pytest.raises(BundleError, match=r"stages\.0\.0\.convs\.0\.conv\.weight.*different"):
        load_official_state(network, state)


def test_missing_tensor_is_named() -> None:
    network = build("PlainConvUNet", TINY)
    state = official_state(network)
    del state["decoder.seg_layers.0.bias"]
    with pytest.raises(BundleError, match=r"1 missing \(decoder\.seg_layers\.0\.bias\)"):
        load_official_state(network, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_bias": False}, "conv_bias = False"),
        ({"dropout_op": "torch.nn.Dropout3d"}, "dropout_op"),
        ({"nonlin": "torch.nn.GELU"}, "nonlin"),
        ({"norm_op": "torch.nn.BatchNorm3d"}, "norm_op"),
        ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, "norm_op_kwargs: eps = 0.001"),
        ({"norm_op_kwargs": {"affine": False}}, "norm_op_kwargs: affine = False"),
        ({"nonlin_kwargs": {"negative_slope": 0.2}}, "nonlin_kwargs: negative_slope = 0.2"),
        ({"squeeze_excitation": True}, "squeeze_excitation = True"),
        ({"block": "BottleneckD"}, "block = 'BottleneckD'"),
        ({"conv_op": "torch.nn.Conv1d"}, "conv_op is 'torch.nn.Conv1d'; Conv2d or Conv3d needed"),
        ({"n_blocks": 3}, "it has no argument 'n_blocks' \\(found 3\\)"),
        ({"n_stages": 3}, "features_per_stage has 2 entries, 3 needed"),
        ({"input_size": [8, 8]}, "input_size has 2 entries, 3 needed"),
        ({"strides": None}, "an argument has a value of another kind"),
    ],
)
def test_arguments_we_do_not_compute_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        build("PlainConvUNet", TINY | change)


def test_other_forms_of_lightm_unet_are_refused() -> None:
    plain = {"norm": ("GROUP", {"num_groups": 8}), "act": ["RELU", {"inplace": True}]}
    build("LightMUNet", {"blocks_down": [1, 1], "blocks_up": [1], **plain})
    for key, value in {"upsample_mode": "deconv", "use_conv_final": False, "norm": "BATCH"}.items():
        with pytest.raises(BundleError, match=f"{key} = "):
            build("LightMUNet", {key: value})


def test_missing_argument_and_unknown_class_are_named() -> None:
    with pytest.raises(BundleError, match="'strides' is missing"):
        build("PlainConvUNet", {key: value for key, value in TINY.items() if key != "strides"})
    with pytest.raises(BundleError, match="'VNet' is not known"):
        build("VNet", {})


def test_layouts_that_the_official_classes_get_wrong_are_refused() -> None:
    clinix = TINY | {"strides": [[1, 1, 1], [2, 2, 2]], "features_per_stage": [8, 16]}
    build("MambaClinix", clinix)
    with pytest.raises(BundleError, match=r"begins with \[1\]; 2 is needed"):
        build("MambaClinix", clinix | {"n_conv_per_stage": [1, 2]})
    decoder = {"num_classes": 2, "features_per_stage": [8, 16]}
    encoder = {"depths": [1, 1], "dims": 8}
    for given, message in (
        ((encoder, decoder | {"d_state": 8}), "d_state is 16 in the encoder and 8"),
        ((encoder | {"drop_path_rate": 0.1}, decoder | {"drop_path_rate": 0.2}), "0.1 and 0.2"),
        ((encoder | {"patch_size": 2}, decoder), "vss_args: patch_size = 2"),
        ((encoder | {"ape": True}, decoder), "vss_args: it has no argument 'ape'"),
    ):
        with pytest.raises(BundleError, match=message):
            build("SwinUMambaD", dict(zip(("vss_args", "decoder_args"), given, strict=True)))


def test_a_class_for_one_dimension_takes_no_other() -> None:
    with pytest.raises(BundleError, match=r"UMambaBot2d: conv_op is .*Conv3d'; Conv2d needed"):
        build("UMambaBot2d", TINY)
    with pytest.raises(BundleError, match="UMambaEnc3d: its argument 'input_size' is missing"):
        build("UMambaEnc3d", TINY)


def test_the_switch_is_where_the_official_classes_have_it() -> None:
    image = torch.zeros(1, 1, 4, 8, 8)
    asked = build("PlainConvUNet", TINY | {"deep_supervision": True})
    assert isinstance(asked(image), list)
    asked.decoder.deep_supervision = False
    assert isinstance(asked(image), Tensor) and asked.deep_supervision is False
    swin = {"in_chans": 1, "out_chans": 2, "feat_size": [4, 8], "hidden_size": 8,
            "encoder_dims": [8], "encoder_depths": [1], "deep_supervision": True}  # fmt: skip
    assert build("SwinUMamba", swin).deep_supervision is True
    parts = {"vss_args": {"depths": [1, 1], "dims": 8, "in_chans": 1},
             "decoder_args": {"num_classes": 2, "features_per_stage": [8, 16],
                              "deep_supervision": True}}  # fmt: skip
    assert len(build("SwinUMambaD", parts)(torch.zeros(1, 1, 16, 16))) == 2


ROUND_TRIPS: list[tuple[str, dict[str, Any]]] = [
    ("LightMUNet", {"spatial_dims": 2, "init_filters": 16, "in_channels": 3, "out_channels": 4,
                    "blocks_down": [1, 1], "blocks_up": [2]}),
    ("MambaClinix", TINY | {"features_per_stage": [8, 16], "input_channels": 2}),
    ("UMambaBot2d", TINY | {"conv_op": "Conv2d", "strides": [1, 2], "kernel_sizes": 3}),
    ("UMambaBot3d", TINY | {"n_conv_per_stage": [3, 1]}),
    ("UMambaEnc2d", TINY | {"conv_op": "Conv2d", "strides": [1, 2], "kernel_sizes": 3,
                            "input_size": [2, 2]}),
    ("UMambaEnc3d", TINY | {"input_size": [2, 2, 4]}),
    ("UMambaBotV1", TINY | {"num_classes": 7}),
    ("UMambaEncV1", TINY | {"conv_op": "Conv2d", "strides": [[1, 1], [1, 2]], "kernel_sizes": 3}),
    ("SwinUMamba", {"in_chans": 3, "out_chans": 2, "feat_size": [4, 8, 16], "hidden_size": 16,
                    "encoder_dims": [8, 16], "encoder_depths": [1, 1]}),
    ("SwinUMambaD", {"vss_args": {"in_chans": 3, "depths": [1, 1], "dims": [8, 16]},
                     "decoder_args": {"num_classes": 2, "features_per_stage": [8, 16]}}),
]  # fmt: skip


@pytest.mark.parametrize(("network", "constructor"), ROUND_TRIPS)
def test_state_dicts_round_trip_under_every_wrapper(
    network: str, constructor: dict[str, Any]
) -> None:
    first, second = build(network, constructor), build(network, constructor)
    written = official_state(first)
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        load_official_state(second, {prefix + key: value for key, value in written.items()})
        again = official_state(second)
        assert list(again) == list(written)
        assert all(torch.equal(again[key], written[key]) for key in written)
    with pytest.raises(BundleError, match=r"1 unexpected \(extra\.weight\)"):
        load_official_state(second, {**written, "extra.weight": torch.ones(1)})
    misshapen = list(second.state_dict())[-1]
    names = [key for key in written if written[key] is written[misshapen]]
    with pytest.raises(BundleError, match=rf"{misshapen} \[9, 9\] instead of"):
        load_official_state(second, written | dict.fromkeys(names, torch.ones(9, 9)))
