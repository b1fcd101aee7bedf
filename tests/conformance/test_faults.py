"""Faults of names, models, places and privacy through the real command (rows D, F, G, H)."""

import itertools
import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medmamba.bundle import save_bundle

from ..test_bundle import CONFIGURATION, change_manifest, rehash, tiny_plan, weights
from .conftest import predict
from .phantom import nifti, packed, voxels

WEIGHTS = Path("weights") / "fold_0.safetensors"
SENTINELS = ("ZZPHI^NAME", "19450607", "ACC-0042-ZZ")


def flip_weights(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    rehash(folder)


def giant_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + data[8:])
    rehash(folder)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    change_manifest(folder, lambda manifest: manifest["weights"][0].update(size_bytes=size))


def rename_one(state: dict[str, torch.Tensor]) -> None:
    state["stranger"] = state.pop(next(iter(state)))


def drop_one(state: dict[str, torch.Tensor]) -> None:
    del state[next(iter(state))]


def reshape_one(state: dict[str, torch.Tensor]) -> None:
    name = max(state, key=lambda key: state[key].numel())
    state[name] = state[name].flatten()[:-1].clone()


def spoil_one(state: dict[str, torch.Tensor]) -> None:
    next(iter(state.values())).view(-1)[0] = torch.nan


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


MODELS = [
    ("F1 flipped byte", flip_weights, 7, "E_MODEL_HASH"),
    ("F2 truncated", cut_weights, 3, "weights"),
    ("F2 giant header", giant_header, 3, "header"),
    ("F4 unknown tensor", lambda folder: change_weights(folder, rename_one), 3, "stranger"),
    ("F4 missing tensor", lambda folder: change_weights(folder, drop_one), 3, "weights"),
    ("F4 other shape", lambda folder: change_weights(folder, reshape_one), 3, "shape"),
    ("F4 NaN", lambda folder: change_weights(folder, spoil_one), 3, "NaN"),
    (
        "F5 newer",
        lambda folder: change_manifest(folder, lambda m: m.update(schema_version=99)),
        3,
        "99",
    ),
    (
        "F5 label count",
        lambda folder: change_manifest(folder, lambda m: m["labels"].pop()),
        3,
        "labels",
    ),
    ("F5 unknown key", lambda folder: change_manifest(folder, lambda m: m.update(zz=1)), 3, "zz"),
    ("F7 fold missing", no_weights, 3, "fold_0.safetensors"),
]


@pytest.mark.parametrize(("spoil", "code", "word"), [row[1:] for row in MODELS],
                         ids=[row[0] for row in MODELS])  # fmt: skip
def test_a_model_that_cannot_be_trusted_starts_nothing(
    spoil, code, word, model, images, medmamba, tmp_path
) -> None:
    spoil(model)
    # What only loading the network shows is met by the worker; once is enough for that.
    alone = [] if word == "NaN" else ["--in-process"]
    found, _, error = medmamba("predict", "-i", images, "-o", tmp_path / "out", "-m", model, *alone)
    assert found == code, error
    assert word in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").glob("*.nii.gz"))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_offered_as_model_is_refused_unexecuted(images, medmamba, tmp_path) -> None:
    sentinel = tmp_path / "executed"
    torch.save({"network_weights": Payload(sentinel)}, tmp_path / "model.pt")
    code, _, error = medmamba(
        "predict", "-i", images, "-o", tmp_path / "out", "-m", tmp_path / "model.pt"
    )
    assert code == 7, error
    code, _, error = medmamba("convert", "import-checkpoint", tmp_path / "model.pt", "-o",
                              tmp_path / "made")  # fmt: skip
    assert code == 7, error
    assert not sentinel.exists()


def test_an_output_that_holds_the_images_is_a_usage_error(model, images, medmamba) -> None:
    for output in (images, images.parent):
        code, _, error = medmamba("predict", "-i", images, "-o", output, "-m", model)
        assert code == 2, error
    assert sorted(path.name for path in images.iterdir()) == [
        "case0_0000.nii.gz", "case1_0000.nii.gz",
    ]  # fmt: skip


def test_an_output_that_cannot_be_written_is_found_first(model, images, medmamba) -> None:
    blocked = images.parent / "file"
    blocked.write_text("")
    code, _, error = medmamba("predict", "-i", images, "-o", blocked / "out", "-m", model)
    assert code == 6, error


def test_names_that_collide_are_both_rejected(model, images, medmamba, tmp_path) -> None:
    for name in ("Scan_0000.nii.gz", "scan_0000.nii.gz"):
        (images / name).write_bytes(packed(nifti(voxels(3))))
    code, records = predict(medmamba, images, tmp_path / "out", model)
    assert code == 4
    rejected = [item for item in records.values() if item["status"] == "rejected"]
    assert len(rejected) == 2
    assert {item["error"]["code"] for item in rejected} == {"E_ID_COLLISION"}
    assert records["case0"]["status"] == "ok"


UNSAFE_NAMES = ("../../etc/x", "/etc/x", "a\0b", "a\nb", "\x1b[2J", "..")


def test_unsafe_names_of_a_list_are_rejected_and_raise_an_alarm_where_asked_to(
    model, images, medmamba, tmp_path
) -> None:
    names = ("case0", *UNSAFE_NAMES, "case1")
    rows = [{"case_id": name, "channel_0": f"case{len(name) % 2}_0000.nii.gz"} for name in names]
    work = images / "work.jsonl"
    work.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")}
    for options, expected in (([], 4), (["--strict"], 7), (["--strict", "--fail-on", "never"], 0)):
        code, records = predict(
            medmamba, work, tmp_path / "out", model, "--in-process", "--no-report", *options
        )
        assert code == expected
        assert len(records) == len(names)
        assert {records[name]["status"] for name in ("case0", "case1")} <= {"ok", "skipped"}
        rejected = [record for record in records.values() if record["status"] == "rejected"]
        assert [record["error"]["code"] for record in rejected] == ["E_PATH_UNSAFE"] * 6
        if "never" not in options:
            about = ("-i", work, "-o", tmp_path / "out", "-m", model, "--dry-run", *options)
            assert medmamba("predict", *about)[0] == expected
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")}
    assert after == before
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 2


ODD_NAMES = ("-lead", "with space", "ümlaut 🧠", "=cmd()", "x" * 200, "<script>alert(1)<script>")


def test_odd_names_get_safe_ones(model, images, medmamba, tmp_path) -> None:
    for name in ODD_NAMES:
        (images / f"{name}_0000.nii.gz").write_bytes(packed(nifti(voxels(3))))
    code, records = predict(medmamba, images, tmp_path / "out", model)
    assert code == 0
    made = [key for key in records if key not in ("case0", "case1")]
    assert len(made) == len(ODD_NAMES)
    for key in made:
        assert (tmp_path / "out" / f"{key}.nii.gz").is_file()
        assert key[0].isalnum()
        assert all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in key)


def test_what_is_left_out_of_a_folder_is_said(model, images, medmamba, tmp_path, caplog) -> None:
    """A picture beside the images is no case, but nobody may take it for one that was done."""
    (images / "case7_0000.nrrd").write_bytes(b"NRRD0004")
    (images / "case8_0000.nii.gz.part").write_bytes(b"")
    (images / "more").mkdir()
    (images / ".hidden").write_bytes(b"")
    out = images / "masks"
    commands = (
        ("check", images, "-m", model),
        ("predict", "-i", images, "-o", out, "-m", model, "--in-process"),
        ("predict", "-i", images, "-o", out, "-m", model, "--dry-run"),
    )
    for arguments in commands:
        caplog.clear()
        assert medmamba(*arguments)[0] == 0
        (said,) = [text for text in caplog.messages if text.startswith("left out")]
        assert "(3 in all)" in said
        assert "'case7_0000.nrrd', 'case8_0000.nii.gz.part', 'more/'" in said


def test_an_image_in_two_files_is_turned_away_by_itself_too(model, medmamba, tmp_path) -> None:
    for ending in ("hdr", "img"):
        (tmp_path / f"a.{ending}").write_bytes(b"")
        code, records = predict(medmamba, tmp_path / f"a.{ending}", tmp_path / "out", model)
        assert code == 5
        assert records["a"]["error"]["code"] == "E_IO_FORMAT"


def turned(way: tuple[tuple[int, ...], tuple[int, ...]]) -> bytes:
    image = nibabel.Nifti1Image.from_bytes(nifti())
    return packed(bytes(image.as_reoriented(np.stack(way, axis=1)).to_bytes()))


WAYS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
"""All 48 to store the axes of an image."""


@pytest.mark.parametrize(
    "ways", [WAYS[::11], pytest.param(WAYS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_order_of_axes_in_a_file_does_not_change_the_mask(ways, medmamba, tmp_path) -> None:
    """B21, for a model that says how its training images were stored, which was another way."""
    place, model = tmp_path / "images", tmp_path / "oriented"
    place.mkdir()
    save_bundle(
        model, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32", orientation="PSL", reference_case=False,
    )  # fmt: skip
    names = [f"way{number}x" for number in range(len(ways))]
    for name, way in zip(names, ways, strict=True):
        (place / f"{name}.nii.gz").write_bytes(turned(way))
    code, records = predict(medmamba, place, tmp_path / "out", model)
    assert code == 0
    assert {records[name]["status"] for name in names} == {"ok"}
    masks = []
    for name in names:
        mask = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        assert np.array_equal(mask.affine, nibabel.load(place / f"{name}.nii.gz").affine)
        masks.append(np.asarray(nibabel.as_closest_canonical(mask).dataobj))
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert len(np.unique(masks[0])) > 1
    # By hand: the image turned to the model's orientation, through a model that does not turn.
    (tmp_path / "hand").mkdir()
    code = nibabel.orientations.axcodes2ornt("PSL")
    image = nibabel.Nifti1Image.from_bytes(nifti())
    start = nibabel.orientations.io_orientation(image.affine)
    by_hand = image.as_reoriented(nibabel.orientations.ornt_transform(start, code))
    (tmp_path / "hand" / "x.nii.gz").write_bytes(packed(bytes(by_hand.to_bytes())))
    plain = tmp_path / "plain"
    save_bundle(
        plain, plan=tiny_plan(), configuration=CONFIGURATION, weights=[weights(0)],
        precision="fp32", reference_case=False,
    )  # fmt: skip
    predict(medmamba, tmp_path / "hand", tmp_path / "out", plain)
    mask = nibabel.as_closest_canonical(nibabel.load(tmp_path / "out" / "x.nii.gz"))
    assert np.array_equal(np.asarray(mask.dataobj), masks[0])


@pytest.mark.parametrize(("when", "expected"), [("any", 4), ("all", 0), ("never", 0)])
def test_the_exit_code_says_what_was_asked_for(
    when, expected, model, images, medmamba, tmp_path
) -> None:
    (images / "bad_0000.nii.gz").write_bytes(b"")
    code, _, _ = medmamba(
        "predict",
        "-i",
        images,
        "-o",
        tmp_path / "out",
        "-m",
        model,
        "--fail-on",
        when,
        "--in-process",
    )
    assert code == expected


def test_a_run_of_failures_can_be_stopped(model, images, medmamba, tmp_path) -> None:
    for number in range(6):
        (images / f"a{number}_0000.nii.gz").write_bytes(packed(nifti(voxels()))[:-20])
    code, out, _ = medmamba("predict", "-i", images, "-o", tmp_path / "out", "-m", model,
                            "--max-failures", "2", "--json", "--in-process")  # fmt: skip
    assert code in (4, 5)
    assert len(json.loads(out)["cases"]) < 8


def air_and_tissue(shift: float = 0.0) -> np.ndarray:
    """A body of soft tissue in air, Hounsfield units."""
    noise = np.random.default_rng(3).normal(40, 30, (20, 24, 16))
    noise[:6] = -1000
    return noise + shift


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (air_and_tissue().astype(np.int16), ""),
        (air_and_tissue(1024).clip(0).astype(np.int16), "HU_RANGE"),
        (air_and_tissue().astype(np.int16).view(np.uint16), "HU_RANGE"),
        (voxels().clip(0), "MODALITY"),
    ],
    ids=["C11 as it should be", "C11 shifted", "C11 wrapped", "C12 MR"],
)
def test_values_that_are_no_hounsfield_units_are_noticed(
    values, code, images, medmamba, tmp_path
) -> None:
    model = tmp_path / "ct_model"
    save_bundle(
        model, plan=replace(tiny_plan(), channel_names=("CT",)), configuration=CONFIGURATION,
        weights=[weights(0)], precision="fp32",
    )  # fmt: skip
    (images / "ct_0000.nii.gz").write_bytes(packed(nifti(values)))
    record = predict(medmamba, images, tmp_path / "out", model)[1]["ct"]
    assert [text.split(":")[0] for text in record["warnings"]] == ([f"W_{code}"] if code else [])
    strict = predict(medmamba, images, tmp_path / "strict", model, "--in-process", "--strict")[1]
    assert strict["ct"]["status"] == ("rejected" if code else "ok")
    assert not code or strict["ct"]["error"]["code"] == f"E_{code}"


def test_what_is_edited_is_made_again(model, images, medmamba, tmp_path) -> None:
    out = tmp_path / "out"
    predict(medmamba, images, out, model)
    mask, record = out / "case0.nii.gz", out / "case1.json"
    kept = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    mask.write_bytes(mask.read_bytes()[:-3])
    (out / "case1.nii.gz").unlink()
    code, records = predict(medmamba, images, out, model)
    assert code == 0
    assert {item["status"] for item in records.values()} == {"ok"}
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == kept
    record.write_text("{")
    assert medmamba("verify", out)[0] == 4
    _, records = predict(medmamba, images, out, model)
    assert [records[case]["status"] for case in ("case0", "case1")] == ["skipped", "ok"]
    assert medmamba("verify", out)[0] == 0


def test_a_torn_journal_is_of_no_account(model, images, medmamba, tmp_path) -> None:
    out = tmp_path / "out"
    predict(medmamba, images, out, model)
    for journal in (out / "run").rglob("journal*.jsonl"):
        journal.write_bytes(journal.read_bytes()[:-7])
    code, records = predict(medmamba, images, out, model)
    assert code == 0
    assert {item["status"] for item in records.values()} == {"skipped"}


def test_personal_data_reach_no_output(model, medmamba, tmp_path) -> None:
    folder = tmp_path / SENTINELS[0].replace("^", "_") / "images"
    folder.mkdir(parents=True)
    image = nibabel.Nifti1Image(voxels(), np.diag([1.0, 1.25, 2.0, 1.0]))
    image.header["descrip"] = SENTINELS[0].encode()
    image.header["aux_file"] = SENTINELS[1].encode()
    image.header["db_name"] = SENTINELS[2].encode()
    image.header["intent_name"] = SENTINELS[2].encode()
    image.header.extensions.append(
        nibabel.nifti1.Nifti1Extension("comment", " ".join(SENTINELS).encode())
    )
    nibabel.save(image, folder / "case_0000.nii.gz")
    (folder / "bad_0000.nii.gz").write_bytes((folder / "case_0000.nii.gz").read_bytes()[:400])
    out = tmp_path / "out"
    code, _ = predict(medmamba, folder, out, model)
    assert code == 4
    import gzip

    for path in (item for item in out.rglob("*") if item.is_file()):
        data = path.read_bytes()
        data += gzip.decompress(data) if path.name.endswith(".gz") else b""
        for word in (*SENTINELS, SENTINELS[0].replace("^", "_")):
            assert word.encode() not in data, (path, word)


# Importing pydicom imports urllib3, which looks whether the machine has IPv6 by making a socket;
# nothing may ever be sent or listened for.
REFUSE_SOCKETS = """
import os, socket
def refuse(*_, **__):
    os._exit(99)
class Refused(socket.socket):
    connect = connect_ex = listen = send = sendall = sendto = refuse
socket.socket = Refused
socket.create_connection = refuse
open(os.environ["MARKER"], "w").close()
"""


def test_no_socket_is_opened(model, images, medmamba, tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert predict(medmamba, images, tmp_path / "out", model)[0] == 0
    # The worker imports what this process can, and so its sitecustomize.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(REFUSE_SOCKETS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    marker = tmp_path / "imported"
    monkeypatch.setenv("MARKER", str(marker))
    assert predict(medmamba, images, tmp_path / "out2", model, "--tta")[0] == 0
    assert marker.exists()


def test_a_run_ends_with_a_page_unless_asked_not_to(model, images, medmamba, tmp_path) -> None:
    (images / "bad_0000.nii.gz").write_bytes(b"")
    arguments = ("predict", "-i", images, "-m", model, "--json", "--in-process", "-o")
    code, out, _ = medmamba(*arguments, tmp_path / "out")
    said = json.loads(out)
    assert code == 4
    page = Path(said["report"])
    assert page == tmp_path / "out" / "run" / said["run"] / "report.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("<img") == 8
    assert "E_IO_EMPTY" in text
    code, out, _ = medmamba(*arguments, tmp_path / "none", "--no-report")
    assert json.loads(out)["report"] is None
    assert not list((tmp_path / "none").rglob("report.html"))


def test_a_page_that_cannot_be_made_costs_no_mask(
    model, images, medmamba, tmp_path, monkeypatch, caplog
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("medmamba.pipeline.run_report.write_page", refuse)
    code, out, _ = medmamba("predict", "-i", images, "-o", tmp_path / "out", "-m", model, "--json",
                            "--in-process")  # fmt: skip
    assert code == 0
    assert json.loads(out)["report"] is None
    assert "no report of the run (OSError)" in caplog.text
    assert (tmp_path / "out" / "case0.nii.gz").is_file()
