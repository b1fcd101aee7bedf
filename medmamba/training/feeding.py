"""What feeds the steps of a fold: its batches, their size, and the seeds of its network."""

import numpy as np
import torch

from medmamba.preprocessing.store import CaseStore, PreviousStore
from medmamba.training.draws import preset_of
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.sampling import PatchSampler, SamplingSettings, Stream
from medmamba.training.setup import TrainingSetup


def make_sampler(
    setup: TrainingSetup, stream: Stream, *, batch_size: int, device: torch.device
) -> PatchSampler:
    """Return what makes the batches of training or validation, on a device.

    Raises:
        TrainingError: the split has no cases for it.
    """
    training, folder = stream is Stream.TRAINING, setup.previous_folder
    settings = SamplingSettings(
        patch_size=setup.grid.patch_size,
        batch_size=batch_size,
        oversample_foreground=setup.recipe.oversample_foreground,
        preset=preset_of(setup.recipe.augmentation if training else "none"),
        mirror_axes=setup.recipe.mirror_axes,
        dummy_2d=setup.recipe.dummy_2d,
        outside_is_zero_channels=setup.outside_is_zero_channels,
        previous_values=() if folder is None else setup.label_map.foreground_values,
        device=str(device),
    )
    return PatchSampler(
        CaseStore(setup.store_folder).open,
        setup.split.train if training else setup.split.validation,
        settings,
        seed=setup.seed,
        stream=stream,
        open_previous=None if folder is None else PreviousStore(folder).open,
    )


def batch_size_on(recipe: TrainingRecipe, device: torch.device) -> int:
    """Return the patches per step: the plan's, or on a CPU at most the recipe's limit."""
    if device.type == "cpu" and recipe.cpu_batch_size is not None:
        return min(recipe.batch_size, recipe.cpu_batch_size)
    return recipe.batch_size


def model_seed(seed: int, number: int, rank: int = 0) -> int:
    """Return the seed of the network's random numbers.

    Every step has its own, so that stochastic depth needs no stored random state.

    Args:
        seed: of the run.
        number: 0 for fresh weights, then one more than the iteration.
        rank: of this process in its team.
    """
    ranked = (rank,) if rank else ()
    sequence = np.random.SeedSequence((seed, int(Stream.MODEL), number, *ranked))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
