import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmamba.errors import DatasetError, EnvironmentFault
from medmamba.preprocessing.pipeline import PreprocessedCase, UndoRecord
from medmamba.preprocessing.store import (
    CHUNK_PER_PATCH,
    LARGEST_BLOCK_BYTES,
    LARGEST_CHUNK_BYTES,
    CaseStore,
    chunk_shapes,
)
from medmamba.volume import Geometry

SIZES = st.tuples(*[st.integers(1, 400)] * 3)


def made_case(shape: tuple[int, int, int] = (20, 30, 40), seed: int = 0) -> PreprocessedCase:
    random = np.random.default_rng(seed)
    record = UndoRecord(
        geometry=Geometry.from_spacing(shape, (1.0, 1.0, 1.0)),
        transpose_forward=(0, 1, 2),
        spacing_mm=(1.0, 1.0, 1.0),
        shape=shape,
        crop_box=((0, shape[0]), (0, shape[1]), (0, shape[2])),
        shape_after_crop=shape,
        working_spacing_mm=(1.0, 1.0, 1.0),
        working_shape=shape,
    )
    return PreprocessedCase(
        data=random.normal(size=(2, *shape)).astype(np.float32),
        labels=random.integers(-1, 3, (1, *shape)).astype(np.int16),
        record=record,
        class_locations={
            (1,): random.integers(0, 20, (7, 3)).astype(np.int32),
            (2,): np.zeros((0, 3), np.int32),
            (-1, 0, 1): random.integers(0, 20, (3, 3)).astype(np.int32),
        },
    )


def test_what_was_written_is_read(tmp_path) -> None:
    store, case = CaseStore(tmp_path), made_case()
    store.write("case_1", case, key="k", patch_size=(16, 16, 16))
    found = store.open("case_1")
    np.testing.assert_array_equal(found.data[:], case.data)
    np.testing.assert_array_equal(found.data[:, 3:9, 4:8, 30:40], case.data[:, 3:9, 4:8, 30:40])
    np.testing.assert_array_equal(found.labels[:], case.labels)
    assert found.labels.dtype == np.int16
    assert found.record == case.record
    assert found.shape == (20, 30, 40)
    assert list(found.class_locations) == list(case.class_locations)
    for key, where in case.class_locations.items():
        np.testing.assert_array_equal(found.class_locations[key], where)


def test_a_case_without_labels(tmp_path) -> None:
    store, case = CaseStore(tmp_path), made_case()
    bare = PreprocessedCase(data=case.data, labels=None, record=case.record, class_locations={})
    store.write("case_1", bare, key="k", patch_size=(16, 16))
    found = store.open("case_1")
    assert found.labels is None
    assert found.class_locations == {}


def test_a_case_exists_under_its_key_only_and_only_when_whole(tmp_path) -> None:
    store = CaseStore(tmp_path)
    assert not store.has("case_1", "k")
    store.write("case_1", made_case(), key="k", patch_size=(16, 16, 16))
    store.write("case_0", made_case(), key="k", patch_size=(16, 16, 16))
    assert store.has("case_1", "k")
    assert not store.has("case_1", "other")
    assert store.case_ids() == ("case_0", "case_1")
    (tmp_path / "case_1.json").unlink()
    assert store.case_ids() == ("case_0",)
    with pytest.raises(DatasetError, match="case_1"):
        store.open("case_1")


def test_damage_is_an_error_that_names_the_file(tmp_path) -> None:
    store = CaseStore(tmp_path)
    store.write("case_1", made_case(), key="k", patch_size=(16, 16, 16))
    (tmp_path / "case_1.b2nd").write_bytes(b"not an array")
    with pytest.raises(DatasetError, match=r"case_1\.b2nd"):
        store.open("case_1")
    (tmp_path / "case_1.json").write_text("{}")
    assert not store.has("case_1", "k")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
def test_a_disk_that_fills_up_is_said_to_and_what_is_finished_stays(tmp_path) -> None:
    import resource

    store = CaseStore(tmp_path)
    store.write("a", made_case(), key="k", patch_size=(4, 4, 4))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match=r"b\.b2nd: .*File too large") as caught:
            store.write("b", made_case(), key="k", patch_size=(4, 4, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "E_IO_WRITE"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_blosc2_cannot_explain_is_an_error_of_the_disk(tmp_path, monkeypatch) -> None:
    def broken(*arguments, urlpath: str, **options) -> None:
        Path(urlpath).write_bytes(b"half")
        raise RuntimeError("Error while creating the NDArray")

    monkeypatch.setattr(blosc2, "asarray", broken)
    with pytest.raises(EnvironmentFault, match="Error while creating"):
        CaseStore(tmp_path).write("a", made_case(), key="k", patch_size=(4, 4, 4))
    assert not list(tmp_path.iterdir())


def test_the_same_case_gives_the_same_bytes(tmp_path) -> None:
    for name in ("one", "two"):
        CaseStore(tmp_path / name).write("c", made_case(), key="k", patch_size=(16, 16, 16))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 4
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@given(shape=SIZES, patch=SIZES, itemsize=st.sampled_from([2, 4]))
def test_chunks_and_blocks_keep_their_limits(
    shape: tuple[int, ...], patch: tuple[int, ...], itemsize: int
) -> None:
    chunk, block = chunk_shapes((3, *shape), patch, itemsize)
    assert chunk[0] == block[0] == 1
    assert np.prod(block) * itemsize <= LARGEST_BLOCK_BYTES
    assert np.prod(chunk) * itemsize <= LARGEST_CHUNK_BYTES
    for c, b, size, edge in zip(chunk[1:], block[1:], shape, patch, strict=True):
        assert b <= c <= size
        assert c <= max(b, CHUNK_PER_PATCH * edge + b)
