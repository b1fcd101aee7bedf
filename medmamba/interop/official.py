"""The official networks: built from their own constructor arguments, filled from their own files.

What each argument means is read off the official classes; a value we do not compute is refused
by name. Names of tensors are ``official_keys.py``'s, reading of files is ``checkpoint.py``'s.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from medmamba.errors import BundleError
from medmamba.interop.official_keys import has_aliases, merge_aliases, official_names
from medmamba.networks import build_network
from medmamba.networks.mambaclinix import recursive_stages
from medmamba.networks.spec import NetworkSpec
from medmamba.networks.ssm import DEFAULT_STATE
from medmamba.networks.swin_umamba import D_WIDTHS, DECODER_DEPTH, DEPTHS, WIDTHS
from medmamba.networks.weights import load_exactly

Constructor = Mapping[str, Any]

MINIMUM_EDGE = 4
"""Voxels per axis at the deepest stage, where a constructor says nothing of the patch (nnU-Net)."""

FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "conv_bias": (True,),
        "dropout_op": (None,),
        "dropout_op_kwargs": (None, {}),
        "nonlin_first": (False,),
        "nonlin": ("LeakyReLU",),
        "norm_op": ("InstanceNorm2d", "InstanceNorm3d"),
    }
)
"""Arguments of nnU-Net's family that have one value in all official plans."""

LIGHTM_FIXED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "act": ("RELU", ["RELU", {"inplace": True}]),
        "dropout_prob": (None, 0),
        "norm": (["GROUP", {"num_groups": 8}],),
        "num_groups": (8,),
        "upsample_mode": ("nontrainable",),
        "use_conv_final": (True,),
    }
)
"""Arguments of LightM-UNet that its trainer leaves at their defaults."""


def build(network: str, constructor: Constructor) -> nn.Module:
    """Build a network as an official class would be built.

    Args:
        network: name of the official class.
        constructor: its arguments as plain values; classes by their names.

    Raises:
        BundleError: an unknown class, or an argument with a value we do not compute.
    """
    return build_network(read_constructor(network, constructor))


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
        return READERS[network](constructor)
    except KeyError as error:
        raise BundleError(
            f"network class {network}: its argument {error.args[0]!r} is missing."
        ) from error


def load_official_state(
    module: nn.Module, state: Mapping[str, Tensor], *, what: str = "official state dict"
) -> None:
    """Fill a module from an official state dict, under whichever names its tensors have.

    Accepted besides the plain names: ``all_modules`` and ``decoder.encoder`` aliases, and the
    prefixes ``module.`` and ``_orig_mod.``.

    Args:
        module: the network to fill.
        state: tensors by official names.
        what: how messages call the state dict.

    Raises:
        BundleError: naming tensors that are missing, unexpected, misshapen or contradictory.
    """
    aliased = has_aliases(module.state_dict())
    load_exactly(module, merge_aliases(state, aliased=aliased), what=what)


def official_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a state dict that the official class loads, every alias included."""
    own = module.state_dict()
    if not has_aliases(own):
        return dict(own)
    return {alias: tensor for name, tensor in own.items() for alias in official_names(name)}


def _planned(name: str, constructor: Constructor) -> NetworkSpec:
    """Read the arguments shared by nnU-Net's U-Nets and everything derived from them."""
    _require_fixed(name, constructor)
    stages = int(constructor["n_stages"])
    operator = str(constructor["conv_op"])
    dimension = 2 if operator.endswith("2d") else 3
    strides = _rows(constructor["strides"], stages, dimension)
    divisor = [prod(row[axis] for row in strides) for axis in range(dimension)]
    blocks = constructor.get("n_conv_per_stage", constructor.get("n_blocks_per_stage"))
    if blocks is None:
        raise KeyError("n_conv_per_stage")
    patch = constructor.get("input_size") or [MINIMUM_EDGE * multiple for multiple in divisor]
    return NetworkSpec(
        name=name,
        in_channels=int(constructor["input_channels"]),
        out_channels=int(constructor["num_classes"]),
        patch_size=tuple(int(size) for size in patch),
        features=_numbers(constructor["features_per_stage"], stages),
        strides=strides,
        kernel_sizes=_rows(constructor["kernel_sizes"], stages, dimension),
        encoder_blocks=_numbers(blocks, stages),
        decoder_blocks=_numbers(constructor["n_conv_per_stage_decoder"], stages - 1),
    )


def _mambaclinix(constructor: Constructor) -> NetworkSpec:
    """Read MambaClinix's arguments; its upper stages must be those its class is written for."""
    spec = _planned("mambaclinix", constructor)
    upper = spec.encoder_blocks[: recursive_stages(spec)]
    if set(upper) != {2}:
        # The official class decides by these counts, and loses or shifts layers at any other.
        raise BundleError(
            f"network MambaClinix: n_conv_per_stage begins with {list(upper)}; 2 is needed in the "
            "upper half of the stages, where its recursive convolutions stand."
        )
    return spec


def _lightm(constructor: Constructor) -> NetworkSpec:
    """Read LightM-UNet's arguments, with the defaults of its class."""
    for key, allowed in LIGHTM_FIXED.items():
        value = constructor.get(key, allowed[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in allowed:
            raise BundleError(
                f"network LightMUNet: {key} = {value!r} is not supported, only {allowed[0]!r}."
            )
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


def _swin(constructor: Constructor) -> NetworkSpec:
    """Read Swin-UMamba's arguments; its class fixes the encoder, its fixtures may state another."""
    widths = tuple(int(width) for width in constructor.get("feat_size", WIDTHS[:-1]))
    hidden = int(constructor.get("hidden_size", WIDTHS[-1]))
    dims = tuple(int(width) for width in constructor.get("encoder_dims", WIDTHS[1:-1]))
    depths = tuple(int(blocks) for blocks in constructor.get("encoder_depths", DEPTHS))
    if widths[1:] != dims or hidden != dims[-1] or len(depths) != len(dims):
        raise BundleError(
            f"network SwinUMamba: feat_size {list(widths)}, hidden_size {hidden} and depths "
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


def _swin_d(constructor: Constructor) -> NetworkSpec:
    """Read the arguments of Swin-UMamba-D's encoder and decoder."""
    encoder, decoder = constructor["vss_args"], constructor["decoder_args"]
    depths = tuple(int(blocks) for blocks in encoder.get("depths", DEPTHS))
    widths = _doubling(encoder.get("dims", D_WIDTHS[0]), len(depths))
    patch, rate = int(encoder.get("patch_size", 4)), float(encoder.get("drop_path_rate", 0.2))
    if _doubling(decoder["features_per_stage"], len(depths)) != widths:
        raise BundleError(
            f"network SwinUMambaD: decoder widths {decoder['features_per_stage']} are not the "
            f"encoder's, {list(widths)}."
        )
    if float(decoder.get("drop_path_rate", rate)) != rate:
        raise BundleError("network SwinUMambaD: encoder and decoder need one drop_path_rate.")
    states = int(encoder.get("d_state", DEFAULT_STATE)), int(decoder.get("d_state", DEFAULT_STATE))
    if states[0] != states[1]:
        raise BundleError(
            f"network SwinUMambaD: d_state is {states[0]} in the encoder and "
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


def _require_fixed(name: str, constructor: Constructor) -> None:
    for key, allowed in FIXED.items():
        value = constructor.get(key, allowed[0])
        plain = str(value).rsplit(".", 1)[-1] if isinstance(value, str) else value
        if plain not in allowed:
            raise BundleError(
                f"network {name}: {key} = {value!r} is not supported, only {allowed[0]!r}."
            )
    norm = constructor.get("norm_op_kwargs") or {}
    slope = (constructor.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    if norm.get("eps", 1e-5) != 1e-5 or not norm.get("affine", True) or slope != 0.01:
        raise BundleError(
            f"network {name}: norm {dict(norm)} and slope {slope} are not supported, only "
            "affine instance norm with eps 1e-5 and slope 0.01."
        )


def _numbers(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """Repeat one number for every stage; keep a list."""
    return (value,) * length if isinstance(value, int) else tuple(int(item) for item in value)


def _rows(
    value: int | Sequence[int | Sequence[int]], stages: int, dimension: int
) -> tuple[tuple[int, ...], ...]:
    """Bring sizes given once, per stage, or per stage and axis to the last form."""
    per_stage = (value,) * stages if isinstance(value, int) else value
    return tuple(_numbers(row, dimension) for row in per_stage)


def _planned_reader(name: str) -> Callable[[Constructor], NetworkSpec]:
    return lambda constructor: _planned(name, constructor)


READERS: Mapping[str, Callable[[Constructor], NetworkSpec]] = MappingProxyType(
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
