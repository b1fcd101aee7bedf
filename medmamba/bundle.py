"""The deployable model: a folder of weights, plan and manifest that can be checked and trusted.

::

    model/  manifest.json  plan.json  weights/fold_<k>.safetensors  reference.json
            parity.json  postprocessing.json  CARD.md  SHA256SUMS
    model/  manifest.json  members/<name>/...  postprocessing.json  CARD.md  SHA256SUMS

The second form is an ensemble of bundles of the first. Nothing in either is code, nothing is
unpickled, and every byte that is used is hashed first. Reading the manifest does not import torch;
building networks does.
"""

from medmamba.bundling.manifest import (
    MANIFEST_FILE,
    MODEL_FOLDER,
    LabelEntry,
    Manifest,
    WeightsEntry,
    find_bundle,
    read_manifest,
)
from medmamba.bundling.reading import (
    Bundle,
    load_bundle,
    load_expected,
    load_networks,
    load_previous_networks,
    verify_bundle,
)
from medmamba.bundling.writing import save_bundle, save_ensemble

__all__ = [
    "MANIFEST_FILE",
    "MODEL_FOLDER",
    "Bundle",
    "LabelEntry",
    "Manifest",
    "WeightsEntry",
    "find_bundle",
    "load_bundle",
    "load_expected",
    "load_networks",
    "load_previous_networks",
    "read_manifest",
    "save_bundle",
    "save_ensemble",
    "verify_bundle",
]
