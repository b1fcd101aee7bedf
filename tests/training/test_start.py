"""A run that begins with given weights: they are used, kept fixed as long as asked, recorded."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medmamba.errors import CheckpointError
from medmamba.networks.pretrained import frozen_parameters
from medmamba.networks.spec import NetworkSpec
from medmamba.training.checkpoint import prediction_weights
from medmamba.training.start import Start
from medmamba.training.trainer import TrainingSetup, train_fold

SWIN = NetworkSpec(
    name="swin_umamba_3d",
    in_channels=1,
    out_channels=3,
    patch_size=(8, 16, 16),
    features=(8, 8, 8),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernel_sizes=((3, 3, 3),) * 3,
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1),
)
WATCHED = "vssm_encoder.layers.0.blocks.0.self_attention.in_proj.weight"
EMBEDDING = "vssm_encoder.patch_embed.proj.weight"
VALUE = 0.05


def fill(network: nn.Module) -> dict[str, Any]:
    for name in (WATCHED, EMBEDDING):
        nn.init.constant_(network.get_parameter(name), VALUE)
    return {"loaded": [WATCHED]}


def swin_setup(make_setup: Any, epochs: int, frozen_epochs: int, **changes: Any) -> TrainingSetup:
    recipe = {
        "epochs": epochs, "iterations": 1, "validation_iterations": 1, "optimizer": "adamw",
        "weight_averaging": 0.9,
    }  # fmt: skip
    start = Start(
        source="weights.pth",
        identity=("hash",),
        fill=fill,
        frozen=frozen_parameters,
        frozen_epochs=frozen_epochs,
    )
    return make_setup(recipe=recipe, network=SWIN, start=start, **changes)


def weights(setup: TrainingSetup) -> dict[str, Tensor]:
    return prediction_weights(train_fold(setup).latest)


def test_encoder_stays_as_given_while_frozen_and_the_rest_learns(make_setup: Any) -> None:
    setup = swin_setup(make_setup, epochs=1, frozen_epochs=1)
    trained = weights(setup)
    assert torch.equal(trained[WATCHED], torch.full_like(trained[WATCHED], VALUE))
    embedding = trained[EMBEDDING]
    assert not torch.equal(embedding, torch.full_like(embedding, VALUE)), "it is never frozen"
    assert json.loads((setup.run_folder / "start.json").read_text()) == {"loaded": [WATCHED]}


def test_encoder_learns_from_the_epoch_it_is_released(make_setup: Any) -> None:
    trained = weights(swin_setup(make_setup, epochs=2, frozen_epochs=1))
    assert not torch.equal(trained[WATCHED], torch.full_like(trained[WATCHED], VALUE))


def test_run_resumes_with_the_start_it_had_only(make_setup: Any) -> None:
    setup = swin_setup(make_setup, epochs=2, frozen_epochs=1)
    train_fold(setup)
    with pytest.raises(CheckpointError, match="its start is"):
        train_fold(replace(setup, start=None), resume=True)
    with pytest.raises(CheckpointError, match="its start is"):
        train_fold(replace(setup, start=replace(setup.start, identity=("other",))), resume=True)
    train_fold(setup, resume=True)


@pytest.mark.parametrize(("epochs", "frozen"), [(1000, 10), (4000, 10), (250, 2), (20, 0)])
def test_encoder_is_frozen_for_the_official_share_of_a_run(epochs: int, frozen: int) -> None:
    start = Start(source="w", identity=(), fill=fill, frozen=frozen_parameters)
    assert start.epochs_frozen(epochs) == frozen
