import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medmamba.dataset import open_dataset
from medmamba.errors import DatasetError
from medmamba.plans import fingerprint as module
from medmamba.plans.fingerprint import (
    Fingerprint,
    compute_fingerprint,
    fingerprint_from_nnunet,
    fingerprint_to_nnunet,
)

INTENSITY_TOLERANCE = 1e-6


def write_dataset(folder: Path, *, cases: int = 4, whole: bool = False) -> Path:
    """Random images with a zero margin, two channels, a label that reaches into the margin."""
    root = folder / "Dataset777_Noise"
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for index in range(cases):
        random = np.random.default_rng(index)
        shape = (20 + index, 18, 16)
        affine = np.diag([1.0, 1.25, 2.0 + 0.1 * index, 1.0])
        labels = np.zeros(shape, np.uint8)
        labels[4:12, 4:12, 4:10] = 1
        labels[6:9, 6:9, 6:9] = 2
        for channel in range(2):
            voxels = random.normal(100, 40, shape).astype(np.float32)
            if whole and channel == 0:
                voxels = np.rint(voxels)
            voxels[:3] = 0
            image = nibabel.Nifti1Image(voxels, affine)
            nibabel.save(image, root / "imagesTr" / f"case_{index}_{channel:04d}.nii.gz")
        nibabel.save(
            nibabel.Nifti1Image(labels, affine), root / "labelsTr" / f"case_{index}.nii.gz"
        )
    description = {
        "channel_names": {"0": "CT", "1": "T1"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def foreground(root: Path, channel: int) -> np.ndarray:
    values = []
    for label_path in sorted((root / "labelsTr").iterdir()):
        case = label_path.name.removesuffix(".nii.gz")
        image = nibabel.load(root / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        mask = np.asarray(nibabel.load(label_path).dataobj) > 0
        values.append(np.asarray(image.dataobj)[mask])
    return np.concatenate(values).astype(np.float64)


def assert_matches_numpy(fingerprint: Fingerprint, root: Path) -> None:
    for channel, found in enumerate(fingerprint.intensities):
        values = foreground(root, channel)
        low, median, high = np.percentile(values, [0.5, 50, 99.5])
        expected = [values.mean(), median, values.std(), values.min(), values.max(), low, high]
        actual = [
            found.mean,
            found.median,
            found.std,
            found.min,
            found.max,
            found.percentile_00_5,
            found.percentile_99_5,
        ]
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


@pytest.mark.parametrize("whole", [False, True])
def test_exact_statistics_are_those_of_all_voxels(tmp_path: Path, whole: bool) -> None:
    root = write_dataset(tmp_path, whole=whole)
    assert_matches_numpy(compute_fingerprint(open_dataset(root), workers=2), root)


def test_values_that_no_longer_fit_in_memory_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_dataset(tmp_path)
    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    assert_matches_numpy(compute_fingerprint(open_dataset(root), workers=2), root)


def test_sizes_spacings_and_labels(tmp_path: Path) -> None:
    found = compute_fingerprint(open_dataset(write_dataset(tmp_path, cases=2)))
    assert found.dataset_name == "Dataset777_Noise"
    assert found.case_ids == ("case_0", "case_1")
    # The zero margin is three planes of x.
    assert found.shapes_after_crop == ((16, 18, 17), (16, 18, 18))
    np.testing.assert_allclose(found.spacings_mm, [[2.0, 1.25, 1.0], [2.1, 1.25, 1.0]], rtol=1e-6)
    assert found.median_relative_size_after_cropping == pytest.approx((17 / 20 + 18 / 21) / 2)
    assert found.label_voxels[2] == 2 * 27
    assert found.label_voxels[1] == 2 * (8 * 8 * 6 - 27)


def test_a_second_run_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(write_dataset(tmp_path, whole=True))
    steps: list[tuple[int, int]] = []
    cache = tmp_path / "cache"
    first = compute_fingerprint(dataset, folder=cache, progress=lambda *step: steps.append(step))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    read: list[str] = []
    original = module._read

    def watch(case):
        read.append(case.id)
        return original(case)

    monkeypatch.setattr(module, "_read", watch)
    # One changed file: only that case is measured again, and float values are read for ranks.
    changed = dataset.training_cases[1].images[1]
    image = nibabel.load(changed)
    voxels = np.asarray(image.dataobj) + np.float32(1)
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), changed)
    second = compute_fingerprint(dataset, folder=cache)
    assert second.intensities[1].mean > first.intensities[1].mean
    after = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"case_1.json"}
    assert read.count("case_1") == 1
    assert_matches_numpy(second, dataset.folder)


def test_a_damaged_measurement_is_made_anew(tmp_path: Path) -> None:
    dataset = open_dataset(write_dataset(tmp_path))
    cache = tmp_path / "cache"
    first = compute_fingerprint(dataset, folder=cache)
    (cache / "case_2.json").write_text('{"key": "half a fi')
    assert compute_fingerprint(dataset, folder=cache) == first


def test_killed_and_run_again_it_gives_the_same_bytes(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, cases=12)
    code = (
        "import sys; from pathlib import Path; from medmamba.dataset import open_dataset;"
        "from medmamba.plans.fingerprint import compute_fingerprint;"
        "from medmamba.files import to_json, write_atomic;"
        "root, cache, out = map(Path, sys.argv[1:]);"
        "found = compute_fingerprint(open_dataset(root), folder=cache, workers=1);"
        "write_atomic(out, to_json(found))"
    )

    def start(name: str) -> subprocess.Popen[bytes]:
        paths = [str(root), str(tmp_path / name), str(tmp_path / f"{name}.json")]
        return subprocess.Popen([sys.executable, "-c", code, *paths])

    assert start("undisturbed").wait() == 0
    victim = start("killed")
    while not list((tmp_path / "killed").glob("case_*.json")) and victim.poll() is None:
        time.sleep(0.002)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert start("killed").wait() == 0
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "undisturbed.json").read_bytes()


def test_no_foreground_is_an_error(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, cases=1)
    path = root / "labelsTr" / "case_0.nii.gz"
    labels = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.zeros(labels.shape, np.uint8), labels.affine), path)
    with pytest.raises(DatasetError, match="no labelled voxel"):
        compute_fingerprint(open_dataset(root))


def test_the_golden_fingerprints_from_their_raw_data(fixtures_dir: Path, tmp_path: Path) -> None:
    goldens = {
        json.loads(plans.read_text())["dataset_name"]: plans.parent / "dataset_fingerprint.json"
        for plans in (fixtures_dir / "plans").glob("*/nnUNet*Plans*.json")
    }
    scripts = sorted((fixtures_dir / "plans").glob("make_*_raw.py"))
    if not scripts:
        pytest.skip("no script that regenerates raw data")
    for script in scripts:
        out = tmp_path / script.stem
        out.mkdir()
        subprocess.run([sys.executable, str(script), str(out)], check=True)
        for root in out.iterdir():
            found = compute_fingerprint(open_dataset(root), sampling="compatible")
            assert_equals_golden(found, json.loads(goldens[root.name].read_text()))


def assert_equals_golden(found: Fingerprint, golden: dict) -> None:
    plain = fingerprint_to_nnunet(found)
    assert plain["spacings"] == golden["spacings"]
    assert plain["shapes_after_crop"] == golden["shapes_after_crop"]
    name = "median_relative_size_after_cropping"
    assert plain[name] == pytest.approx(golden[name], rel=1e-12)
    channels = "foreground_intensity_properties_per_channel"
    assert list(plain[channels]) == list(golden[channels])
    for channel, expected in golden[channels].items():
        assert plain[channels][channel] == pytest.approx(expected, rel=INTENSITY_TOLERANCE)


def test_golden_fingerprints_survive_the_round_trip(fixtures_dir: Path) -> None:
    for path in (fixtures_dir / "plans").glob("*/dataset_fingerprint.json"):
        content = json.loads(path.read_text())
        assert fingerprint_to_nnunet(fingerprint_from_nnunet(content, "any")) == content
