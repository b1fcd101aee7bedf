"""Links lead somewhere, commands that are shown exist, and tables are those of the results."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from medmamba.cli.app import app
from medmamba.files import to_plain
from medmamba.networks import NETWORKS
from medmamba.networks.describe import describe_networks

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", "build", "node_modules"} & set(path.relative_to(ROOT).parts)
)
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
QUICK = ("plain_unet",)  # the others are counted by the slow tests
# What nnU-Net 2.8.1 installs, and what its argument parsers take.
NNUNET_COMMANDS = """
nnUNetv2_accumulate_crossval_results nnUNetv2_apply_postprocessing nnUNetv2_convert_MSD_dataset
nnUNetv2_convert_old_nnUNet_dataset nnUNetv2_determine_postprocessing nnUNetv2_ensemble
nnUNetv2_download_pretrained_model_by_url nnUNetv2_evaluate_folder nnUNetv2_evaluate_simple
nnUNetv2_export_model_to_zip nnUNetv2_extract_fingerprint nnUNetv2_find_best_configuration
nnUNetv2_install_pretrained_model_from_zip nnUNetv2_move_plans_between_datasets
nnUNetv2_plan_and_preprocess nnUNetv2_plan_experiment nnUNetv2_plot_overlay_pngs nnUNetv2_predict
nnUNetv2_predict_from_modelfolder nnUNetv2_preprocess nnUNetv2_train
"""
NNUNET_FLAGS = """
--verbose --no_pbar -d -fpe -np --verify_dataset_integrity --clean -pl -gpu_memory_target
-preprocessor_name -overwrite_target_spacing -overwrite_plans_name -plans_name -c -npfp --no_pp
-tr -p -pretrained_weights -num_gpus --npz --c --val --val_best --disable_checkpointing -device
-i -o -m -f -step_size --disable_tta --save_probabilities --continue_prediction -chk -npp -nps
-prev_stage_predictions --disable_progress_bar --not_on_device -num_parts -part_id
--disable_ensembling --no_overwrite -djfile -pfile --chill -l -il -ref -plans_json -dataset_json
--remove_postprocessed -pp_pkl_file --save_npz --not_strict --exp_cv_preds -channel_idx --use_raw
-overlay_intensity -s -t -sp -tp
"""
FOLDERS = "cli|docker|docs|kernels|medmamba|plans|tests"
PLACE = re.compile(rf"`((?:{FOLDERS})/[\w./-]+)`")
CODE = re.compile(r"\b[EW]_[A-Z]+(?:_[A-Z0-9]+)*\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    # my_net.py and the like are what a reader shall write.
    named = [place for place in PLACE.findall(page.read_text()) if "/my_" not in place]
    assert not [place for place in named if not (ROOT / place).exists()]


def test_tests_and_rows_that_papers_name_exist() -> None:
    page = (ROOT / "docs" / "compliance" / "risks.md").read_text()
    for place, name in re.findall(r"`(tests/[\w./]+\.py)(?:::(\w+))?`", page):
        assert (ROOT / place).is_file(), place
        assert f"def {name}" in (ROOT / place).read_text(), f"{place}::{name}"
    table = (ROOT / "tests" / "conformance" / "rows.py").read_text()
    rows = re.findall(r"\b[A-H]\d{2}\b", page)
    assert rows
    assert not [row for row in rows if f'"{row}"' not in table]


def test_every_command_and_flag_of_nnunet_has_its_line() -> None:
    page = (ROOT / "docs" / "from-nnunet.md").read_text()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    named = set(re.findall(r"(?<![\w-])(?:nnUNetv2_\w+|--?[a-z]\w*)", "\n".join(rows)))
    assert not set(f"{NNUNET_COMMANDS} {NNUNET_FLAGS}".split()) - named


def test_every_code_is_explained() -> None:
    modules = (ROOT / "medmamba").rglob("*.py")
    used = {
        code for path in modules for code in re.findall(r'"([EW]_[A-Z0-9_]+)"', path.read_text())
    }
    explained = CODE.findall((ROOT / "docs" / "errors.md").read_text())
    assert used == set(explained)
    assert len(explained) == len(set(explained))


def test_the_layers_are_those_that_are_enforced() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    (contract,) = tools["importlinter"]["contracts"]
    enforced = [row.replace("medmamba.", "") for row in contract["layers"]]
    block = re.search(r"```\n(cli .*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert block
    assert [line.split("  ")[0] for line in block[1].splitlines()] == enforced


def shown_commands() -> list[tuple[str, str, str]]:
    """(page, command, rest of the line) for every command in code of the documentation."""
    found = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        text = page.read_text()
        code = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
        for block in code:
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"\s*(?:\$ )?(medmamba )?([a-z][a-z-]*)( .*|$)", line)
                # `train --resume` in a sentence is a command too.
                if match and (match[1] or (match[2] in COMMANDS and " --" in match[3])):
                    found.append((str(page.relative_to(ROOT)), match[2], match[3]))
    return found


@pytest.mark.parametrize(("page", "command", "rest"), shown_commands())
def test_commands_and_options_exist(page: str, command: str, rest: str) -> None:
    assert command in COMMANDS, f"{page}: medmamba {command}"
    chosen = COMMANDS[command]
    first = rest.split()[0] if rest.split() else ""
    if hasattr(chosen, "commands") and first in chosen.commands:
        chosen = chosen.commands[first]
    options = {name for item in chosen.params for name in (*item.opts, *item.secondary_opts)} | {
        "--help",
        "-h",
        "--debug",
    }
    used = re.findall(r"(?<![\w-])(--?[a-z][a-z0-9-]*)", rest.split("#")[0])
    assert not [name for name in used if name not in options], f"{page}: medmamba {command}{rest}"


@pytest.fixture(scope="module")
def tables():
    path = ROOT / "cli" / "bench" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_front_page_are_those_of_the_results(tables) -> None:
    text = (ROOT / "README.md").read_text()
    assert tables.rewritten(text) == text, "run `make readme-tables`"
    changed = text.replace("| `plain_unet` | 3D |", "| `plain_unet` | 4D |")
    assert changed != text
    assert tables.rewritten(changed) == text


def test_every_network_is_in_its_table(tables) -> None:
    counted = {row["name"] for row in json.loads(tables.NETWORKS.read_text())}
    assert counted == set(NETWORKS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in sorted(NETWORKS)
    ],
)
def test_sizes_of_networks_are_as_counted(tables, name: str) -> None:
    noted = [row for row in json.loads(tables.NETWORKS.read_text()) if row["name"] == name]
    assert [to_plain(row) for row in describe_networks([name])] == noted, (
        "run `python cli/bench/readme_tables.py --networks`"
    )
