"""What a reader remembers of a file besides its voxels, and the limits of the input gate.

Enough to write labels onto the same grid, and what was noticed on the way in. No readers here.
"""

from dataclasses import dataclass

from medmamba.files import RECORD_CONFIG
from medmamba.volume import Geometry


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing noticed about a file.

    Args:
        code: ``E_...`` when the file cannot be trusted, ``W_...`` when it can with care,
            ``N_...`` when it is only worth noting.
        message: the value found and what was done or should be done.
    """

    __pydantic_config__ = RECORD_CONFIG

    code: str
    message: str

    @property
    def is_error(self) -> bool:
        """Whether the file must be rejected."""
        return self.code.startswith("E_")

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Limits and permissions of the input gate.

    Args:
        max_voxels: largest number of values a file may claim.
        max_bytes: largest decoded size, or None for no limit besides ``max_voxels``.
        assume_identity: accept files that do not say where their voxels are, as axis-aligned.
        strict: reject every tilted grid, and values that no image of its kind has.
        straighten: resample images with tilted axes to right angles.
        min_spacing_mm: smallest plausible voxel size.
        max_spacing_mm: largest plausible voxel size.
        acquisition: which part of a DICOM series of several acquisitions is meant, by the name
            that ``dicom_split`` gives it; empty for the whole.
    """

    __pydantic_config__ = RECORD_CONFIG

    max_voxels: int = 2_000_000_000
    max_bytes: int | None = None
    assume_identity: bool = False
    strict: bool = False
    straighten: bool = True
    min_spacing_mm: float = 0.01
    max_spacing_mm: float = 50.0
    acquisition: str = ""


DEFAULT_GATE = Gate()
TRAINING_GATE = Gate(
    assume_identity=True, straighten=False, min_spacing_mm=1e-9, max_spacing_mm=1e9
)
"""Training compares voxels by index and knows no millimetres: a file without a coded position and
microscopy at any scale are usable; verification warns of both."""


@dataclass(frozen=True, kw_only=True)
class ItkFields:
    """Geometry as ITK states it: axes (x, y, z), left-posterior-superior millimetres."""

    __pydantic_config__ = RECORD_CONFIG

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SourceHeader:
    """Where an image came from, as far as writing labels onto its grid needs it.

    Args:
        format: ``nifti``, ``itk``, ``picture`` or ``tiff``: the module that reads and writes it.
        suffix: file ending with its dot, such as ``.nii.gz``.
        dimension: 2 when the file is a plane, else 3.
        geometry: the grid of the file.
        channels: values per voxel in the file.
        stored_type: voxel type in the file, such as ``int16``.
        nifti_header: hexadecimal bytes of the little-endian NIfTI header without its free text, so
            that transforms, codes and units are written back bit for bit; empty for other formats.
        itk: geometry in ITK's terms for its formats.
        straightened: right-angled grid that the image was resampled to, for tilted files only.
        axis_order: for each axis of the turned image, the axis (D, H, W) of the file it came from.
        axis_flips: which axes of the turned image run backwards.
        warnings: what was noticed, as ``CODE: text``.
    """

    __pydantic_config__ = RECORD_CONFIG

    format: str
    suffix: str
    dimension: int
    geometry: Geometry
    channels: int = 1
    stored_type: str = ""
    nifti_header: str = ""
    itk: ItkFields | None = None
    straightened: Geometry | None = None
    axis_order: tuple[int, ...] = (0, 1, 2)
    axis_flips: tuple[bool, ...] = (False, False, False)
    warnings: tuple[str, ...] = ()

    @property
    def warning_codes(self) -> tuple[str, ...]:
        """The codes of ``warnings`` alone."""
        return tuple(warning.split(":", 1)[0] for warning in self.warnings)
