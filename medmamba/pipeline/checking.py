"""check(): the input gate alone, for images to predict. No torch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba.dataset import Case, CaseListing, load_case, split_acquisitions
from medmamba.dataset.manifest import open_cases
from medmamba.errors import GeometryError, InputError
from medmamba.files import RECORD_CONFIG
from medmamba.inference.records import without_folders
from medmamba.io import DEFAULT_GATE, Finding, Gate, check_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """What the gate says of one case.

    Args:
        case_id: name of the case.
        errors: why it would be rejected, as ``CODE: text``; empty when it would be taken.
        warnings: what would be noted in its record.
    """

    __pydantic_config__ = RECORD_CONFIG

    case_id: str
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether it would be predicted."""
        return not self.errors


def check(
    images: Path | str,
    *,
    model: Path | str | None = None,
    gate: Gate = DEFAULT_GATE,
    root: Path | str | None = None,
    follow_links: bool = False,
    split: bool = False,
    bids_suffixes: Sequence[str] = (),
) -> tuple[CheckedCase, ...]:
    """Judge images as ``predict`` would, without predicting.

    Args:
        images: an image, a folder, or a list file.
        model: a model folder, whose channels cases must then have; without one every file is
            judged by itself.
        gate: limits and permissions of reading.
        root: folder that the paths of a list are relative to; the list's own when None.
        follow_links: take images outside the input folder, through links or a list's paths.
        split: judge every acquisition of a DICOM series that mixes several by itself.
        bids_suffixes: which images of a BIDS folder are meant, one per channel.

    Raises:
        UsageError: no image there.
        BundleError, SecurityError: the model cannot be used or trusted.
    """
    channels, dimension, ending = max(1, len(bids_suffixes)), 3, None
    names: tuple[str, ...] = ()
    if model is not None:
        from medmamba.bundle import load_bundle

        bundle = load_bundle(Path(model))
        names, ending = bundle.manifest.channels, bundle.plan.file_ending or None
        channels = len(names)
        dimension = bundle.configuration.grid.dimension
    listing = open_cases(
        Path(images), channels=channels, file_ending=ending, stream=False,
        root=None if root is None else Path(root), follow_links=follow_links,
        modalities=bids_suffixes or names,
    )  # fmt: skip
    assert isinstance(listing, CaseListing)  # nothing is streamed
    if split:
        listing = split_acquisitions(listing, gate)
    if left_out := listing.describe_ignored():
        logger.warning("%s", left_out)
    judged = [
        _check_files(case, gate)
        if model is None
        else check_case(case, channels, dimension, gate=gate, channel_names=names)
        for case in listing.cases
    ]
    rejected = [
        CheckedCase(case_id=item.id, errors=(f"{item.code}: {item.message}",))
        for item in listing.rejected
    ]
    return tuple(sorted((*judged, *rejected), key=lambda item: item.case_id))


def _check_files(case: Case, gate: Gate) -> CheckedCase:
    found = [finding for path in case.images for finding in check_file(path, gate=case.gate(gate))]
    texts = [(finding, _text(finding, case)) for finding in found]
    return CheckedCase(
        case_id=case.id,
        errors=tuple(text for finding, text in texts if finding.code.startswith("E_")),
        warnings=tuple(text for finding, text in texts if not finding.code.startswith("E_")),
    )


def check_case(
    case: Case,
    channels: int,
    dimension: int,
    *,
    gate: Gate = DEFAULT_GATE,
    channel_names: Sequence[str] = (),
) -> CheckedCase:
    """Read a case as ``predict`` would for a model of so many channels and dimensions."""
    try:
        _, _, header = load_case(
            case,
            channels=channels,
            dimension=dimension,
            gate=case.gate(gate),
            channel_names=channel_names,
        )
    except (InputError, GeometryError) as error:
        found = Finding(code=error.code, message=error.message)
        return CheckedCase(case_id=case.id, errors=(_text(found, case),))
    return CheckedCase(case_id=case.id, warnings=tuple(header.warnings))


def _text(finding: Finding, case: Case) -> str:
    """The finding without the folders above the file, as in records."""
    return f"{finding.code}: {without_folders(finding.message, case.images)}"
