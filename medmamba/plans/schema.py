"""The JSON schema of a plan file, for editors and for programs that read plans.

``python -m medmamba.plans.schema plans/plan.schema.json`` writes it again.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from medmamba.files import write_atomic
from medmamba.labels import LabelMap
from medmamba.plans.nnunet_schema import BLOCK, RESAMPLERS, SCHEMES
from medmamba.plans.plan import PLAN_VERSION, Reason
from medmamba.preprocessing.recipe import ChannelStatistics
from medmamba.training.recipe import TrainingRecipe

TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 1}


def plan_schema() -> dict[str, Any]:
    """Return the schema of a plan on disk: nnU-Net's keys and our block."""
    spacing = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}}
    axes = {"type": "array", "items": {"enum": [0, 1, 2]}, "minItems": 3, "maxItems": 3}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "medmamba plan",
        "description": "An nnU-Net v2 plans file with one more block.",
        **_object(
            {
                "dataset_name": TEXT,
                "plans_name": TEXT,
                "original_median_spacing_after_transp": spacing,
                "original_median_shape_after_transp": _list(COUNT),
                "image_reader_writer": TEXT,
                "transpose_forward": axes,
                "transpose_backward": axes,
                "configurations": {
                    "type": "object",
                    "additionalProperties": {"anyOf": [_configuration(spacing), _inheriting()]},
                },
                "experiment_planner_used": TEXT,
                "label_manager": TEXT,
                "foreground_intensity_properties_per_channel": {
                    "type": "object",
                    "additionalProperties": _schema_of(ChannelStatistics),
                },
                BLOCK: _block(),
            }
        ),
    }


def write_schema(path: Path) -> None:
    """Write the schema.

    Raises:
        EnvironmentFault: the file cannot be written.
    """
    write_atomic(path, json.dumps(plan_schema(), indent=2) + "\n")


def _block() -> dict[str, Any]:
    training = _schema_of(TrainingRecipe)
    for key in ("batch_size", "batch_dice"):
        # These are keys of the configuration itself.
        del training["properties"][key]
    training["required"] = []
    return _object(
        {
            "version": {"const": PLAN_VERSION},
            "network": TEXT,
            "channel_names": _list(TEXT),
            "file_ending": TEXT,
            "label_map": _schema_of(LabelMap),
            "fingerprint_hash": TEXT,
            "configurations": {
                "type": "object",
                "additionalProperties": _object(
                    {"memory_bytes": {"type": ["integer", "null"]}, "training": training}
                ),
            },
            "reasons": _list(_schema_of(Reason)),
        }
    )


def _configuration(spacing: dict[str, Any]) -> dict[str, Any]:
    kinds = ("data", "seg", "probabilities")
    schema = _object(
        {
            "data_identifier": TEXT,
            "preprocessor_name": TEXT,
            "batch_size": COUNT,
            "patch_size": _list(COUNT),
            "median_image_size_in_voxels": _list({"type": "number"}),
            "spacing": spacing,
            "normalization_schemes": _list({"enum": list(SCHEMES.values())}),
            "use_mask_for_norm": _list(FLAG),
            **{f"resampling_fn_{kind}": {"enum": list(RESAMPLERS.values())} for kind in kinds},
            **{f"resampling_fn_{kind}_kwargs": {"type": "object"} for kind in kinds},
            "architecture": _architecture(),
            "batch_dice": FLAG,
        }
    )
    schema["properties"]["next_stage"] = TEXT
    return schema


def _architecture() -> dict[str, Any]:
    return _object(
        {
            "network_class_name": TEXT,
            "arch_kwargs": {
                "type": "object",
                "properties": {
                    "n_stages": COUNT,
                    "features_per_stage": _list(COUNT),
                    "kernel_sizes": _list(_list(COUNT)),
                    "strides": _list(_list(COUNT)),
                },
                "required": ["n_stages", "features_per_stage", "kernel_sizes", "strides"],
            },
            "_kw_requires_import": _list(TEXT),
        }
    )


def _inheriting() -> dict[str, Any]:
    return _object({"inherits_from": TEXT, "previous_stage": TEXT})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _schema_of(kind: type[Any]) -> dict[str, Any]:
    schema: dict[str, Any] = TypeAdapter(kind).json_schema()
    schema.pop("description", None)
    return schema


if __name__ == "__main__":
    write_schema(Path(sys.argv[1]))
