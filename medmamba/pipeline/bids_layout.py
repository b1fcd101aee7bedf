"""An output folder as a BIDS derivative: masks in BIDS's places, records beside them.

Masks, records and runs are written to ``OUT/medmamba`` as ever, which a validator is told to pass
over; the BIDS tree shows the finished masks under their BIDS names. So it can be made again at any
time, and whatever is in it is complete.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from medmamba import __version__
from medmamba.bundle import Manifest
from medmamba.dataset.bids import DESCRIPTION_FILE
from medmamba.files import replace_atomic, to_json, write_atomic
from medmamba.inference.records import BIDS_RECORDS, CommitRecord

BIDS_VERSION = "1.10.0"
NIFTI_SUFFIX = ".nii.gz"
BIDS_ID = re.compile(r"sub-[A-Za-z0-9]+(_[a-z]+-[A-Za-z0-9]+)*")
README = """Masks by medmamba, research use only, not a medical device.

The folder medmamba/ holds a record of every case, with hashes, warnings and reasons for cases
without a mask, and a report of every run: run/ID/report.html.
"""


class BidsLayout:
    """The BIDS tree of one output folder.

    Args:
        root: the output folder.
        manifest: of the model that makes the masks.
        source: what is predicted; a BIDS folder is named by its DOI, never by its path.
    """

    def __init__(self, root: Path, manifest: Manifest, source: Path) -> None:
        self._root = root
        self._source = source
        self._manifest = manifest
        self._description = _plain(manifest.name)
        self._table = f"desc-{self._description}_dseg.tsv"

    @property
    def records(self) -> Path:
        """Where masks and records are written."""
        return self._root / BIDS_RECORDS

    def begin(self) -> None:
        """Write what describes the dataset.

        Raises:
            EnvironmentFault: the folder cannot be written.
        """
        description: dict[str, Any] = {
            "Name": f"Masks by {self._manifest.name}",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [
                {
                    "Name": "medmamba",
                    "Version": __version__,
                    "Description": f"Segmentation by the model {self._manifest.name}",
                }
            ],
        }
        identity = self._doi()
        if identity:
            description["SourceDatasets"] = [{"DOI": identity}]
        write_atomic(self._root / DESCRIPTION_FILE, to_json(description))
        write_atomic(self._root / "README", README)
        write_atomic(self._root / ".bidsignore", f"/{BIDS_RECORDS}\n")
        rows = ["index\tname\tcolor"]
        rows += [
            f"{value}\t{_cell(entry.name)}\t{entry.color}"
            for entry in self._manifest.labels
            for value in entry.values[-1:]
        ]
        write_atomic(self._root / self._table, "\n".join(rows) + "\n")

    def place(self, record: CommitRecord) -> None:
        """Show the mask of a finished case, or take away that of one that has none now.

        Raises:
            EnvironmentFault: the folder cannot be written.
        """
        target = self._place_of(record.case_id)
        sidecar = target.with_name(target.name.removesuffix(NIFTI_SUFFIX) + ".json")
        if not record.succeeded or record.output is None:
            for path in (target, sidecar):
                path.unlink(missing_ok=True)
            return
        if not record.output.name.endswith(NIFTI_SUFFIX):
            return  # BIDS knows no other format; the mask stays beside its record
        source = self.records / record.output.name
        replace_atomic(target, lambda temporary: _link(source, temporary))
        about = {
            "Description": f"Labels by {self._manifest.name}; values in {self._table}",
            "Manual": False,
            "SpatialReference": "orig",
            "Warnings": list(record.warnings),
            "SourceSHA256": [identity.sha256 for identity in record.inputs],
        }
        write_atomic(sidecar, to_json(about))

    def _doi(self) -> str:
        try:
            content = json.loads((self._source / DESCRIPTION_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        found = content.get("DatasetDOI") if isinstance(content, dict) else None
        return found if isinstance(found, str) else ""

    def _place_of(self, case_id: str) -> Path:
        name = case_id if BIDS_ID.fullmatch(case_id) else f"sub-{_unique(case_id)}"
        entities = dict(part.split("-", 1) for part in name.split("_"))
        entities.pop("desc", None)
        folder = self._root / f"sub-{entities['sub']}"
        if "ses" in entities:
            folder /= f"ses-{entities['ses']}"
        stem = "_".join(f"{key}-{value}" for key, value in entities.items())
        return folder / "anat" / f"{stem}_desc-{self._description}_dseg{NIFTI_SUFFIX}"


def _link(source: Path, target: Path) -> None:
    """Show a file in a second place without a second copy, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", text) or "medmamba"


def _unique(name: str) -> str:
    """Letters and digits only, and no two names alike."""
    plain = re.sub(r"[^A-Za-z0-9]", "", name)
    if plain == name:
        return plain
    return plain + hashlib.sha256(name.encode()).hexdigest()[:6]


def _cell(text: str) -> str:
    return text.replace("\t", " ").replace("\n", " ")
