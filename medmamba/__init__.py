"""medmamba: nnU-Net-style 3D medical image segmentation with Mamba networks that run anywhere.

The four verbs of the command line are functions here::

    import medmamba

    medmamba.plan("Dataset004_Hippocampus", "work", network="lightm_unet_s")
    medmamba.train("work", network="lightm_unet_s", fold=0, max_time=1200)
    medmamba.predict("images", "masks", "work/runs/lightm_unet_s/3d_fullres/fold_0")
    medmamba.evaluate("labels", "masks")

``medmamba.select`` makes one model of all folds, ``medmamba.compare`` holds networks against each
other. Names are loaded on first use, so that ``import medmamba`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmamba.bundle import Bundle
    from medmamba.dataset import Dataset
    from medmamba.errors import MedMambaError
    from medmamba.labels import LabelMap
    from medmamba.pipeline.comparing import compare
    from medmamba.pipeline.evaluating import evaluate
    from medmamba.pipeline.planning import plan
    from medmamba.pipeline.predicting import predict
    from medmamba.pipeline.selecting import select
    from medmamba.pipeline.training import train
    from medmamba.plans.fingerprint import Fingerprint
    from medmamba.plans.plan import Plan
    from medmamba.volume import Geometry, Grid, Volume

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "medmamba.bundle",
    "Dataset": "medmamba.dataset",
    "Fingerprint": "medmamba.plans.fingerprint",
    "Geometry": "medmamba.volume",
    "Grid": "medmamba.volume",
    "LabelMap": "medmamba.labels",
    "MedMambaError": "medmamba.errors",
    "Plan": "medmamba.plans.plan",
    "Volume": "medmamba.volume",
    "compare": "medmamba.pipeline.comparing",
    "evaluate": "medmamba.pipeline.evaluating",
    "plan": "medmamba.pipeline.planning",
    "predict": "medmamba.pipeline.predicting",
    "select": "medmamba.pipeline.selecting",
    "train": "medmamba.pipeline.training",
}

__all__ = [
    "Bundle",
    "Dataset",
    "Fingerprint",
    "Geometry",
    "Grid",
    "LabelMap",
    "MedMambaError",
    "Plan",
    "Volume",
    "__version__",
    "compare",
    "evaluate",
    "plan",
    "predict",
    "select",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'medmamba' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
