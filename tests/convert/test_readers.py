"""Readers of safetensors, and hashes of files."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from convert.formats.files import HashedFile
from convert.formats.readers import open_directory, open_file
from minigpt4_jax.errors import UserError

TYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]
no_deadline = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@no_deadline
@given(
    shapes=st.dictionaries(
        st.text("abcdef.", min_size=1),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(TYPES)),
        min_size=1,
        max_size=5,
    )
)
def test_safetensors_equal_those_read_by_the_library(tmp_path, shapes):
    state = {k: np.arange(int(np.prod(s))).reshape(s).astype(t) for k, (s, t) in shapes.items()}
    save_file(state, tmp_path / "x.safetensors", metadata={"a": "b"})
    reader = open_file(tmp_path / "x.safetensors")
    assert reader.metadata == {"a": "b"} and set(reader.tensors) == set(state)
    for name, want in state.items():
        got = reader.read(name)
        assert got.dtype == want.dtype and got.shape == want.shape and np.array_equal(got, want)


@pytest.mark.smoke
def test_the_hash_is_of_the_whole_file_whatever_was_read(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    path = tmp_path / "x"
    path.write_bytes(data)
    for reads in (
        [],
        [(0, 100)],
        [(10, 50), (60, 7), (99_000, 1000)],
        [(5000, 9), (10, 6000), (0, 1)],
    ):
        file = HashedFile(path)
        for offset, count in reads:
            assert file.read(offset, count).tobytes() == data[offset : offset + count]
        assert file.sha256() == hashlib.sha256(data).hexdigest()


def header(tmp_path, entries: dict, data: bytes):
    text = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        {"dtype": "F32"},
        ["F32"],
    ],
)
def test_damaged_safetensors_headers(tmp_path, entry):
    with pytest.raises(UserError, match="damaged"):
        open_file(header(tmp_path, {"w": entry}, bytes(4)))


def test_safetensors_of_the_wrong_length(tmp_path):
    entry = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    with pytest.raises(UserError, match="truncated"):
        open_file(header(tmp_path, entry, bytes(7)))
    with pytest.raises(UserError, match="damaged"):
        open_file(header(tmp_path, entry, bytes(9)))


def test_loose_shards_must_not_repeat_a_tensor(tmp_path):
    for name in ("a", "b"):
        save_file({"w": np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="two files"):
        open_directory(tmp_path)
