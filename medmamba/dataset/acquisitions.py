"""DICOM series of several acquisitions as one case each, where that was asked for."""

from dataclasses import replace

from medmamba.dataset.case import Case
from medmamba.dataset.inputs import CaseListing, safe_id
from medmamba.errors import InputError
from medmamba.io import DEFAULT_GATE, Gate, is_dicom
from medmamba.io.dicom import acquisitions


def split_acquisitions(listing: CaseListing, gate: Gate = DEFAULT_GATE) -> CaseListing:
    """Replace each case that mixes acquisitions by one per acquisition, ``CASE-acq1`` and so on.

    Reads the headers of every DICOM case. A case that cannot be divided stays, to be judged as it
    is.

    Raises:
        EnvironmentFault: pydicom is not installed.
    """
    cases = [part for case in listing.cases for part in _split(case, gate)]
    return replace(listing, cases=tuple(sorted(cases, key=lambda case: case.id)))


def _split(case: Case, gate: Gate) -> list[Case]:
    # Several channel folders could be divided differently; they are judged as they are.
    if len(case.images) != 1 or not is_dicom(case.images[0]):
        return [case]
    try:
        names = acquisitions(case.images[0], gate)
    except InputError:
        return [case]  # reading it will say what is wrong
    return [replace(case, id=safe_id(f"{case.id}-{name}"), acquisition=name) for name in names] or [
        case
    ]
