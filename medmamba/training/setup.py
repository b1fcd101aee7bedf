"""What one fold is trained with, and what a finished run leaves. No torch."""

from dataclasses import dataclass
from pathlib import Path

from medmamba.dataset import Split
from medmamba.files import hash_values, to_plain
from medmamba.labels import LabelMap
from medmamba.networks.spec import NetworkSpec
from medmamba.training.recipe import TrainingRecipe
from medmamba.training.start import Start
from medmamba.volume import Grid

HASH_LENGTH = 12
_LENGTH_KEYS = ("epochs", "iterations")


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """One fold to train.

    Args:
        run_folder: where checkpoints, log and curves go.
        store_folder: preprocessed cases.
        split: cases to train on and to validate with.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        precision: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        max_time_s: budget for everything, instead of the recipe's epochs and iterations.
        deterministic: bit-exact on GPUs too; CPU runs always are.
        outside_is_zero_channels: channels normalised inside a mask, set to 0 outside it.
        extend: a resumed run may get another length than it began with.
        previous_folder: of a cascade, where the coarse network's labels of every case are.
        previous_identity: what made them.
        start: weights to begin with instead of fresh ones.
        cuda_graph: replay steps on a GPU from a CUDA graph where they fit into its memory twice.
        tensorboard: also write what the log gets for TensorBoard.
    """

    run_folder: Path
    network: NetworkSpec
    grid: Grid
    recipe: TrainingRecipe
    label_map: LabelMap
    store_folder: Path
    split: Split
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    max_time_s: float | None = None
    deterministic: bool = False
    outside_is_zero_channels: tuple[int, ...] = ()
    extend: bool = False
    previous_folder: Path | None = None
    previous_identity: str = ""
    start: Start | None = None
    cuda_graph: bool = False
    tensorboard: bool = False

    @property
    def identity(self) -> dict[str, str]:
        """What must be equal for a checkpoint to be of this run."""
        recipe = {k: v for k, v in to_plain(self.recipe).items() if k not in _LENGTH_KEYS}
        values = {
            "plan": [self.network, self.grid, self.label_map],
            "recipe": recipe,
            "split": self.split,
        }
        hashes = {k: hash_values(to_plain(v))[:HASH_LENGTH] for k, v in values.items()}
        start = {} if self.start is None else {"start": self.start.key[:HASH_LENGTH]}
        return {"network": self.network.name, **hashes, **start, "seed": str(self.seed)}

    @property
    def length(self) -> str:
        """The schedule's length in words."""
        if self.max_time_s is not None:
            return f"{self.max_time_s:g} s"
        return f"{self.recipe.epochs} epochs of {self.recipe.iterations} iterations"


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished run left.

    Args:
        epochs, iterations: done in all.
        dice: validation Dice of patches after the last epoch.
        best_dice: highest smoothed validation Dice.
        latest, best: checkpoints; see ``checkpoint.prediction_weights``.
    """

    run_folder: Path
    epochs: int
    iterations: int
    dice: float
    best_dice: float
    elapsed_s: float
    latest: Path
    best: Path
    precision: str
