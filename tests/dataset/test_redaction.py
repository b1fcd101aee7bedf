"""Names that say nothing: outputs without those of cases and files, found again with the key."""

import json
import os
from pathlib import Path

import pytest
from dicom_phantom import make_series, save

from medmamba.bundle import save_bundle
from medmamba.dataset import Case
from medmamba.dataset.redaction import read_key, without_names
from medmamba.errors import UsageError

from ..conformance.phantom import nifti, packed, voxels
from ..test_bundle import CONFIGURATION, tiny_plan, weights

NAME = "ZZPHI"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_bundle(
        tmp_path / "model", plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32",
    )  # fmt: skip
    images = tmp_path / f"{NAME}-ward"
    images.mkdir()
    (images / f"{NAME}-Smith_0000.nii.gz").write_bytes(packed(nifti(voxels(1))))
    (images / f"{NAME}-cut_0000.nii.gz").write_bytes(packed(nifti(voxels(2)))[:400])
    (images / f"{NAME} odd\nname_0000.nii.gz").write_bytes(packed(nifti(voxels(2))))
    (images / f"{NAME}-other_0000.mha").write_bytes(b"of another format than the model's")
    damaged = save(make_series(), images / f"{NAME}-series", prefix=f"{NAME}-slice")
    path = sorted(damaged.iterdir())[2]
    path.write_bytes(path.read_bytes()[:600])
    (tmp_path / "key").write_bytes(os.urandom(32).hex().encode() + b"\n")
    return tmp_path


@pytest.mark.parametrize("listed", [False, True])
def test_no_output_says_a_name(place: Path, medmamba, listed: bool) -> None:
    images, out, key = place / f"{NAME}-ward", place / "out", ("--redact-ids", place / "key")
    source = images
    if listed:
        source = images / "cases.csv"
        rows = [f"{NAME}-{name},{NAME}-{name}_0000.nii.gz" for name in ("Smith", "cut", "gone")]
        source.write_text("\n".join(["case_id,channel_0", *rows]) + "\n")
    words = ("predict", "-i", source, "-o", out, "-m", place / "model", "--in-process", *key)
    code, printed, talk = medmamba(*words, "--json", "--report")
    assert code == 4
    cases = json.loads(printed)["cases"]
    assert len(cases) == (3 if listed else 4)
    assert NAME not in printed + talk
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in written if NAME in path.name]
    assert not [path for path in written if NAME.encode() in path.read_bytes()]
    named = {item["case_id"]: item["status"] for item in cases}
    redaction = read_key(place / "key")
    assert named[redaction.name(f"{NAME}-Smith")] == "ok"
    assert named[redaction.name(f"{NAME}-cut")] == "rejected"
    # The same key gives the same names: nothing is done twice, images and cases are found again.
    assert "skipped" in {
        item["status"] for item in json.loads(medmamba(*words, "--json")[1])["cases"]
    }
    (images / f"{NAME}-other_0000.mha").unlink()
    assert medmamba("verify", out, "-i", source, *key)[0] == 0
    assert medmamba("verify", out, "-i", source)[0] == 4
    code, told, _ = medmamba("report", out, "-i", source, *key, "--json")
    assert json.loads(told)["pictures"] == 1
    assert NAME not in (out / "report.html").read_text()


def test_keys_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(UsageError, match="can be guessed"):
        read_key(tmp_path / "short")
    with pytest.raises(UsageError, match="cannot be read"):
        read_key(tmp_path / "none")


def test_longer_names_go_before_their_parts(tmp_path: Path) -> None:
    case = Case(id="case-0", images=(tmp_path / "smith_0000.nii.gz",), known_as="smith")
    text = "smith_0000.nii.gz: of smith, is cut"
    assert without_names(text, case) == "case-0: of case-0, is cut"
    assert without_names(text, Case(id="smith", images=case.images)) == text
