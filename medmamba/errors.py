"""The exception tree. Every error a user can cause is one of these; anything else is a bug.

MedMambaError
├── DatasetError      the raw dataset is not usable as it is            exit 3
├── GeometryError     grids, spacings or affines that cannot be used    exit 3
├── PlanError         a plan is missing, damaged, or of another kind    exit 3
├── KernelError       arguments the scan operator cannot take           exit 3
├── BundleError       a model folder is missing parts or is damaged     exit 3
├── CheckpointError   a training checkpoint cannot be used              exit 3
├── InputError        one case cannot be trusted (the batch goes on)    exit 4
├── TrainingError     training had to stop (last good state is kept)    exit 1
├── EnvironmentFault  device, disk, memory or permissions               exit 6
├── SecurityError     a file is refused because it is unsafe            exit 7
└── UsageError        a command or argument that does not exist         exit 2

A message has three parts: which thing, what is wrong with the value found, what to do.
"""

from typing import ClassVar


class MedMambaError(Exception):
    """Base of all errors shown to people as one line.

    Args:
        message: which thing, the value found, what to do.
        code: stable identifier such as ``E_IO_TRUNCATED``; the class default when omitted.
    """

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "E_INTERNAL"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code


class DatasetError(MedMambaError):
    """The raw dataset is not usable as it is."""

    exit_code = 3
    default_code = "E_DATASET"


class GeometryError(MedMambaError):
    """Grids, spacings or affines that cannot be used, or do not belong together."""

    exit_code = 3
    default_code = "E_GEOM"


class PlanError(MedMambaError):
    """A plan is missing, damaged, of another version, or does not fit the request."""

    exit_code = 3
    default_code = "E_PLAN"


class KernelError(MedMambaError):
    """Arguments the scan operator cannot take, or a backend that cannot run."""

    exit_code = 3
    default_code = "E_KERNEL"


class BundleError(MedMambaError):
    """A model folder is missing parts or is damaged."""

    exit_code = 3
    default_code = "E_MODEL_FORMAT"


class CheckpointError(MedMambaError):
    """A training checkpoint is missing, damaged, or belongs to another run."""

    exit_code = 3
    default_code = "E_CHECKPOINT"


class InputError(MedMambaError):
    """One case cannot be trusted; it is rejected and the batch goes on."""

    exit_code = 4
    default_code = "E_INPUT"


class TrainingError(MedMambaError):
    """Training had to stop; the last good state is kept."""

    exit_code = 1
    default_code = "E_TRAIN"


class EnvironmentFault(MedMambaError):  # noqa: N818 EnvironmentError is a builtin
    """Device, disk, memory or permissions do not allow the run."""

    exit_code = 6
    default_code = "E_ENVIRONMENT"


class SecurityError(MedMambaError):
    """A file is refused because it is unsafe or does not match its hash."""

    exit_code = 7
    default_code = "E_MODEL_UNSAFE"


class UsageError(MedMambaError):
    """A command, option value or name that does not exist."""

    exit_code = 2
    default_code = "E_USAGE"
