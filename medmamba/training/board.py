"""What a run's log gets, for TensorBoard too. The only door to it."""

from pathlib import Path
from typing import Any

from medmamba.errors import EnvironmentFault
from medmamba.training.progress import RunLog

FOLDER = "tensorboard"

EPOCH_SCALARS = (
    "loss", "validation_loss", "dice", "ema_dice", "learning_rate", "gradient_norm",
    "patches_per_s", "memory_gb",
)  # fmt: skip
STEP_SCALARS = ("loss", "lr", "gradient_norm")


def require_tensorboard() -> None:
    """Refuse to begin a run that could not write for TensorBoard.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401, TID251
    except ImportError as error:
        raise EnvironmentFault(
            "--tensorboard: TensorBoard is not installed. Install it with "
            "`pip install medmamba[tensorboard]`, or leave the option away: curves.png and "
            "log.jsonl are always written.",
            code="E_NO_TENSORBOARD",
        ) from error


class BoardLog:
    """A run's log that hands numbers on to TensorBoard.

    Args:
        log: which gets every row.
        folder: where TensorBoard's files go.
        first: iteration the run begins or goes on with; what an interrupted run wrote behind it
            is hidden.
    """

    def __init__(self, log: RunLog, folder: Path, *, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: TID251

        self._log = log
        self._writer: Any = SummaryWriter(str(folder), purge_step=first)

    def write(self, row: dict[str, Any]) -> None:
        """See ``RunLog``; steps and epochs lie on one axis, iterations."""
        self._log.write(row)
        kind = row.get("kind")
        names = {"step": STEP_SCALARS, "epoch": EPOCH_SCALARS}.get(str(kind), ())
        values = {f"{kind}/{name}": row.get(name) for name in names}
        values |= {f"dice/{name}": v for name, v in (row.get("dice_per_class") or {}).items()}
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, row["iteration"])

    def sync(self) -> int:
        """See ``RunLog``."""
        self._writer.flush()
        return self._log.sync()

    def close(self) -> None:
        """See ``RunLog``."""
        self._writer.close()
        self._log.close()
