"""Every network trains a step from the plan of real data, in float32 and under bf16 autocast."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medmamba.dataset import Dataset, open_dataset
from medmamba.dataset.case import load_case
from medmamba.networks import NETWORKS, build_network
from medmamba.plans.budget import Budget
from medmamba.plans.fingerprint import Fingerprint, compute_fingerprint
from medmamba.plans.plan import ConfigurationPlan, Plan
from medmamba.plans.planner import make_plan
from medmamba.plans.presets import load_preset, preset_names
from medmamba.preprocessing.pipeline import preprocess_case
from medmamba.preprocessing.store import CaseStore
from medmamba.training.draws import preset_of
from medmamba.training.sampling import Batch, PatchSampler, SamplingSettings, Stream
from medmamba.training.stepping import Stepper

DATASETS = {
    "isotropic": ("Dataset004_Hippocampus", "3d_fullres"),
    "flat": ("Dataset018_NucleiFluo", "2d"),
    "anisotropic": ("Dataset105_MouseBrainThick", "3d_fullres"),
}
MAMBA_GB = 8.0

VARIANTS = [
    (kind, name)
    for kind, (_, configuration) in DATASETS.items()
    for name in preset_names()
    if int(configuration[0]) in NETWORKS[name].dimensions
]


@pytest.fixture(scope="module")
def measured(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Dataset, Fingerprint]]:
    """Dataset and fingerprint by kind, each measured once."""
    known: dict[str, tuple[Dataset, Fingerprint]] = {}

    def measure(kind: str) -> tuple[Dataset, Fingerprint]:
        if kind not in known:
            raw = open_dataset(data_dir / DATASETS[kind][0])
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = raw, compute_fingerprint(raw, workers=1, folder=folder)
        return known[kind]

    return measure


def plan_of(measured: tuple[Dataset, Fingerprint], name: str) -> Plan:
    raw, fingerprint = measured
    return make_plan(fingerprint, raw.description, load_preset(name), Budget(memory_gb=MAMBA_GB))


def real_batch(raw: Dataset, plan: Plan, branch: ConfigurationPlan, folder: Path) -> Batch:
    """One augmented patch of the first case, as training would draw it."""
    case = raw.training_cases[0]
    image, labels, _ = load_case(case)
    prepared = preprocess_case(
        image,
        labels,
        grid=branch.grid,
        recipe=branch.preprocessing,
        label_map=plan.label_map,
    )
    store = CaseStore(folder)
    store.write(case.id, prepared, key="k", patch_size=branch.grid.patch_size)
    settings = SamplingSettings(
        patch_size=branch.grid.patch_size,
        batch_size=1,
        oversample_foreground=1.0,
        preset=preset_of("default"),
        mirror_axes=branch.training.mirror_axes,
        dummy_2d=None,
        outside_is_zero_channels=(),
        device="cpu",
    )
    sampler = PatchSampler(store.open, [case.id], settings, seed=0, stream=Stream.TRAINING)
    return sampler.batch(0)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), VARIANTS)
def test_every_network_trains_a_step_from_a_real_plan(
    measured: Callable[[str], tuple[Dataset, Fingerprint]], tmp_path: Path, kind: str, name: str
) -> None:
    raw, _ = measured(kind)
    plan = plan_of(measured(kind), name)
    branch = plan.configurations[DATASETS[kind][1]]
    batch = real_batch(raw, plan, branch, tmp_path)
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        stepper = Stepper(
            build_network(branch.network),
            branch.training,
            plan.label_map,
            device=torch.device("cpu"),
            precision=precision,
        )
        # Evaluation keeps the branches that training drops at random.
        stepper.network.eval()
        outcome = stepper.train(batch, 1e-4, 0)
        assert outcome.applied, precision
        untouched = {
            key.rpartition(".")[0]
            for key, parameter in stepper.network.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        }
        with torch.no_grad():
            outputs = stepper.network(batch.data)
        # The head of the lowest resolution has weight 0 in nnU-Net's deep supervision.
        several = isinstance(outputs, list) and len(outputs) > 1
        assert len(untouched) == several, untouched


def test_network_of_many_stages_is_planned_for_small_volumes(
    measured: Callable[[str], tuple[Dataset, Fingerprint]],
) -> None:
    plan = plan_of(measured("isotropic"), "swin_umamba_3d")
    spec = plan.configurations["3d_fullres"].network
    assert spec.patch_size == (40, 56, 40)
    assert spec.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
