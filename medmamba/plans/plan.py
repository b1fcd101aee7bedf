"""The plan: every decision about a dataset and a network, typed, with the reason for each.

A plan is a tree; each layer is handed its branch and never the whole. How plans are written to
disk is in ``medmamba.plans.nnunet_schema``.
"""

from dataclasses import dataclass

from medmamba.files import RECORD_CONFIG
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.preprocessing.recipe import ChannelStatistics, PreprocessingRecipe
from medmamba.training.recipe import TrainingRecipe
from medmamba.volume import Grid

PLAN_VERSION = 1
"""Raised whenever a plan written before could be read wrongly."""


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One decision, for people.

    Args:
        topic: what was decided, with the configuration where it differs by it.
        value: what it came to.
        why: the rule and the figures it was applied to.
    """

    __pydantic_config__ = RECORD_CONFIG

    topic: str
    value: str
    why: str


@dataclass(frozen=True, kw_only=True)
class ConfigurationPlan:
    """One resolution at which a network can be trained.

    Args:
        median_shape: median case at this spacing, in working order.
        data_identifier: name of the preprocessed data in nnU-Net's folders.
        memory_bytes: estimated training memory; None where nnU-Net's rule of thumb was used.
        previous_stage: configuration whose predictions are an input (cascade).
        next_stage: configuration that takes this one's predictions.
    """

    __pydantic_config__ = RECORD_CONFIG

    grid: Grid
    preprocessing: PreprocessingRecipe
    network: NetworkSpec
    training: TrainingRecipe
    median_shape: tuple[int | float, ...]
    data_identifier: str
    memory_bytes: int | None = None
    previous_stage: str | None = None
    next_stage: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything decided about one dataset and one network.

    Args:
        plans_name: name of the plan in nnU-Net's folders.
        planner: name of the nnU-Net planner whose rules were used.
        network: name of the preset the plan was made from.
        reader: nnU-Net's name of the class that reads the images.
        transpose_forward: working axis -> axis of the raw image.
        median_spacing_mm: median of the raw cases, in working order.
        median_shape: median of the cropped raw cases, in working order.
        intensities: foreground statistics per channel, from the fingerprint.
    """

    __pydantic_config__ = RECORD_CONFIG

    dataset_name: str
    plans_name: str
    planner: str
    network: str
    configurations: dict[str, ConfigurationPlan]
    label_map: LabelMap
    channel_names: tuple[str, ...]
    file_ending: str
    reader: str
    transpose_forward: tuple[int, int, int]
    median_spacing_mm: tuple[float, float, float]
    median_shape: tuple[int, int, int]
    intensities: tuple[ChannelStatistics, ...]
    fingerprint_hash: str = ""
    reasons: tuple[Reason, ...] = ()
    version: int = PLAN_VERSION
