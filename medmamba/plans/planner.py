"""From a fingerprint to a plan: a pure function, with nnU-Net's rules and a reason per decision.

Same fingerprint, description, preset and budget, same plan; nothing is read, timed or measured
here. Rules of Isensee et al. 2021 (nnU-Net) as its version 2 applies them; for plain and residual
U-Nets the result is nnU-Net's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from medmamba.errors import PlanError
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.plans.budget import Budget, NetworkRules, PriceList, registered_rules
from medmamba.plans.choices import (
    choose_channels,
    choose_reader,
    choose_spacing,
    choose_transpose,
    in_mm,
    median_resampled_shape,
    read_channel_names,
    transpose_reason,
)
from medmamba.plans.fingerprint import Fingerprint
from medmamba.plans.plan import ConfigurationPlan, Plan, Reason
from medmamba.plans.presets import Preset
from medmamba.plans.sizing import (
    CPU_PATCH_VOXELS,
    NNUNET_PLANNERS,
    SMALLEST_BATCH,
    CostModel,
    Request,
    Sizes,
    size_by_cost,
    size_by_memory,
)
from medmamba.preprocessing.recipe import PreprocessingRecipe
from medmamba.volume import Grid

LOWRES_PATCH_FRACTION = 0.25
"""A patch that sees less of the median case asks for a lower resolution."""

LOWRES_STEP = 1.03
"""Factor by which the spacing grows in search of it."""

LOWRES_GAIN = 2.0
"""Without this many times fewer voxels a lower resolution is not worth a network."""

CONVOLUTIONAL = {"plain_unet": False, "resenc_unet": True}
"""Networks that nnU-Net's own cost model prices; whether the encoder is residual."""

RESIDUAL_SIZES = (
    (40.0, "nnUNetPlannerResEncXL"),
    (24.0, "nnUNetPlannerResEncL"),
    (0.0, "nnUNetPlannerResEncM"),
)
"""nnU-Net's residual planners by the memory they were made for."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What every step of the planner looks at."""

    fingerprint: Fingerprint
    channel_names: tuple[str, ...]
    label_map: LabelMap
    label_entries: int
    cases: int
    preset: Preset
    budget: Budget
    planner: str
    rules: NetworkRules | None
    prices: PriceList | None
    spacing_mm: tuple[float, ...]
    transpose: tuple[int, int, int]

    @property
    def model(self) -> CostModel:
        return NNUNET_PLANNERS[self.planner]

    @property
    def memory_gb(self) -> float:
        return self.budget.memory_gb or self.preset.memory_gb or self.model.memory_gb


def make_plan(
    fingerprint: Fingerprint,
    description: Mapping[str, Any],
    preset: Preset,
    budget: Budget,
    *,
    rules: NetworkRules | None = None,
    plans_name: str | None = None,
) -> Plan:
    """Decide how a dataset is segmented with a network.

    Args:
        fingerprint: what the data are.
        description: dataset.json in nnU-Net's version 2 form.
        preset: which network, and how it is trained.
        budget: memory to plan for, and a spacing if the user wants another.
        rules: the network's constraints and price; the registry's when None.
        plans_name: name in nnU-Net's folders; the planner's own when None.

    Raises:
        PlanError: the fingerprint and the description do not fit, the network has no version for
            the dataset's dimension, or nothing fits the memory.
        DatasetError: the labels of the description are unusable.
    """
    spacing, spacing_reason = choose_spacing(fingerprint, budget)
    task = _make_task(fingerprint, description, preset, budget, rules=rules, spacing_mm=spacing)
    name = plans_name or _plans_name(task)
    configurations, reasons = _plan_configurations(task, name)
    turn = list(task.transpose)
    median_shape = np.median(fingerprint.shapes_after_crop, axis=0)[turn]
    return Plan(
        dataset_name=fingerprint.dataset_name,
        plans_name=name,
        planner=task.planner,
        network=preset.name,
        configurations=configurations,
        label_map=task.label_map,
        channel_names=task.channel_names,
        file_ending=str(description.get("file_ending", "")),
        reader=choose_reader(fingerprint, description),
        transpose_forward=task.transpose,
        median_spacing_mm=_triple(np.median(fingerprint.spacings_mm, axis=0)[turn].tolist()),
        median_shape=_triple([round(size) for size in median_shape.tolist()]),
        intensities=fingerprint.intensities,
        fingerprint_hash=fingerprint.content_hash,
        reasons=(spacing_reason, transpose_reason(spacing, task.transpose), *reasons),
    )


def _make_task(
    fingerprint: Fingerprint,
    description: Mapping[str, Any],
    preset: Preset,
    budget: Budget,
    *,
    rules: NetworkRules | None,
    spacing_mm: tuple[float, ...],
) -> _Task:
    label_map = LabelMap.from_dataset_json(dict(description))
    chosen_rules = _rules(preset, budget, label_map, rules)
    return _Task(
        fingerprint=fingerprint,
        channel_names=read_channel_names(fingerprint, description),
        label_map=label_map,
        label_entries=len(description["labels"]),
        cases=int(description.get("numTraining", len(fingerprint.spacings_mm))),
        preset=preset,
        budget=budget,
        planner=_planner_name(preset, budget),
        rules=chosen_rules,
        prices=PriceList(chosen_rules) if chosen_rules else None,
        spacing_mm=spacing_mm,
        transpose=choose_transpose(spacing_mm),
    )


def _plan_configurations(
    task: _Task, plans_name: str
) -> tuple[dict[str, ConfigurationPlan], tuple[Reason, ...]]:
    turn = list(task.transpose)
    spacing = tuple(float(v) for v in np.array(task.spacing_mm)[turn])
    median = tuple(float(v) for v in np.array(median_resampled_shape(
        task.fingerprint, task.spacing_mm))[turn])  # fmt: skip
    voxels = float(np.prod(median, dtype=np.float64) * task.cases)
    channels, reasons = choose_channels(task.fingerprint, task.channel_names)
    recipe = PreprocessingRecipe(channels=channels, transpose_forward=task.transpose)
    dimensions = task.rules.dimensions if task.rules else frozenset({2, 3})
    plans: dict[str, ConfigurationPlan] = {}
    notes: list[Reason] = list(reasons)

    def add(name: str, plan: ConfigurationPlan, sizes: Sizes) -> None:
        plans[name] = plan
        notes.extend(_size_reasons(task, name, plan, sizes))

    is_flat = median[0] == 1
    if 2 in dimensions:
        sizes = _size(task, spacing[1:], median[1:], voxels)
        add("2d", _configuration(task, recipe, spacing[1:], median[1:], sizes=sizes,
            identifier=_identifier(task, plans_name, "2d"), batch_dice=True), sizes)  # fmt: skip
    if 3 in dimensions and not is_flat:
        _plan_3d(task, recipe, plans_name, (spacing, median, voxels), add=add, notes=notes)
    if not plans:
        raise PlanError(
            f"network '{task.preset.network}': it exists in 3D only, but the dataset is 2D "
            f"(median shape {list(median)}). Choose a network with a 2D version.",
            code="E_PLAN_DIMENSION",
        )
    return plans, tuple(notes)


def _plan_3d(
    task: _Task,
    recipe: PreprocessingRecipe,
    plans_name: str,
    case: tuple[tuple[float, ...], tuple[float, ...], float],
    *,
    add: Any,
    notes: list[Reason],
) -> None:
    spacing, median, voxels = case
    full = _size(task, spacing, median, voxels)
    low, why = _search_lowres(task, spacing, median, full)
    notes.append(Reason(topic="lower resolution", value="yes" if low else "no", why=why))

    def configuration(name: str, spacing: tuple[float, ...], median: tuple[float, ...],
                      sizes: Sizes, batch_dice: bool) -> ConfigurationPlan:  # fmt: skip
        return _configuration(task, recipe, spacing, median, sizes=sizes, batch_dice=batch_dice,
            identifier=_identifier(task, plans_name, name))  # fmt: skip

    fullres = configuration("3d_fullres", spacing, median, full, low is not None)
    if low is None:
        add("3d_fullres", fullres, full)
        return
    sizes = low.size(task, confirm=True)
    lowres = configuration("3d_lowres", low.spacing_mm, low.median_shape, sizes, False)
    add("3d_lowres", replace(lowres, next_stage="3d_cascade_fullres"), sizes)
    add("3d_fullres", fullres, full)
    extra = len(task.label_map.foreground_values)
    network = replace(fullres.network, in_channels=fullres.network.in_channels + extra)
    cascade = replace(fullres, network=network, previous_stage="3d_lowres")
    add("3d_cascade_fullres", cascade, full)


@dataclass(frozen=True, kw_only=True)
class _Lowres:
    spacing_mm: tuple[float, ...]
    median_shape: tuple[int, ...]
    dataset_voxels: float

    def size(self, task: _Task, *, confirm: bool) -> Sizes:
        return _size(task, self.spacing_mm, self.median_shape, self.dataset_voxels, confirm=confirm)


def _search_lowres(
    task: _Task, spacing: tuple[float, ...], median: tuple[float, ...], full: Sizes
) -> tuple[_Lowres | None, str]:
    """Coarsen the grid until a patch sees a quarter of the median case."""
    voxels = np.prod(median, dtype=np.float64)
    seen = np.prod(full.spec.patch_size, dtype=np.float64) / voxels
    why = f"a full-resolution patch sees {seen:.0%} of the median case"
    patch_voxels, low_voxels, found = prod(full.spec.patch_size), voxels, None
    coarse = np.array(spacing)
    while patch_voxels / low_voxels < LOWRES_PATCH_FRACTION:
        fine_axes = (max(coarse) / coarse) > 2
        coarse[fine_axes if np.any(fine_axes) else slice(None)] *= LOWRES_STEP
        exact_shape = np.array(spacing) / coarse * np.array(median)
        low_voxels = np.prod(exact_shape, dtype=np.float64)
        found = _Lowres(
            spacing_mm=tuple(float(v) for v in coarse),
            median_shape=tuple(round(float(v)) for v in exact_shape),
            dataset_voxels=float(low_voxels * task.cases),
        )
        patch_voxels = prod(found.size(task, confirm=False).spec.patch_size)
    if found is None:
        return None, f"{why}; a quarter is enough"
    if voxels / low_voxels < LOWRES_GAIN:
        return None, f"{why}, but coarsening saves less than half of the voxels"
    return found, f"{why}, less than a quarter; at {in_mm(found.spacing_mm)} it sees enough"


def _size(
    task: _Task,
    spacing: tuple[float, ...],
    median: tuple[int | float, ...],
    dataset_voxels: float,
    *,
    confirm: bool = True,
) -> Sizes:
    dimension = len(spacing)
    request = Request(
        spacing_mm=spacing,
        median_shape=median,
        dataset_voxels=dataset_voxels,
        voxel_limit=CPU_PATCH_VOXELS[dimension] if task.budget.device == "cpu" else None,
        spec=NetworkSpec(
            name=task.preset.network,
            in_channels=len(task.channel_names),
            out_channels=task.label_map.output_channels,
            patch_size=(1,) * dimension,
            features=(),
            strides=(),
            kernel_sizes=(),
            encoder_blocks=(),
            decoder_blocks=(),
            mixer=task.preset.mixer,
            options=task.preset.options,
        ),
    )
    if task.rules is None or task.prices is None:
        return size_by_cost(
            request, task.model, memory_gb=task.memory_gb, classes=task.label_entries
        )
    return size_by_memory(
        request,
        task.rules,
        task.prices,
        memory_gb=task.memory_gb,
        dataset_fraction=task.model.dataset_fraction,
        confirm=confirm,
    )


def _configuration(
    task: _Task,
    recipe: PreprocessingRecipe,
    spacing: tuple[float, ...],
    median: tuple[int | float, ...],
    *,
    sizes: Sizes,
    identifier: str,
    batch_dice: bool,
) -> ConfigurationPlan:
    return ConfigurationPlan(
        grid=Grid(spacing_mm=spacing, patch_size=sizes.spec.patch_size),
        preprocessing=recipe,
        network=sizes.spec,
        training=task.preset.recipe(
            batch_size=sizes.batch_size, batch_dice=batch_dice, dimension=len(spacing)
        ),
        median_shape=median,
        data_identifier=identifier,
        memory_bytes=sizes.memory_bytes,
    )


def _size_reasons(
    task: _Task, name: str, plan: ConfigurationPlan, sizes: Sizes
) -> tuple[Reason, ...]:
    patch = plan.grid.patch_size
    limit = f"{task.memory_gb:g} GB"
    if task.budget.device == "cpu":
        limit += f" or {CPU_PATCH_VOXELS[len(patch)]} voxels on a CPU"
    why = "the median case, rounded up to what the strides divide, fits"
    if sizes.shrunk:
        why = f"{sizes.shrunk} step(s) down in the proportions of the median case, to fit {limit}"
    floor = "the floor" if plan.training.batch_size == 2 else f"what fills {task.memory_gb:g} GB"
    if sizes.capped:
        floor = f"limited to {task.model.dataset_fraction:.0%} of the dataset's voxels (at least 2)"
    strides = " ".join(_times(stage) for stage in plan.network.strides)
    if sizes.memory_bytes is None:
        memory = (
            f"{sizes.fill:.0%} of {task.memory_gb:g} GB",
            "nnU-Net's count of convolution outputs",
        )
    else:
        memory = (
            f"{sizes.memory_bytes / 1024**3:.1f} GB of {task.memory_gb:g} GB",
            "the most a training step holds at a time, weights and optimiser included",
        )
    return (
        Reason(topic=f"{name}: patch", value=_times(patch), why=why),
        Reason(topic=f"{name}: batch", value=str(plan.training.batch_size), why=floor),
        Reason(
            topic=f"{name}: strides",
            value=strides,
            why=f"{plan.network.stages} stages; axes pool together while their spacings are "
            "within a factor of 2 and a feature map keeps 4 voxels"
            if task.rules is None
            else f"{plan.network.stages} stages, as {plan.network.name} arranges them",
        ),
        Reason(topic=f"{name}: memory", value=memory[0], why=memory[1]),
    )


def _planner_name(preset: Preset, budget: Budget) -> str:
    chosen = budget.planner or preset.planner
    if chosen not in NNUNET_PLANNERS:
        raise PlanError(
            f"preset {preset.name}: planner '{chosen}' does not exist. "
            f"Choose one of {', '.join(NNUNET_PLANNERS)}."
        )
    if budget.planner is not None:
        return budget.planner
    # Each residual planner is one architecture at three sizes; memory says which one.
    sizes = {name for _, name in RESIDUAL_SIZES}
    if preset.planner in sizes and budget.memory_gb is not None:
        return next(name for least, name in RESIDUAL_SIZES if budget.memory_gb >= least)
    return preset.planner


def _plans_name(task: _Task) -> str:
    if task.rules is None:
        return task.model.plans_name
    return f"medmamba_{task.preset.name}"


def _identifier(task: _Task, plans_name: str, configuration: str) -> str:
    # Preprocessed data do not depend on the network at full resolution, and are shared; nnU-Net's
    # own planners share them even where the user asked for another spacing.
    is_ours = task.rules is not None and task.budget.spacing_mm is None
    is_shared = is_ours or (task.rules is None and task.model.residual)
    if is_shared and configuration in ("2d", "3d_fullres"):
        return f"nnUNetPlans_{configuration}"
    return f"{plans_name}_{configuration}"


def _rules(
    preset: Preset, budget: Budget, label_map: LabelMap, rules: NetworkRules | None
) -> NetworkRules | None:
    if preset.network in CONVOLUTIONAL:
        if CONVOLUTIONAL[preset.network] != NNUNET_PLANNERS[_planner_name(preset, budget)].residual:
            raise PlanError(
                f"preset {preset.name}: planner '{budget.planner or preset.planner}' does not plan "
                f"'{preset.network}'. Choose the planner of the same kind of encoder."
            )
        return None
    if rules is not None:
        return rules
    # The batch and how Dice sums over it are yet to be decided, and move little.
    recipe = preset.recipe(batch_size=SMALLEST_BATCH, batch_dice=True, dimension=3)
    return registered_rules(preset.network, recipe, label_map, on_gpu=budget.device == "cuda")


def _triple(values: list[Any]) -> tuple[Any, Any, Any]:
    first, second, third = values
    return first, second, third


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(str(size) for size in sizes)
