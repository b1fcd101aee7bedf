"""What the arguments of the official classes mean, as a description of a network.

Read off the official classes. An argument that a class does not have, or one with a value that
is not computed here, is refused by name.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

from medmamba.errors import BundleError
from medmamba.networks.mambaclinix import recursive_stages
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.ssm import DEFAULT_STATE
from medmamba.networks.swin_umamba import D_WIDTHS, DECODER_DEPTH, DEPTHS, WIDTHS

Constructor = Mapping[str, Any]
Allowed = Mapping[str, tuple[Any, ...]]
"""Values of arguments that are computed here, by name; the first is what a missing one means."""

MINIMUM_EDGE = 4
"""Voxels per axis at the deepest stage, where a constructor says nothing of the patch (nnU-Net)."""

SWITCH = "deep_supervision"

PLANNED_SIZES = (
    "input_channels",
    "num_classes",
    "n_stages",
    "features_per_stage",
    "kernel_sizes",
    "strides",
    "n_conv_per_stage",
    "n_blocks_per_stage",
    "n_conv_per_stage_decoder",
    "input_size",
    "conv_op",
    "norm_op_kwargs",
    "nonlin_kwargs",
    "squeeze_excitation_reduction_ratio",
    SWITCH,
)

PLANNED_FIXED: Allowed = MappingProxyType(
    {
        "block": (None, "BasicBlockD"),
        "bottleneck_channels": (None,),
        "conv_bias": (True,),
        "dropout_op": (None,),
        "dropout_op_kwargs": (None, {}),
        "nonlin": ("LeakyReLU",),
        "nonlin_first": (False,),
        "norm_op": ("InstanceNorm2d", "InstanceNorm3d"),
        "pool_type": ("conv",),
        "squeeze_excitation": (False,),
        "stem_channels": (None,),
        "stochastic_depth_p": (0.0,),
    }
)
"""Arguments of nnU-Net's family that have one value in all official plans."""

NORM_FIXED: Allowed = MappingProxyType(
    {"affine": (True,), "eps": (1e-5,), "track_running_stats": (False,)}
)
NONLIN_FIXED: Allowed = MappingProxyType({"negative_slope": (0.01,)})

LIGHTM_SIZES = (
    "spatial_dims",
    "init_filters",
    "in_channels",
    "out_channels",
    "blocks_down",
    "blocks_up",
)

LIGHTM_FIXED: Allowed = MappingProxyType(
    {
        "act": ("RELU", ["RELU", {"inplace": True}]),
        "dropout_prob": (None, 0),
        "norm": (["GROUP", {"num_groups": 8}],),
        "norm_name": ("", "GROUP", "group"),
        "num_groups": (8,),
        "upsample_mode": ("nontrainable",),
        "use_conv_final": (True,),
    }
)
"""Arguments of LightM-UNet that its trainer leaves at their defaults."""

SWIN_SIZES = (
    "in_chans",
    "out_chans",
    "feat_size",
    "hidden_size",
    "encoder_dims",
    "encoder_depths",
    # The official class takes these two and reads neither.
    "drop_path_rate",
    "layer_scale_init_value",
    SWITCH,
)

SWIN_FIXED: Allowed = MappingProxyType(
    {"norm_name": ("instance",), "res_block": (True,), "spatial_dims": (2,)}
)

SWIN_D_ENCODER_SIZES = ("in_chans", "depths", "dims", "drop_path_rate", "d_state")

SWIN_D_ENCODER_FIXED: Allowed = MappingProxyType(
    {
        "attn_drop_rate": (0.0,),
        "drop_rate": (0.0,),
        "norm_layer": ("LayerNorm",),
        "patch_norm": (True,),
        # The official decoder ends with an enlargement by four.
        "patch_size": (4,),
        "use_checkpoint": (False,),
    }
)
"""Arguments of Swin-UMamba-D's encoder that its trainer leaves at their defaults."""

SWIN_D_DECODER_SIZES = ("num_classes", "features_per_stage", "drop_path_rate", "d_state", SWITCH)


def read_constructor(network: str, constructor: Constructor) -> NetworkSpec:
    """Return the spec that describes what an official class would build.

    Raises:
        BundleError: an unknown class, or an argument with a value we do not compute.
    """
    if network not in READERS:
        raise BundleError(
            f"network class {network!r} is not known. Known: {', '.join(sorted(READERS))}."
        )
    try:
        return READERS[network](network, constructor)
    except KeyError as error:
        raise BundleError(
            f"network class {network}: its argument {error.args[0]!r} is missing."
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"network class {network}: an argument has a value of another kind than its class "
            f"takes ({error}). Give what stands in the case or in the plans."
        ) from error


def is_supervised(constructor: Constructor) -> bool:
    """Return whether the arguments ask for logits of all resolutions."""
    return bool(constructor.get("decoder_args", constructor).get(SWITCH, False))


def _planned(name: str, network: str, constructor: Constructor) -> NetworkSpec:
    """Read the arguments shared by nnU-Net's U-Nets and everything derived from them."""
    _require_known(network, constructor, PLANNED_SIZES, PLANNED_FIXED)
    _require_kwargs(network, constructor)
    stages, dimension = int(constructor["n_stages"]), _dimension(network, constructor)
    strides = _rows(constructor["strides"], stages, dimension)
    divisor = [prod(row[axis] for row in strides) for axis in range(dimension)]
    blocks = constructor.get("n_conv_per_stage", constructor.get("n_blocks_per_stage"))
    if blocks is None:
        raise KeyError("n_conv_per_stage")
    patch = constructor.get("input_size")
    if patch is None:
        if name == "umamba_enc":  # its weights depend on the patch
            raise KeyError("input_size")
        patch = [MINIMUM_EDGE * multiple for multiple in divisor]
    features = _numbers(constructor["features_per_stage"], stages)
    for key, found, needed in (
        ("features_per_stage", len(features), stages),
        ("input_size", len(patch), dimension),
    ):
        if found != needed:
            raise BundleError(
                f"network class {network}: {key} has {found} entries, {needed} needed."
            )
    return NetworkSpec(
        name=name,
        in_channels=int(constructor["input_channels"]),
        out_channels=int(constructor["num_classes"]),
        patch_size=tuple(int(size) for size in patch),
        features=features,
        strides=strides,
        kernel_sizes=_rows(constructor["kernel_sizes"], stages, dimension),
        encoder_blocks=_numbers(blocks, stages),
        decoder_blocks=_numbers(constructor["n_conv_per_stage_decoder"], stages - 1),
    )


def _mambaclinix(network: str, constructor: Constructor) -> NetworkSpec:
    """Read MambaClinix's arguments; its upper stages must be those its class is written for."""
    spec = _planned("mambaclinix", network, constructor)
    upper = spec.encoder_blocks[: recursive_stages(spec)]
    if set(upper) != {2}:
        # The official class decides by these counts, and loses or shifts layers at any other.
        raise BundleError(
            f"network class {network}: n_conv_per_stage begins with {list(upper)}; 2 is needed in "
            "the upper half of the stages, where its recursive convolutions stand."
        )
    return spec


def _lightm(network: str, constructor: Constructor) -> NetworkSpec:
    """Read LightM-UNet's arguments, with the defaults of its class."""
    _require_known(network, constructor, LIGHTM_SIZES, LIGHTM_FIXED)
    dimension = int(constructor.get("spatial_dims", 3))
    down = tuple(int(blocks) for blocks in constructor.get("blocks_down", (1, 2, 2, 4)))
    up = tuple(int(blocks) for blocks in constructor.get("blocks_up", (1, 1, 1)))
    filters, stages = int(constructor.get("init_filters", 8)), len(down)
    return NetworkSpec(
        name="lightm_unet",
        in_channels=int(constructor.get("in_channels", 1)),
        out_channels=int(constructor.get("out_channels", 2)),
        patch_size=(MINIMUM_EDGE * 2 ** (stages - 1),) * dimension,
        features=tuple(filters * 2**stage for stage in range(stages)),
        strides=((1,) * dimension,) + ((2,) * dimension,) * (stages - 1),
        kernel_sizes=((3,) * dimension,) * stages,
        encoder_blocks=down,
        decoder_blocks=up,
    )


def _swin(network: str, constructor: Constructor) -> NetworkSpec:
    """Read Swin-UMamba's arguments; its class fixes the encoder, its fixtures may state another."""
    _require_known(network, constructor, SWIN_SIZES, SWIN_FIXED)
    widths = tuple(int(width) for width in constructor.get("feat_size", WIDTHS[:-1]))
    hidden = int(constructor.get("hidden_size", WIDTHS[-1]))
    dims = tuple(int(width) for width in constructor.get("encoder_dims", WIDTHS[1:-1]))
    depths = tuple(int(blocks) for blocks in constructor.get("encoder_depths", DEPTHS))
    if widths[1:] != dims or hidden != dims[-1] or len(depths) != len(dims):
        raise BundleError(
            f"network class {network}: feat_size {list(widths)}, hidden_size {hidden} and depths "
            f"{list(depths)} do not fit an encoder of widths {list(dims)}."
        )
    stages = len(dims) + 2
    return NetworkSpec(
        name="swin_umamba",
        in_channels=int(constructor["in_chans"]),
        out_channels=int(constructor["out_chans"]),
        patch_size=(2 ** (stages - 1),) * 2,
        features=(*widths, hidden),
        strides=((1, 1),) + ((2, 2),) * (stages - 1),
        kernel_sizes=((3, 3),) * stages,
        encoder_blocks=(1, 1, *depths),
        decoder_blocks=(1,) * (stages - 1),
    )


def _swin_d(network: str, constructor: Constructor) -> NetworkSpec:
    """Read the arguments of Swin-UMamba-D's encoder and decoder."""
    _require_known(network, constructor, ("vss_args", "decoder_args"), {})
    encoder, decoder = constructor["vss_args"], constructor["decoder_args"]
    _require_known(f"{network}, vss_args", encoder, SWIN_D_ENCODER_SIZES, SWIN_D_ENCODER_FIXED)
    _require_known(f"{network}, decoder_args", decoder, SWIN_D_DECODER_SIZES, {})
    depths = tuple(int(blocks) for blocks in encoder.get("depths", DEPTHS))
    widths = _doubling(encoder.get("dims", D_WIDTHS[0]), len(depths))
    patch, rate = SWIN_D_ENCODER_FIXED["patch_size"][0], float(encoder.get("drop_path_rate", 0.2))
    if _doubling(decoder["features_per_stage"], len(depths)) != widths:
        raise BundleError(
            f"network class {network}: decoder widths {decoder['features_per_stage']} are not the "
            f"encoder's, {list(widths)}."
        )
    if float(decoder.get("drop_path_rate", rate)) != rate:
        raise BundleError(
            f"network class {network}: encoder and decoder need one drop_path_rate; they have "
            f"{rate} and {decoder['drop_path_rate']}."
        )
    states = tuple(int(part.get("d_state", DEFAULT_STATE)) for part in (encoder, decoder))
    if states[0] != states[1]:
        raise BundleError(
            f"network class {network}: d_state is {states[0]} in the encoder and "
            f"{states[1]} in the decoder; one for both is needed."
        )
    stages = len(depths) + 1
    return NetworkSpec(
        name="swin_umamba_d",
        in_channels=int(encoder.get("in_chans", 3)),
        out_channels=int(decoder["num_classes"]),
        patch_size=(patch * 2 ** (stages - 2),) * 2,
        features=(widths[0], *widths),
        strides=((1, 1), (patch, patch)) + ((2, 2),) * (stages - 2),
        kernel_sizes=((3, 3),) * stages,
        encoder_blocks=(0, *depths),
        decoder_blocks=(DECODER_DEPTH,) * (stages - 2) + (0,),
        options={"drop_path": rate, "d_state": states[0]},
    )


def _doubling(widths: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """Double one width from stage to stage; keep a list."""
    if isinstance(widths, int):
        return tuple(widths * 2**stage for stage in range(stages))
    return tuple(int(width) for width in widths)


def _require_known(
    network: str, constructor: Constructor, sizes: Sequence[str], fixed: Allowed
) -> None:
    """Refuse arguments that a class does not have, and values that are not computed here."""
    unknown = sorted(set(constructor) - set(sizes) - set(fixed))
    if unknown:
        raise BundleError(
            f"network class {network}: it has no argument {unknown[0]!r} (found "
            f"{constructor[unknown[0]]!r}). Its arguments: {', '.join(sorted({*sizes, *fixed}))}."
        )
    _require_fixed(f"network class {network}", constructor, fixed)


def _require_fixed(what: str, values: Constructor, fixed: Allowed) -> None:
    for key, allowed in fixed.items():
        value = values.get(key, allowed[0])
        plain = str(value).rsplit(".", 1)[-1] if isinstance(value, str) else value
        plain = list(plain) if isinstance(plain, tuple) else plain
        if plain not in allowed:
            raise BundleError(f"{what}: {key} = {value!r} is not supported, only {allowed[0]!r}.")


def _require_kwargs(network: str, constructor: Constructor) -> None:
    """Refuse norms and activations with other numbers than all official plans have."""
    for key, fixed in (("norm_op_kwargs", NORM_FIXED), ("nonlin_kwargs", NONLIN_FIXED)):
        _require_fixed(f"network class {network}, {key}", constructor.get(key) or {}, fixed)


def _dimension(network: str, constructor: Constructor) -> int:
    """Return the axes of ``conv_op``, which a class for one dimension must agree with."""
    operator = str(constructor["conv_op"])
    found = next((axes for axes in (2, 3) if operator.endswith(f"Conv{axes}d")), None)
    made_for = next((axes for axes in (2, 3) if network.endswith(f"{axes}d")), found)
    if found is None or found != made_for:
        wanted = f"Conv{made_for}d" if made_for else "Conv2d or Conv3d"
        raise BundleError(f"network class {network}: conv_op is {operator!r}; {wanted} needed.")
    return found


def _numbers(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """Repeat one number for every stage; keep a list."""
    return (value,) * length if isinstance(value, int) else tuple(int(item) for item in value)


def _rows(
    value: int | Sequence[int | Sequence[int]], stages: int, dimension: int
) -> tuple[tuple[int, ...], ...]:
    """Bring sizes given once, per stage, or per stage and axis to the last form."""
    per_stage = (value,) * stages if isinstance(value, int) else value
    return tuple(_numbers(row, dimension) for row in per_stage)


Reader = Callable[[str, Constructor], NetworkSpec]


def _planned_reader(name: str) -> Reader:
    return lambda network, constructor: _planned(name, network, constructor)


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "PlainConvUNet": _planned_reader("plain_unet"),
        "ResidualEncoderUNet": _planned_reader("resenc_unet"),
        "UMambaBot2d": _planned_reader("umamba_bot"),
        "UMambaBot3d": _planned_reader("umamba_bot"),
        "UMambaBotV1": _planned_reader("umamba_bot_v1"),
        "UMambaEnc2d": _planned_reader("umamba_enc"),
        "UMambaEnc3d": _planned_reader("umamba_enc"),
        "UMambaEncV1": _planned_reader("umamba_enc_v1"),
        "MambaClinix": _mambaclinix,
        "LightMUNet": _lightm,
        "SwinUMamba": _swin,
        "SwinUMambaD": _swin_d,
    }
)
"""Official classes by name. The two baselines are nnU-Net's own."""
