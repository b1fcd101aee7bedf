import re
import subprocess
import sys
from pathlib import Path

import pytest

from medmamba.errors import PlanError, UsageError
from medmamba.networks.registry import NETWORKS
from medmamba.plans.presets import load_preset, preset_names, presets_folder, read_preset
from medmamba.plans.sizing import NNUNET_PLANNERS
from medmamba.training.losses import LOSSES


def test_every_network_has_a_preset_of_its_name() -> None:
    assert set(NETWORKS) <= set(preset_names())
    for name in preset_names():
        assert load_preset(name).network in NETWORKS


@pytest.mark.parametrize("name", preset_names())
def test_presets_give_recipes_that_exist(name: str) -> None:
    preset = load_preset(name)
    assert preset.planner in NNUNET_PLANNERS
    recipe = preset.recipe(batch_size=2, batch_dice=True, dimension=2)
    assert recipe.loss in LOSSES
    assert recipe.mirror_axes == ((0, 1) if preset.mirror else ())
    assert recipe.batch_size == 2


def test_every_key_says_what_it_does() -> None:
    for path in presets_folder().rglob("*.toml"):
        for line in path.read_text().splitlines():
            if re.match(r"\w+ = ", line):
                assert re.search(r"# \S", line), f"{path.name}: {line}"


def test_presets_need_no_torch() -> None:
    code = (
        "import sys; from medmamba.plans.presets import *; "
        "[load_preset(name) for name in preset_names()]; "
        "assert 'torch' not in sys.modules and 'blosc2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'unet_9000' does not exist; choose one of .*plain_unet"):
        load_preset("unet_9000")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("network = ", "cannot be read"),
        ('network = "plain_unet"\nfoo = 1', "foo"),
        ('network = "plain_unet"\n[training]\nlearn_rate = 1.0', "'learn_rate', which cannot"),
        ('network = "plain_unet"\n[training]\nbatch_size = 8', "'batch_size', which cannot"),
    ],
)
def test_a_damaged_preset_names_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=complaint):
        read_preset(path)


def test_a_wrong_value_is_found_when_the_recipe_is_made(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('network = "plain_unet"\nmirror = false\n[training]\nschedule = "sine"')
    with pytest.raises(PlanError, match="schedule"):
        read_preset(path).recipe(batch_size=2, batch_dice=False, dimension=3)
