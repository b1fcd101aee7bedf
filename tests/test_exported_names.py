"""The public surface: what ``import medmamba`` offers, and what it costs."""

import subprocess
import sys

import medmamba


def test_every_name_can_be_loaded():
    for name in medmamba.__all__:
        assert getattr(medmamba, name) is not None


def test_the_surface_is_pinned():
    assert medmamba.__all__ == [
        "Bundle", "Dataset", "Fingerprint", "Geometry", "Grid", "LabelMap", "MedMambaError", "Plan",
        "Volume", "__version__", "compare", "evaluate", "plan", "predict", "select", "train",
    ]  # fmt: skip


def test_importing_the_package_imports_nothing_else():
    code = "import sys, medmamba; print([n for n in sys.modules if n.startswith('medmamba')])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "['medmamba']"
