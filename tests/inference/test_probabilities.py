import json
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch

import medmamba
from medmamba.bundle import save_bundle
from medmamba.errors import UsageError
from medmamba.inference.records import read_record, still_holds
from medmamba.networks import build_network
from medmamba.preprocessing.probability_file import ProbabilityFile
from medmamba.volume import Geometry
from tests.test_bundle import tiny_plan


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = build_network(tiny_plan().configurations["3d_fullres"].network).state_dict()
    save_bundle(
        tmp_path / "model", plan=tiny_plan(), configuration="3d_fullres", weights=[weights],
        reference_case=False,
    )  # fmt: skip
    return tmp_path / "model"


def write_image(folder: Path) -> None:
    folder.mkdir()
    voxels = np.zeros((14, 12, 13), np.float32)
    voxels[2:12, 1:11, 3:12] = np.random.default_rng(1).normal(100, 5, (10, 10, 9))
    nib.save(nib.Nifti1Image(voxels, np.diag([1.3, 1.1, 1.2, 1.0])), folder / "a_0000.nii.gz")


@pytest.mark.parametrize(("kind", "step"), [("float16", 1e-3), ("uint8", 1 / 255)])
def test_kept_probabilities_are_what_labels_follow_from(
    tmp_path: Path, model: Path, kind: str, step: float
) -> None:
    write_image(tmp_path / "in")
    out = tmp_path / "out"
    medmamba.predict(
        tmp_path / "in", out, model, save_probabilities=kind, device="cpu", supervised=False
    )
    stored = blosc2.open(str(out / "a_prob.b2nd"), mode="r")
    mask = np.asarray(nib.load(out / "a.nii.gz").dataobj).T
    assert stored.dtype == kind
    assert stored.shape == (3, *mask.shape)
    assert stored.schunk.vlmeta["labels"] == ["background", "front", "back"]
    values = stored[:].astype(np.float32) * stored.schunk.vlmeta["scale"]
    np.testing.assert_allclose(values.sum(0), 1, atol=3 * step)
    assert (values[0][:2] == 1).all()
    assert set(np.unique(mask)) > {0}
    chosen = np.take_along_axis(values, mask[None].astype(int), 0)[0]
    assert (chosen >= values.max(0) - 2 * step).all()
    record = read_record(out / "a.json")
    assert record is not None
    assert record.probabilities is not None
    assert record.probabilities.name == "a_prob.b2nd"
    assert record.parameters["probabilities"] == kind
    assert still_holds(record, out)
    again = medmamba.predict(
        tmp_path / "in", out, model, save_probabilities=kind, device="cpu", supervised=False
    )
    assert again.run.records[0].status == "skipped"
    (out / "a_prob.b2nd").unlink()
    assert not still_holds(record, out)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("orientation", ["", "PSL"])
def test_an_archive_is_what_nnunet_would_keep(tmp_path: Path, orientation: str) -> None:
    torch.manual_seed(0)
    weights = build_network(tiny_plan().configurations["3d_fullres"].network).state_dict()
    save_bundle(
        tmp_path / "model", plan=tiny_plan(), configuration="3d_fullres", weights=[weights],
        reference_case=False, orientation=orientation,
    )  # fmt: skip
    write_image(tmp_path / "in")
    out = tmp_path / "out"
    archives = []
    for overwrite in ("stale", "always"):
        run = medmamba.predict(
            tmp_path / "in", out, tmp_path / "model", save_probabilities="npz", device="cpu",
            supervised=False, overwrite=overwrite,
        )  # fmt: skip
        assert run.exit_code == 0
        archives.append((out / "a.npz").read_bytes())
    assert archives[0] == archives[1]
    with np.load(out / "a.npz") as archive:
        values = archive["probabilities"]
    mask = np.asarray(nib.load(out / "a.nii.gz").dataobj).T
    assert values.dtype == np.float32
    assert values.shape == (3, *mask.shape)
    np.testing.assert_allclose(values.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(values.argmax(0), mask)
    assert len(np.unique(mask)) > 1
    record = read_record(out / "a.json")
    assert record is not None
    assert record.probabilities is not None
    assert record.probabilities.name == "a.npz"
    assert still_holds(record, out)
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_nnunet_goes_on_from_an_archive(tmp_path: Path, model: Path) -> None:
    """Its ensembling of a prediction with itself gives the mask again, on the image's grid."""
    pytest.importorskip("nnunetv2")
    from nnunetv2.ensembling.ensemble import merge_files
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    write_image(tmp_path / "in")
    out = tmp_path / "out"
    medmamba.predict(
        tmp_path / "in", out, model, save_probabilities="npz", device="cpu", supervised=False
    )
    reader = SimpleITKIO if "SimpleITK" in tiny_plan().reader else NibabelIO
    labels = LabelManager({"background": 0, "front": 1, "back": 2}, None)
    archive = str(out / "a.npz")
    merge_files([archive, archive], str(tmp_path / "again"), ".nii.gz", reader(), labels)
    mask, again = nib.load(out / "a.nii.gz"), nib.load(tmp_path / "again.nii.gz")
    np.testing.assert_array_equal(np.asarray(again.dataobj), np.asarray(mask.dataobj))
    np.testing.assert_allclose(again.affine, mask.affine, atol=1e-5)


def test_asking_for_probabilities_later_redoes_a_case_to_the_same_mask(
    tmp_path: Path, model: Path
) -> None:
    write_image(tmp_path / "in")
    out = tmp_path / "out"
    masks = []
    for kind in ("none", "npz", "uint8", "none"):
        medmamba.predict(
            tmp_path / "in", out, model, save_probabilities=kind, device="cpu", supervised=False
        )
        masks.append((out / "a.nii.gz").read_bytes())
        assert (out / "a_prob.b2nd").exists() == (kind == "uint8")
        assert [(out / f"a.{end}").exists() for end in ("npz", "pkl")] == [kind == "npz"] * 2
        assert ("probabilities" in json.loads((out / "a.json").read_text())["parameters"]) == (
            kind != "none"
        )
    assert len(set(masks)) == 1


def test_an_unknown_form_is_refused(tmp_path: Path) -> None:
    from medmamba.cli.predict import predict

    with pytest.raises(UsageError, match="float16"):
        predict(tmp_path, tmp_path / "out", tmp_path, save_probabilities="float64")


@pytest.mark.parametrize("along", [0, 1, 2])
@pytest.mark.parametrize("background", [True, False])
def test_boxes_land_where_they_belong(tmp_path: Path, along: int, background: bool) -> None:
    shape = (5, 6, 7)
    file = ProbabilityFile(
        tmp_path / "p.b2nd",
        names=["a", "b"],
        geometry=Geometry.from_spacing(shape, (1.0, 2.0, 3.0)),
        kind="float16",
        along=along,
        background_first=background,
    )
    expected = np.zeros((2, *shape), np.float16)
    expected[0] = background
    values = np.random.default_rng(0).random((2, 3, 3, 3)).astype(np.float32)
    box = (slice(1, 4), slice(2, 5), slice(3, 6))
    file.write(box, values)
    expected[(slice(None), *box)] = values
    np.testing.assert_array_equal(blosc2.open(str(file.path), mode="r")[:], expected)
