"""Foreign pickles: plain data and tensors come through, everything else is refused unexecuted."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medmamba.errors import BundleError, SecurityError
from medmamba.interop.pickle_reader import read_foreign_pickle


class Planted:
    """Writes a file when unpickled by a reader that runs what it reads."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_a_checkpoint_comes_through_unchanged(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "network_weights": OrderedDict(
            plain=base,
            view=base[1:, ::2].t(),
            half=torch.ones(3, dtype=torch.bfloat16),
            whole=torch.tensor([1, 2]),
            flag=torch.tensor([True, False]),
            scalar=torch.tensor(2.5),
            empty=torch.zeros(0, 3),
            parameter=torch.nn.Parameter(torch.full((2,), 7.0)),
        ),
        "logging": {"dice": [np.float64(0.5), np.float32(0.25)], "ema": np.arange(6).reshape(2, 3)},
        "big_endian": np.array([1.5, 2.5], dtype=">f4"),
        "init_args": {"fold": 0, "configuration": "2d", "axes": (0, 1), "missing": None},
        "where": torch.device("cpu"),
        "what": torch.float16,
        "size": torch.Size([1, 2]),
        "names": {"a", "b"},
    }
    found = read_foreign_pickle(saved(content, tmp_path / "c.pth"))
    assert set(found) == set(content)
    for name, tensor in content["network_weights"].items():
        assert torch.equal(found["network_weights"][name], tensor), name
        assert found["network_weights"][name].dtype == tensor.dtype
    assert found["logging"]["dice"] == content["logging"]["dice"]
    assert np.array_equal(found["logging"]["ema"], content["logging"]["ema"])
    assert np.array_equal(found["big_endian"], content["big_endian"])
    for key in ("init_args", "where", "what", "size", "names"):
        assert found[key] == content[key]


def test_planted_program_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "planted"
    path = saved({"network_weights": {}, "extra": Planted(target)}, tmp_path / "c.pth")
    with pytest.raises(SecurityError, match=r"mkdir.*nothing of it was run") as caught:
        read_foreign_pickle(path)
    assert caught.value.exit_code == 7
    assert not target.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("numpy", "load"),
        ("numpy.testing._private.utils", "runstring"),
        ("medmamba.files", "write_atomic"),
    ],
)
def test_names_outside_the_list_are_refused(tmp_path: Path, module: str, name: str) -> None:
    program = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(SecurityError, match=f"{module}.{name}"):
        read_foreign_pickle(tmp_path / "c.pth")


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    path = saved({"a": np.array([{"x": 1}], dtype=object)}, tmp_path / "c.pth")
    with pytest.raises(SecurityError, match="arbitrary objects"):
        read_foreign_pickle(path)


def test_attributes_set_by_a_pickle_stay_in_it(tmp_path: Path) -> None:
    # BUILD on a named function sets attributes on what find_class returned.
    program = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x05\x00\x00\x00marksK\x01sb."
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("archive/data.pkl", program)
    read_foreign_pickle(tmp_path / "c.pth")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "marks")


def test_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = saved({"a": torch.zeros(4)}, tmp_path / "c.pth")
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    storage = next(name for name in members if name.endswith("data/0"))
    members[storage] = b"\0" * 8
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(BundleError, match="damaged"):
        read_foreign_pickle(path)


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps({"a": 1})])
def test_other_formats_are_refused_with_advice(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(BundleError, match="zip format"):
        read_foreign_pickle(tmp_path / "c.pth")


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    path = saved({"a": torch.zeros(1000)}, tmp_path / "c.pth")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BundleError, match=r"c\.pth"):
        read_foreign_pickle(path)
    with pytest.raises(BundleError, match="does not exist"):
        read_foreign_pickle(tmp_path / "none.pth")
