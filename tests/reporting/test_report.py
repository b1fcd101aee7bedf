"""The report: what it shows, that nothing in it can run or load, and that a browser draws it."""

import csv
import dataclasses
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from fakes import MODEL, ThresholdPredictor, image, predict_cases
from PIL import Image

from medmamba.dataset import Case, Rejection
from medmamba.errors import EnvironmentFault, SecurityError, UsageError
from medmamba.files import to_json, write_atomic
from medmamba.inference.records import read_record
from medmamba.labels import UsualVolume
from medmamba.preprocessing.confidence import Confidence
from medmamba.reporting import entries, viewer, write_report
from medmamba.reporting.template import SCRIPT
from medmamba.volume import Geometry, Volume

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def ellipsoid_case(folder: Path, name: str, seed: int, size: int = 40) -> Case:
    from medmamba.io import write_image

    grid = np.indices((size // 2, size, size)).reshape(3, -1).T
    centre = np.array([size / 4, size / 2, size / 2]) + np.random.default_rng(seed).normal(0, 2, 3)
    distance = np.linalg.norm((grid - centre) / [size / 8, size / 4, size / 4], axis=1)
    values = np.where(distance < 1, 80, 20) + np.where(distance < 0.5, 60, 0)
    values = values.reshape(size // 2, size, size) + np.arange(size)[None, None, :] // 4
    path = folder / f"{name}.nii.gz"
    geometry = Geometry.from_spacing(values.shape, (2.0, 1.0, 1.0))
    write_image(path, values.astype(np.int16), geometry)
    return Case(id=name, images=(path,))


@pytest.fixture
def predicted(tmp_path: Path) -> Path:
    cases = [ellipsoid_case(tmp_path / "in", f"case_{index}", index) for index in range(3)]
    cases.append(image(tmp_path / "in", "touching"))
    predict_cases(
        cases,
        tmp_path / "out",
        ThresholdPredictor(),
        model=MODEL,
        rejected=[Rejection(id="cut", code="E_IO_TRUNCATED", message="cut.nii.gz: too short.")],
    )
    return tmp_path / "out"


def test_every_case_has_pictures_volumes_and_reasons(predicted: Path) -> None:
    outcome = write_report(predicted, images=predicted.parent / "in")
    assert (outcome.cases, outcome.pictures) == (5, 4)
    page = Page(outcome.path.read_text(encoding="utf-8"))
    assert sum(tag == "img" for tag, _ in page.tags) == 4 * 4
    assert "E_IO_TRUNCATED" in page.text
    assert "touches the border of the image: at least this much" in page.text
    record = read_record(predicted / "case_0.json")
    assert record is not None
    assert f"{record.labels[0].volume_ml:.3f}" in page.text
    rows = list(csv.DictReader((predicted / "summary.csv").read_text().splitlines()))
    assert {row["case"] for row in rows} == {"case_0", "case_1", "case_2", "touching", "cut"}


def test_the_page_loads_nothing(predicted: Path) -> None:
    text = write_report(predicted).path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        source = attributes.get("src") or ""
        assert source == "" or source.startswith("data:image/png;base64,")
        assert (attributes.get("href") or "#").startswith("#")
    [policy] = [
        str(attributes["content"])
        for tag, attributes in page.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'")
    assert "script-src 'sha256-" in policy
    assert not re.search(r"https?://", text)


def test_names_are_shown_and_never_run(predicted: Path) -> None:
    attack = "<script>alert(1)</script>"
    formula = "=cmd|'/c calc'!A1"
    content = (predicted / "case_0.json").read_text()
    record = read_record(predicted / "case_0.json")
    assert record is not None
    for number, name in enumerate((attack, formula)):
        labels = (dataclasses.replace(record.labels[0], name=name), *record.labels[1:])
        changed = dataclasses.replace(record, case_id=name, labels=labels, warnings=(attack,))
        write_atomic(predicted / f"bad_{number}.json", to_json(changed))
    assert attack not in content
    text = write_report(predicted).path.read_text(encoding="utf-8")
    assert attack not in text
    assert attack in Page(text).text
    assert text.count("<script>") == 1
    cells = [
        cell
        for row in csv.reader((predicted / "summary.csv").read_text().splitlines())
        for cell in row
    ]
    assert f"'{formula}" in cells
    assert formula not in cells


def with_statistics(folder: Path, case: str, **changes: object) -> None:
    """Change what a record says of its first label."""
    record = read_record(folder / f"{case}.json")
    assert record is not None
    labels = (dataclasses.replace(record.labels[0], **changes), *record.labels[1:])
    changed = dataclasses.replace(record, labels=labels)
    write_atomic(folder / f"{case}.json", to_json(changed))


def test_confidence_and_what_is_usual_are_shown(predicted: Path) -> None:
    with_statistics(
        predicted,
        "case_0",
        confidence=Confidence(mean_probability=0.8125, mean_entropy=0.3),
        usual=UsualVolume(low_ml=500.0, high_ml=900.0, cases=40),
        volume_flag="low",
    )
    with_statistics(predicted, "case_1", confidence=None, usual=None)
    text = Page(write_report(predicted).path.read_text(encoding="utf-8")).text
    assert "0.812" in text
    assert "500.00 to 900.00" in text
    assert "less than in 98 % of training cases" in text
    assert "not calibrated" in text
    assert "▼" in text


def test_of_many_cases_those_with_remarks_are_shown(predicted: Path, monkeypatch) -> None:
    monkeypatch.setattr(entries, "MAX_ENTRIES", 3)
    monkeypatch.setattr(entries, "MAX_PICTURED", 1)
    outcome = write_report(predicted)
    page = Page(outcome.path.read_text(encoding="utf-8"))
    assert (outcome.cases, outcome.pictures) == (5, 1)
    shown = [item["id"] for tag, item in page.tags if tag == "section" and "id" in item]
    assert len(shown) == 3
    # The rejected case and the one that touches the border come before the others.
    assert "E_IO_TRUNCATED" in page.text
    assert "touching" in page.text
    assert "summary.csv lists all 5" in page.text


def test_an_edited_mask_is_not_shown_as_the_prediction(predicted: Path) -> None:
    (predicted / "case_1.nii.gz").write_bytes((predicted / "case_0.nii.gz").read_bytes())
    outcome = write_report(predicted)
    assert outcome.pictures == 3
    assert "W_MASK_CHANGED" in outcome.path.read_text(encoding="utf-8")


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_report(tmp_path)


@pytest.fixture
def small_viewer(tmp_path: Path, monkeypatch) -> str:
    """A stand-in for the viewer's library, with what would end a page's script early."""
    source = 'const tags = "<script>";\n'
    monkeypatch.setattr(viewer, "NIIVUE_FILE", tmp_path / "niivue.js")
    monkeypatch.setattr(viewer, "NIIVUE_SHA256", hashlib.sha256(source.encode()).hexdigest())
    viewer.NIIVUE_FILE.write_text(source)
    return source


def packed_volumes(text: str) -> list[dict[str, Any]]:
    blocks = re.findall(r'<script type="application/json" [^>]*>\s*(.*?)</script>', text, re.DOTALL)
    return [json.loads(block) for block in blocks]


@pytest.mark.usefixtures("small_viewer")
def test_the_viewer_gets_the_masks_on_their_places(predicted: Path, tmp_path: Path) -> None:
    from medmamba.io import read_labels

    path = write_report(predicted, images=predicted.parent / "in", interactive=True).path
    text = path.read_text(encoding="utf-8")
    volumes = packed_volumes(text)
    assert len(volumes) == 4
    first = volumes[0]
    (tmp_path / "small.nii.gz").write_bytes(b64decode(first["labels"]))
    small, _ = read_labels(tmp_path / "small.nii.gz")
    mask, _ = read_labels(predicted / "case_0.nii.gz")
    # These masks are small enough to go in whole: the same voxels at the same millimetres.
    assert volume_and_middle(small) == pytest.approx(volume_and_middle(mask))
    record = read_record(predicted / "case_0.json")
    assert record is not None
    assert first["names"] == ["", *(item.name for item in record.labels)]
    assert len(first["table"]["R"]) == len(first["names"])


def volume_and_middle(labels: Volume) -> tuple[float, ...]:
    """Millilitres of all labels, and where they are, RAS+ millimetres."""
    voxels = np.argwhere(labels.array[0] > 0)
    matrix = labels.geometry.matrix
    middle = voxels.mean(axis=0) @ matrix[:3, :3].T + matrix[:3, 3]
    return (len(voxels) * labels.geometry.voxel_volume_ml, *middle)


@pytest.mark.usefixtures("small_viewer")
def test_an_interactive_page_lets_only_its_own_scripts_run(predicted: Path) -> None:
    with_statistics(predicted, "case_0", name="</script><script>alert(1)</script>")
    text = write_report(predicted, interactive=True).path.read_text(encoding="utf-8")
    page = Page(text)
    [policy] = [str(item["content"]) for _, item in page.tags if "http-equiv" in item]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert scripts == [SCRIPT, 'const tags = "\\x3cscript>";\n', viewer.STARTER]
    for script in scripts:
        assert f"'sha256-{viewer.policy_hash(script)}'" in policy
    assert "alert(1)</script>" not in text
    assert "</script><script>alert(1)</script>" in packed_volumes(text)[0]["names"]
    assert "BSD 2-Clause" in page.text
    assert not any(attributes.get("src", "data:")[:5] != "data:" for _, attributes in page.tags)


@pytest.mark.usefixtures("small_viewer")
def test_of_many_cases_the_first_ones_can_be_turned(predicted: Path, monkeypatch) -> None:
    monkeypatch.setattr(entries, "MAX_PACKED", 1)
    text = write_report(predicted, interactive=True).path.read_text(encoding="utf-8")
    assert len(packed_volumes(text)) == 1


def test_large_volumes_are_thinned_out(monkeypatch) -> None:
    from medmamba.reporting import volumes

    monkeypatch.setattr(volumes, "MAX_VOXELS", 1000)
    labels = np.zeros((10, 60, 60), np.uint8)
    labels[4:8, 12:36, 24:48] = 7
    geometry = Geometry.from_spacing(labels.shape, (6.0, 1.0, 1.0))
    packed = volumes.pack(None, labels, geometry, {7: ("box", "#ff8000")})
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(b64decode(packed.labels)))
    values = np.asarray(image.dataobj)
    assert values.shape == (10, 10, 10)
    assert packed.names[int(values.max())] == "box"
    centre = nibabel.affines.apply_affine(image.affine, np.argwhere(values > 0).mean(axis=0))
    assert centre == pytest.approx([35.5, 23.5, 33.0])
    assert packed.image == ""


def test_a_viewer_that_is_missing_or_another_is_refused(predicted: Path, small_viewer) -> None:
    viewer.NIIVUE_FILE.write_text(small_viewer + "alert(1)")
    with pytest.raises(SecurityError, match="is not NiiVue"):
        write_report(predicted, interactive=True)
    viewer.NIIVUE_FILE.unlink()
    with pytest.raises(EnvironmentFault, match="make viewer"):
        write_report(predicted, interactive=True)
    assert write_report(predicted).pictures == 4


def chromium(page: Path, *options: str, fragment: str = "", webgl: bool = False) -> bytes:
    """Let a browser without a network open a page from disk."""
    drawing = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--hide-scrollbars",
        *(drawing if webgl else ["--disable-gpu", "--disable-3d-apis"]),
        f"--user-data-dir={page.parent / 'profile'}", "--window-size=1240,2000", *options,
        page.as_uri() + fragment,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, env=os.environ)
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_runs_the_page_s_script_and_no_other(predicted: Path) -> None:
    path = write_report(predicted).path
    evil = "<script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"
    text = path.read_text(encoding="utf-8").replace("<footer>", f"{evil}<footer>")
    path.write_text(text, encoding="utf-8")
    dom = chromium(path, "--dump-dom").decode()
    # Headings become reachable by keyboard when the page's own script has run.
    assert re.search(r'<th[^>]* tabindex="0"', dom)
    assert "<title>Segmentation report</title>" in dom


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_sorts_the_table(predicted: Path) -> None:
    with_statistics(predicted, "case_1", volume_ml=9.5)
    with_statistics(predicted, "case_2", volume_ml=10.25)
    path = write_report(predicted).path
    # A person's clicks, on a copy that lets a foreign script make them.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text("utf-8"))
    click = "document.querySelectorAll('#cohort th')[{}].click();"
    orders = {}
    for name, clicks in (("up", (3,)), ("down", (3, 3)), ("names", (0, 0))):
        script = "".join(click.format(at) for at in clicks)
        copy = predicted / f"{name}.html"
        copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
        table = re.search(r"<tbody>(.*?)</tbody>", chromium(copy, "--dump-dom").decode(), re.DOTALL)
        assert table
        orders[name] = re.findall(r'<td><a href="#[^"]*">([^<]*)</a>', table[1])
    volumes = {
        record.case_id: record.labels[0].volume_ml if record.labels else float("-inf")
        for path in predicted.glob("*.json")
        if (record := read_record(path)) is not None
    }
    by_volume = sorted(volumes, key=volumes.__getitem__)
    assert len(set(volumes.values())) == len(volumes)
    assert orders["up"] == by_volume
    assert orders["down"] == by_volume[::-1]
    assert orders["names"] == sorted(volumes, reverse=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_the_page_from_disk(predicted: Path) -> None:
    page = write_report(predicted, images=predicted.parent / "in").path
    picture = predicted.parent / "page.png"
    chromium(page, f"--screenshot={picture}")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    saturated = pixels.max(axis=2) - pixels.min(axis=2) > 120
    # Outlines in the first two colours of the palette, and black ground of the pictures.
    assert saturated.sum() > 1500
    for color in ((0xE6, 0x9F, 0x00), (0x56, 0xB4, 0xE9)):
        assert (np.abs(pixels - color).max(axis=2) < 16).sum() > 100
    assert (pixels.max(axis=2) < 60).sum() > 10_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.skipif(not viewer.NIIVUE_FILE.exists(), reason="the viewer was not fetched")
@pytest.mark.parametrize("webgl", [True, False])
def test_a_browser_draws_the_viewer_or_keeps_the_pictures(predicted: Path, webgl: bool) -> None:
    page = write_report(predicted, images=predicted.parent / "in", interactive=True).path
    [anchor, *_] = re.findall(r'data-volume="([^"]+)"', page.read_text(encoding="utf-8"))
    shots = {}
    for name, fragment in (("plain", ""), ("opened", f"#view-{anchor}")):
        picture = predicted.parent / f"{name}.png"
        options = (f"--screenshot={picture}", "--virtual-time-budget=15000")
        chromium(page, *options, fragment=fragment, webgl=webgl)
        shots[name] = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    dom = chromium(
        page, "--dump-dom", "--virtual-time-budget=15000", fragment=f"#view-{anchor}", webgl=webgl
    ).decode()
    black = {name: int((pixels.max(axis=2) < 8).sum()) for name, pixels in shots.items()}
    assert ("This browser offers no WebGL2" in dom) is True
    if not webgl:
        assert (shots["plain"] == shots["opened"]).all()
        assert 'data-ready="yes"' not in dom
        assert '<p class="legend" data-needs-webgl="">' in dom  # shown, not hidden
        return
    assert 'data-ready="yes"' in dom
    # The label at the cross is named.
    found = re.search(r"<output>(.*?)</output>", dom)
    assert found
    assert found[1] in packed_volumes(page.read_text(encoding="utf-8"))[0]["names"][1:]
    assert 'data-needs-webgl="" hidden=""' in dom
    # The stage of the viewer is black around the planes, and the labels' colours are in it.
    assert black["opened"] > black["plain"] + 100_000
    stage = shots["opened"][_stage(shots["plain"], shots["opened"])]
    saturated = stage.max(axis=2) - stage.min(axis=2) > 60
    assert saturated.sum() > 3000
    grey = (stage.max(axis=2) - stage.min(axis=2) < 8) & (stage.max(axis=2) > 40)
    assert grey.sum() > 10_000


def _stage(plain: np.ndarray, opened: np.ndarray) -> slice:
    """Rows of the first stretch that is mostly black in the one picture and was not before."""
    rows = (opened.max(axis=2) < 8).mean(axis=1) > 0.3
    first = int(np.flatnonzero(rows & ((plain.max(axis=2) < 8).mean(axis=1) < 0.3))[0])
    return slice(first, first + 440)
