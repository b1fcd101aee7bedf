"""The knobs of training, as one value stored in the plan and in every run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from medmamba.files import RECORD_CONFIG

LossOption = bool | int | float | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How one fold is trained. Defaults are nnU-Net's.

    Args:
        batch_size: patches per optimiser step.
        cpu_batch_size: upper limit of ``batch_size`` when training on a CPU, where steps are
            few and small batches make more of them; None means no limit.
        optimizer: ``sgd`` (Nesterov), ``adam`` (L2 decay) or ``adamw`` (decoupled decay).
        schedule: ``poly`` (power 0.9) or ``cosine``; laid out per epoch, or over the time budget.
        warmup_fraction: part of the run over which the learning rate rises linearly.
        epochs, iterations: length when no time budget is given.
        loss: key of ``medmamba.training.losses.LOSSES``.
        loss_options: the loss's own options, checked by the loss.
        deep_supervision: use the network's lower-resolution outputs where it has them.
        batch_dice: sum Dice over the batch before dividing.
        oversample_foreground: fraction of a batch whose patches are centred on foreground.
        gradient_clip: L2 norm.
        augmentation: ``default``, ``strong`` or ``none``.
        mirror_axes: spatial axes that may be flipped, in training and in prediction.
        dummy_2d: augment the first axis apart; None decides by anisotropy (ratio above 3).
        weight_averaging: decay per step of an exponential mean of the weights, which validation
            and prediction then use; 0 turns it off. Helps schedules of a few hundred steps.
    """

    __pydantic_config__ = RECORD_CONFIG

    batch_size: int
    cpu_batch_size: int | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = 1e-2
    weight_decay: float = 3e-5
    momentum: float = 0.99
    adam_eps: float = 1e-8
    decay_ssm: bool = True
    schedule: Literal["poly", "cosine"] = "poly"
    final_learning_rate: float = 0.0
    warmup_fraction: float = 0.0
    epochs: int = 1000
    iterations: int = 250
    validation_iterations: int = 50
    loss: str = "dice_ce"
    loss_options: Mapping[str, LossOption] = field(default_factory=dict)
    deep_supervision: bool = True
    batch_dice: bool = False
    oversample_foreground: float = 0.33
    gradient_clip: float = 12.0
    augmentation: Literal["default", "strong", "none"] = "default"
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    dummy_2d: bool | None = None
    weight_averaging: float = 0.0
