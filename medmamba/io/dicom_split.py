"""Acquisitions of one DICOM series that are several volumes: dynamic phases, echoes, repeats.

Only a series whose images do not fit together is divided, since scanners also count acquisitions
within one volume. The numbers tried are acquisition, time point and echo, alone before combined;
the first that leaves volumes only is taken.
"""

from collections.abc import Iterator
from itertools import combinations

from medmamba.errors import InputError
from medmamba.io.dicom_geometry import place_planes
from medmamba.io.dicom_series import Plane
from medmamba.io.header import Gate

KEYS = {"acquisition": "acq", "phase": "time", "echo": "echo"}
"""Field of a plane -> its part in the name of an acquisition."""

Parts = dict[str, tuple[Plane, ...]]


def parts_of(planes: tuple[Plane, ...], name: str, gate: Gate) -> Parts:
    """Return the planes of each acquisition, such as ``acq2`` or ``acq2-echo1``.

    Empty where the images stand together, or are at fault otherwise, or no number tells them
    apart. Where no division leaves volumes only, one that leaves some is returned, so that each
    part is judged, and rejected, by itself.
    """
    if not _are_mixed(planes, name, gate):
        return {}
    divisions = list(_divisions(planes))
    for enough in (all, any):
        for parts in divisions:
            if enough(_stands(part, name, gate) for part in parts.values()):
                return parts
    return {}


def part_of(planes: tuple[Plane, ...], name: str, gate: Gate) -> tuple[Plane, ...]:
    """Return the planes of the acquisition that ``gate`` names; all of them if it names none.

    Raises:
        InputError: the series holds no such acquisition.
    """
    if not gate.acquisition:
        return planes
    parts = parts_of(planes, name, gate)
    if gate.acquisition not in parts:
        found = ", ".join(parts) or "none that can be told apart"
        raise InputError(
            f"{name}: acquisition {gate.acquisition} is not in the series (found {found}). "
            "Start again.",
            code="E_IO_CHANGED",
        )
    return parts[gate.acquisition]


def _divisions(planes: tuple[Plane, ...]) -> Iterator[Parts]:
    varying = [key for key in KEYS if len({getattr(plane, key) for plane in planes}) > 1]
    for count in range(1, len(varying) + 1):
        for keys in combinations(varying, count):
            yield _divided(planes, keys)


def _divided(planes: tuple[Plane, ...], keys: tuple[str, ...]) -> Parts:
    groups: dict[tuple[str, ...], list[Plane]] = {}
    for plane in planes:
        groups.setdefault(tuple(getattr(plane, key) for key in keys), []).append(plane)
    ordered = sorted(groups, key=lambda numbers: [int(number or -1) for number in numbers])
    return {
        "-".join(KEYS[key] + (number or "none") for key, number in zip(keys, numbers, strict=True)):
        tuple(groups[numbers])
        for numbers in ordered
    }  # fmt: skip


def _are_mixed(planes: tuple[Plane, ...], name: str, gate: Gate) -> bool:
    # Phases that lie between each other's slices look like slices at uneven distances.
    return _problem(planes, name, gate) in ("E_DCM_MIXED", "E_DCM_GAP")


def _stands(planes: tuple[Plane, ...], name: str, gate: Gate) -> bool:
    # Single images always stand; they are what is left of a volume, and none themselves.
    return len(planes) > 1 and not _problem(planes, name, gate)


def _problem(planes: tuple[Plane, ...], name: str, gate: Gate) -> str:
    try:
        place_planes(planes, name, gate)
    except InputError as problem:
        return problem.code
    return ""
