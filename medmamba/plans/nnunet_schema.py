"""Plans on disk: nnU-Net v2's schema and keys, plus one ``medmamba`` block for what it lacks.

Nothing else knows nnU-Net's names. Both directions are here: nnU-Net can use our plans, and we can
use nnU-Net's, old ones too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmamba.errors import PlanError
from medmamba.files import from_plain, read_json, to_json, to_plain, write_atomic
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.legacy import modernize
from medmamba.plans.plan import PLAN_VERSION, ConfigurationPlan, Plan, Reason
from medmamba.preprocessing.recipe import (
    ChannelRecipe,
    ChannelStatistics,
    Normalization,
    PreprocessingRecipe,
    ResamplingRecipe,
)
from medmamba.training.recipe import TrainingRecipe
from medmamba.volume import Grid

BLOCK = "medmamba"
"""The key of our block in a plans file."""

SCHEMES = {
    Normalization.ZSCORE: "ZScoreNormalization",
    Normalization.CT: "CTNormalization",
    Normalization.RESCALE_0_1: "RescaleTo01Normalization",
    Normalization.RGB_0_1: "RGBTo01Normalization",
    Normalization.NONE: "NoNormalization",
}

RESAMPLERS = {
    "spline": "resample_data_or_seg_to_shape",
    "torch": "resample_torch_fornnunet",
    "none": "no_resampling_hack",
}

OUR_NETWORK_CLASS = "medmamba.interop.nnunet_network.PlannedNetwork"
"""What nnU-Net builds for a network of ours; ``arch_kwargs`` says which one."""

UNET_CLASSES = {
    "plain_unet": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "resenc_unet": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}

IMPORTED_KEYS = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def save_plan(path: Path, plan: Plan) -> None:
    """Write a plan so that nnU-Net can read it too.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    write_atomic(path, to_json(plan_to_nnunet(plan)))


def load_plan(path: Path, *, dataset_json: Path | None = None) -> Plan:
    """Read a plan of ours, or one of nnU-Net's.

    Args:
        path: the plans file.
        dataset_json: the dataset's description, which nnU-Net's own plans need; looked for beside
            the plan when None.

    Raises:
        PlanError: the file is missing, damaged, of another version, or needs a dataset.json.
    """
    content = read_json(path, what="plan", error=PlanError)
    if not isinstance(content, dict):
        raise PlanError(f"plan {path}: holds no object. Plan again: medmamba plan DATASET -o WORK.")
    description = None
    if BLOCK not in content:
        beside = dataset_json or path.parent / "dataset.json"
        if not beside.is_file():
            raise PlanError(
                f"plan {path}: an nnU-Net plan does not name the labels; "
                f"{beside} is needed beside it."
            )
        description = read_json(beside, what="dataset.json", error=PlanError)
    return plan_from_nnunet(content, description, what=f"plan {path}")


def plan_to_nnunet(plan: Plan) -> dict[str, Any]:
    """Turn a plan into nnU-Net's plans, with our block at the end."""
    configurations: dict[str, Any] = {}
    for name, configuration in plan.configurations.items():
        parent = "3d_fullres"
        if configuration.previous_stage is not None and parent in plan.configurations:
            configurations[name] = {
                "inherits_from": parent,
                "previous_stage": configuration.previous_stage,
            }
        else:
            configurations[name] = _configuration_to_nnunet(configuration)
    forward = plan.transpose_forward
    return {
        "dataset_name": plan.dataset_name,
        "plans_name": plan.plans_name,
        "original_median_spacing_after_transp": list(plan.median_spacing_mm),
        "original_median_shape_after_transp": list(plan.median_shape),
        "image_reader_writer": plan.reader,
        "transpose_forward": list(forward),
        "transpose_backward": [forward.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": plan.planner,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(index): dict(sorted(to_plain(statistics).items()))
            for index, statistics in enumerate(plan.intensities)
        },
        BLOCK: _block(plan),
    }


def plan_from_nnunet(
    content: Mapping[str, Any],
    dataset_json: Mapping[str, Any] | None = None,
    *,
    what: str = "plan",
) -> Plan:
    """Turn nnU-Net's plans into a plan.

    Args:
        content: a plans file, ours or nnU-Net's, of any of its versions.
        dataset_json: needed where ``content`` has no block of ours.
        what: how messages call the plan.

    Raises:
        PlanError: a key is missing or unusable, or the plan is of another version of medmamba.
    """
    try:
        return _read_plan(content, dataset_json, what)
    except KeyError as problem:
        raise PlanError(
            f"{what}: key {problem} is missing. Plan again: medmamba plan DATASET -o WORK."
        ) from problem


def _read_plan(
    content: Mapping[str, Any], dataset_json: Mapping[str, Any] | None, what: str
) -> Plan:
    block = content.get(BLOCK)
    _check_version(block, what)
    if block is None:
        if dataset_json is None:
            raise PlanError(
                f"{what}: an nnU-Net plan needs its dataset.json, which names the labels."
            )
        label_map = LabelMap.from_dataset_json(dict(dataset_json))
        block = _default_block(dataset_json)
    else:
        label_map = from_plain(LabelMap, block["label_map"], what=what, error=PlanError)
    intensities = tuple(
        from_plain(ChannelStatistics, statistics, what=what, error=PlanError)
        for statistics in _in_order(content["foreground_intensity_properties_per_channel"])
    )
    network = block.get("network")
    plan = {
        "channel_names": tuple(block["channel_names"]),
        "transpose_forward": tuple(content["transpose_forward"]),
    }
    configurations = {
        name: _read_configuration(
            _resolve(content["configurations"], name, what),
            block.get("configurations", {}).get(name, {}),
            label_map=label_map,
            intensities=intensities,
            channels=len(plan["channel_names"]),
            transpose=plan["transpose_forward"],
            what=f"{what}, configuration {name}",
        )
        for name in content["configurations"]
    }
    return Plan(
        dataset_name=content["dataset_name"],
        plans_name=content["plans_name"],
        planner=content["experiment_planner_used"],
        network=network or next(iter(configurations.values())).network.name,
        configurations=configurations,
        label_map=label_map,
        channel_names=plan["channel_names"],
        file_ending=block["file_ending"],
        reader=content["image_reader_writer"],
        transpose_forward=plan["transpose_forward"],
        median_spacing_mm=tuple(content["original_median_spacing_after_transp"]),
        median_shape=tuple(content["original_median_shape_after_transp"]),
        intensities=intensities,
        fingerprint_hash=block.get("fingerprint_hash", ""),
        reasons=tuple(
            from_plain(Reason, reason, what=what, error=PlanError)
            for reason in block.get("reasons", ())
        ),
        version=PLAN_VERSION,
    )


def _check_version(block: Mapping[str, Any] | None, what: str) -> None:
    if block is None or block.get("version") == PLAN_VERSION:
        return
    network = block.get("network", "NAME")
    raise PlanError(
        f"{what}: written as plan version {block.get('version')!r}, this medmamba reads version "
        f"{PLAN_VERSION}. Plan again: medmamba plan DATASET -o WORK --network {network}.",
        code="E_PLAN_VERSION",
    )


def _block(plan: Plan) -> dict[str, Any]:
    return {
        "version": plan.version,
        "network": plan.network,
        "channel_names": list(plan.channel_names),
        "file_ending": plan.file_ending,
        "label_map": to_plain(plan.label_map),
        "fingerprint_hash": plan.fingerprint_hash,
        "configurations": {
            name: {
                "memory_bytes": configuration.memory_bytes,
                "training": _training_extras(configuration.training),
            }
            for name, configuration in plan.configurations.items()
        },
        "reasons": [to_plain(reason) for reason in plan.reasons],
    }


def _default_block(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    names = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return {
        "channel_names": [str(name) for name in _in_order(names)],
        "file_ending": dataset_json.get("file_ending", ""),
    }


def _training_extras(recipe: TrainingRecipe) -> dict[str, Any]:
    """Return the recipe without what nnU-Net's own keys say."""
    plain: dict[str, Any] = to_plain(recipe)
    del plain["batch_size"], plain["batch_dice"]
    return plain


def _configuration_to_nnunet(configuration: ConfigurationPlan) -> dict[str, Any]:
    recipe = configuration.preprocessing
    result: dict[str, Any] = {
        "data_identifier": configuration.data_identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": configuration.training.batch_size,
        "patch_size": list(configuration.grid.patch_size),
        "median_image_size_in_voxels": list(configuration.median_shape),
        "spacing": list(configuration.grid.spacing_mm),
        "normalization_schemes": [SCHEMES[c.normalization] for c in recipe.channels],
        "use_mask_for_norm": [channel.use_mask for channel in recipe.channels],
        "resampling_fn_data": RESAMPLERS[recipe.data.method],
        "resampling_fn_seg": RESAMPLERS[recipe.labels.method],
        "resampling_fn_data_kwargs": _resampling_kwargs(recipe.data, is_seg=False),
        "resampling_fn_seg_kwargs": _resampling_kwargs(recipe.labels, is_seg=True),
        "resampling_fn_probabilities": RESAMPLERS[recipe.probabilities.method],
        "resampling_fn_probabilities_kwargs": _resampling_kwargs(
            recipe.probabilities, is_seg=False
        ),
        "architecture": _architecture(configuration.network),
        "batch_dice": configuration.training.batch_dice,
    }
    if configuration.next_stage is not None:
        result["next_stage"] = configuration.next_stage
    return result


def _resampling_kwargs(recipe: ResamplingRecipe, *, is_seg: bool) -> dict[str, Any]:
    if recipe.method == "none":
        return {}
    if recipe.method == "torch":
        return {"is_seg": is_seg, "force_separate_z": recipe.separate_z}
    return {
        "is_seg": is_seg,
        "order": recipe.order,
        "order_z": recipe.order_z,
        "force_separate_z": recipe.separate_z,
    }


def _architecture(spec: NetworkSpec) -> dict[str, Any]:
    dimension = spec.dimension
    residual = spec.name == "resenc_unet"
    kwargs: dict[str, Any] = {
        "n_stages": spec.stages,
        "features_per_stage": list(spec.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
        "kernel_sizes": [list(kernel) for kernel in spec.kernel_sizes],
        "strides": [list(stride) for stride in spec.strides],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": list(spec.encoder_blocks),
        "n_conv_per_stage_decoder": list(spec.decoder_blocks),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    if spec.name not in UNET_CLASSES:
        # nnU-Net hands its networks nothing but these arguments.
        kwargs["network"] = spec.name
        kwargs["patch_size"] = list(spec.patch_size)
        kwargs["mixer"] = spec.mixer
        kwargs["options"] = dict(spec.options)
    return {
        "network_class_name": UNET_CLASSES.get(spec.name, OUR_NETWORK_CLASS),
        "arch_kwargs": kwargs,
        "_kw_requires_import": IMPORTED_KEYS,
    }


def _resolve(
    configurations: Mapping[str, Any], name: str, what: str, seen: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Merge a configuration over those it inherits from."""
    if name in seen or name not in configurations:
        problem = "inherits from itself" if name in seen else "does not exist"
        raise PlanError(f"{what}: configuration '{name}' {problem} ({' -> '.join((*seen, name))}).")
    own = dict(configurations[name])
    parent = own.pop("inherits_from", None)
    if parent is None:
        return own
    return {**_resolve(configurations, parent, what, (*seen, name)), **own}


def _read_configuration(
    content: Mapping[str, Any],
    extras: Mapping[str, Any],
    *,
    label_map: LabelMap,
    intensities: tuple[ChannelStatistics, ...],
    channels: int,
    transpose: Any,
    what: str,
) -> ConfigurationPlan:
    content = modernize(content, what)
    patch = tuple(content["patch_size"])
    previous = content.get("previous_stage")
    one_hot = len(label_map.foreground_values) if previous else 0
    training = {
        "mirror_axes": tuple(range(len(patch))),
        **extras.get("training", {}),
        "batch_size": content["batch_size"],
        "batch_dice": content["batch_dice"],
    }
    return ConfigurationPlan(
        grid=Grid(spacing_mm=tuple(content["spacing"]), patch_size=patch),
        preprocessing=_read_preprocessing(content, intensities, transpose, what),
        network=_read_network(
            content["architecture"],
            patch,
            in_channels=channels + one_hot,
            out_channels=label_map.output_channels,
            what=what,
        ),
        training=from_plain(TrainingRecipe, training, what=what, error=PlanError),
        median_shape=tuple(content["median_image_size_in_voxels"]),
        data_identifier=content["data_identifier"],
        memory_bytes=extras.get("memory_bytes"),
        previous_stage=previous,
        next_stage=None if previous else content.get("next_stage"),
    )


def _read_preprocessing(
    content: Mapping[str, Any],
    intensities: tuple[ChannelStatistics, ...],
    transpose: Any,
    what: str,
) -> PreprocessingRecipe:
    known = {theirs: ours for ours, theirs in SCHEMES.items()}
    channels = []
    schemes = zip(content["normalization_schemes"], content["use_mask_for_norm"], strict=True)
    for index, (scheme, use_mask) in enumerate(schemes):
        if scheme not in known:
            raise PlanError(f"{what}: normalisation '{scheme}' is not one of {sorted(known)}.")
        ours = known[scheme]
        channels.append(
            ChannelRecipe(
                normalization=ours,
                use_mask=bool(use_mask),
                statistics=intensities[index] if ours is Normalization.CT else None,
            )
        )
    return PreprocessingRecipe(
        channels=tuple(channels),
        transpose_forward=transpose,
        data=_read_resampling(content, "data", 3, what),
        labels=_read_resampling(content, "seg", 1, what),
        probabilities=_read_resampling(content, "probabilities", 1, what),
    )


def _read_resampling(
    content: Mapping[str, Any], kind: str, order: int, what: str
) -> ResamplingRecipe:
    name = content[f"resampling_fn_{kind}"]
    methods = {theirs: ours for ours, theirs in RESAMPLERS.items()}
    if name not in methods:
        raise PlanError(f"{what}: resampling '{name}' is not one of {sorted(methods)}.")
    method = methods[name]
    kwargs = content[f"resampling_fn_{kind}_kwargs"]
    return ResamplingRecipe(
        # nnU-Net's torch resampler is linear for every kind of array.
        order=1 if method == "torch" else int(kwargs.get("order", order)),
        order_z=int(kwargs.get("order_z", 0)),
        separate_z=kwargs.get("force_separate_z"),
        method=method,
    )


def _read_network(
    architecture: Mapping[str, Any],
    patch: tuple[int, ...],
    *,
    in_channels: int,
    out_channels: int,
    what: str,
) -> NetworkSpec:
    kwargs = architecture["arch_kwargs"]
    class_name = architecture["network_class_name"]
    names = {theirs: ours for ours, theirs in UNET_CLASSES.items()}
    name = kwargs.get("network") if class_name == OUR_NETWORK_CLASS else names.get(class_name)
    if name is None:
        raise PlanError(
            f"{what}: network class '{class_name}' is not known here. "
            f"Known are {', '.join([*names, OUR_NETWORK_CLASS])}."
        )
    blocks = kwargs.get("n_conv_per_stage", kwargs.get("n_blocks_per_stage"))
    stages, dimension = kwargs["n_stages"], len(patch)
    plain = {
        "name": name,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": patch,
        "features": kwargs["features_per_stage"],
        "strides": _per_axis(kwargs["strides"], dimension),
        "kernel_sizes": _per_axis(kwargs["kernel_sizes"], dimension),
        "encoder_blocks": _per_stage(blocks, stages),
        "decoder_blocks": _per_stage(kwargs["n_conv_per_stage_decoder"], stages - 1),
        "mixer": kwargs.get("mixer", "mamba"),
        "options": kwargs.get("options", {}),
    }
    return from_plain(NetworkSpec, plain, what=what, error=PlanError)


def _per_axis(stages: list[Any], dimension: int) -> list[list[int]]:
    return [[s] * dimension if isinstance(s, int) else list(s) for s in stages]


def _per_stage(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def _in_order(values: Mapping[str, Any]) -> list[Any]:
    return [values[key] for key in sorted(values, key=int)]
