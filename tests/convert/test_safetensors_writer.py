"""The streamed writer of safetensors files, against the safetensors library."""

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from convert.formats.safetensors_writer import StreamedTensor, split_shards, write_safetensors
from minigpt4_jax.storage.safetensors_header import DTYPES, read_header

ARRAYS = {
    "odd": np.arange(3, dtype=np.float16),
    "wide": np.arange(6, dtype=np.float32).reshape(2, 3),
    "brain": np.arange(5, dtype=ml_dtypes.bfloat16),
    "scalar": np.array(7.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "columns": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}
NAMES = {"float16": "F16", "float32": "F32", "bfloat16": "BF16"}


def streamed(arrays=ARRAYS):
    return {
        name: StreamedTensor(NAMES[a.dtype.name], a.shape, lambda a=a: a)
        for name, a in arrays.items()
    }


@pytest.mark.smoke
def test_the_library_reads_what_is_written(tmp_path):
    path, sizes = tmp_path / "x.safetensors", []
    write_safetensors(path, streamed(), sizes.append)
    found = load_file(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    assert sum(sizes) == sum(a.nbytes for a in ARRAYS.values())
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_data_is_aligned_to_its_type(tmp_path):
    """Narrow types beside wide ones: readers that map the file need that."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, streamed())
    data = path.read_bytes()
    entries, _ = read_header(lambda start, stop: data[start:stop], len(data))
    assert entries.keys() == ARRAYS.keys()
    assert not any(entry.start % DTYPES[entry.dtype].itemsize for entry in entries.values())


def test_a_tensor_is_read_after_the_one_before_it_was_written(tmp_path):
    """So that one tensor is in memory at a time."""
    events = []

    def load(name):
        events.append(f"read {name}")
        return np.zeros(2, np.float32)

    tensors = {n: StreamedTensor("F32", (2,), lambda n=n: load(n)) for n in "ab"}
    write_safetensors(tmp_path / "x.safetensors", tensors, lambda size: events.append("written"))
    assert events == ["read a", "written", "read b", "written"]
    wrong = {"a": StreamedTensor("F32", (3,), lambda: load("a"))}
    with pytest.raises(ValueError, match="a: float32"):
        write_safetensors(tmp_path / "y.safetensors", wrong)


def test_shards_have_a_limit():
    sizes = {"a": 1, "b": 2, "c": 9, "d": 1}
    tensors = streamed({name: np.zeros(size, np.float32) for name, size in sizes.items()})
    assert [list(shard) for shard in split_shards(tensors, 12)] == [["a", "b"], ["c"], ["d"]]
    assert [list(shard) for shard in split_shards(tensors, 1000)] == [["a", "b", "c", "d"]]
    assert split_shards({}, 10) == [{}]
