"""Cases of a BIDS folder: ``sub-*/[ses-*/]anat/sub-*_T1w.nii.gz`` and the like.

Names follow the Brain Imaging Data Structure 1.10: entities ``key-value`` joined by ``_``, then a
suffix that names the modality. A case is what shares all entities.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medmamba.errors import UsageError

DESCRIPTION_FILE = "dataset_description.json"
DATATYPES = ("anat", "pet", "ct")
"""Folders of images that are one volume; time series and diffusion are none."""
NO_IMAGE = ("mask", "dseg", "probseg", "defacemask", "events", "photo")
NAME = re.compile(
    r"(?P<entities>sub-[A-Za-z0-9]+(_[a-z]+-[A-Za-z0-9]+)*)_(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?"
)
SUFFIXES = {
    "t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "t2flair": "FLAIR",
    "pd": "PDw", "pdw": "PDw", "t2star": "T2starw", "ct": "ct", "pet": "pet",
}  # fmt: skip
"""What channels are called -> suffix; letters and digits only, lower case."""


@dataclass(frozen=True, kw_only=True)
class BidsCase:
    """Images that share all entities.

    Args:
        name: the entities, such as ``sub-01_ses-2``.
        images: one per modality asked for, in that order.
        problem: which modality is not there; empty when all are.
    """

    name: str
    images: tuple[Path, ...]
    problem: str = ""


def is_bids(folder: Path) -> bool:
    """Whether a folder holds subjects with images in BIDS's places."""
    return next(_images(folder), None) is not None


def find_bids_cases(folder: Path, modalities: Sequence[str], channels: int) -> list[BidsCase]:
    """List the cases of a BIDS folder, sorted by name.

    Args:
        folder: with ``sub-*`` folders.
        modalities: suffixes such as ``T1w``, or what the channels of a model are called; empty
            where nobody says.
        channels: files per case.

    Raises:
        UsageError: it cannot be told which images are meant.
    """
    groups: dict[str, dict[str, Path]] = {}
    for path in _images(folder):
        match = NAME.fullmatch(path.name)
        assert match is not None
        groups.setdefault(match["entities"], {})[match["suffix"]] = path
    present = sorted({suffix for files in groups.values() for suffix in files})
    wanted = _wanted(modalities, present, channels)
    cases = []
    for name, files in sorted(groups.items()):
        missing = [suffix for suffix in wanted if suffix not in files]
        images = tuple(files[suffix] for suffix in wanted if suffix in files)
        cases.append(BidsCase(name=name, images=images, problem=", ".join(missing)))
    # Sessions without any of the images meant are no cases; those with some are incomplete ones.
    return [case for case in cases if case.images]


def _images(folder: Path) -> Iterator[Path]:
    for subject in sorted(folder.glob("sub-*")):
        for datatype in DATATYPES:
            places = (subject / datatype, *sorted(subject.glob(f"ses-*/{datatype}")))
            for place in filter(Path.is_dir, places):
                for path in sorted(place.iterdir()):
                    match = NAME.fullmatch(path.name)
                    if match is not None and match["suffix"] not in NO_IMAGE:
                        yield path


def _wanted(modalities: Sequence[str], present: list[str], channels: int) -> tuple[str, ...]:
    known = {suffix.lower(): suffix for suffix in present}
    keys = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in modalities]
    wanted = [known.get(key) or SUFFIXES.get(key, "") for key in keys]
    if len(wanted) == channels and all(suffix in present for suffix in wanted):
        return tuple(wanted)
    if channels == 1 and len(present) == 1:
        return (present[0],)
    asked = f" called {', '.join(modalities)}" if modalities else ""
    raise UsageError(
        f"the BIDS folder holds {', '.join(present)}; the model takes {channels} "
        f"{'image' if channels == 1 else 'images'}{asked}. Say which with --bids-suffix "
        f"{','.join(present[:channels])}."
    )
