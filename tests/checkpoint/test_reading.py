"""Reading tensors: by byte ranges, in threads ahead of their use, and quantized by several threads."""

import threading
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from minigpt4_jax.checkpoint.model_directory import ReadableTensors
from minigpt4_jax.checkpoint.quantized_tensors import QuantizedTensors, quantize_in_chunks
from minigpt4_jax.checkpoint.read_ahead import HostArray, read_ahead
from minigpt4_jax.storage.safetensors_file import SafetensorsFile

SECONDS = 20  # for what other threads should do at once


# --- parts of a file -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8])
def test_parts_of_a_file(tmp_path, dtype):
    array = np.arange(60).reshape(5, 4, 3).astype(dtype)
    save_file(
        {"first": np.ones(3, np.int8), "a": array, "scalar": np.array(array[1, 2, 0])},
        tmp_path / "f",
    )
    file = SafetensorsFile(tmp_path / "f")
    assert set(file.keys()) == {"first", "a", "scalar"}
    for index in np.s_[:, :, :], np.s_[1:4], np.s_[2:3, 1:3], np.s_[:, :, 1:2], np.s_[4:, :, :]:
        part = file.get_slice("a")[index if isinstance(index, tuple) else (index,)]
        assert part.dtype == dtype
        np.testing.assert_array_equal(part, array[index])
    assert file.get_tensor("scalar") == array[1, 2, 0]
    assert file.get_tensor("a").ctypes.data % 64 == 0  # a CPU device uses it without a copy


# --- reading ahead ---------------------------------------------------------------------------------


def test_arrays_are_read_at_the_same_time_and_come_in_order():
    both_begun = threading.Barrier(2, timeout=SECONDS)

    def read(i):
        both_begun.wait()
        return np.full(2, i)

    arrays = [HostArray(16, lambda i=i: [partial(read, i)]) for i in range(4)]
    assert [int(a[0]) for a in read_ahead(arrays)] == [0, 1, 2, 3]


def test_memory_is_bounded():
    """Of arrays that were not yielded; one may be larger than the limit."""
    begun = []

    def array(i, nbytes):
        def begin():
            begun.append(i)
            return [lambda: np.zeros(nbytes, np.uint8)]

        return HostArray(nbytes, begin)

    sizes = [40, 40, 40, 200, 10, 10]
    read = read_ahead((array(i, n) for i, n in enumerate(sizes)), limit=100)
    seen = [(next(read).nbytes, list(begun)) for _ in sizes]
    assert seen == [
        (40, [0, 1]), (40, [0, 1, 2]), (40, [0, 1, 2]), (200, [0, 1, 2, 3]),
        (10, [0, 1, 2, 3, 4, 5]), (10, [0, 1, 2, 3, 4, 5]),
    ]  # fmt: skip


def test_an_error_comes_in_its_arrays_place():
    def fail():
        raise ValueError("broken")

    good = HostArray(8, lambda: [lambda: np.zeros(1)])
    read = read_ahead([good, HostArray(8, lambda: [lambda: np.zeros(1), fail]), good])
    next(read)
    with pytest.raises(ValueError, match="broken"):
        next(read)


# --- quantized while they are read -------------------------------------------------------------------


class _Counted(ReadableTensors):
    """One matrix, whose reads are counted and slow enough to overlap."""

    def __init__(self, weight):
        self.weight, self.reads, self.release = weight, [], threading.Event()

    def __getitem__(self, name):
        return self.part(name, (slice(None),) * 2)

    def part(self, name, index):
        self.reads.append(index[0])
        self.release.wait(SECONDS)
        return self.weight[index]

    def shape(self, name):
        return self.weight.shape

    def __iter__(self):
        return iter(["llm.head.weight"])

    def __len__(self):
        return 1


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_matrix_is_quantized_once_for_all_threads(scheme):
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    stored = _Counted(weight)
    tensors = QuantizedTensors(stored, scheme)
    levels, scale = quantize_in_chunks(weight, scheme)
    rows = slice(0, 6)
    requests = [
        partial(tensors.part, "llm.head.weight", (rows, slice(None))),
        partial(tensors.part, "llm.head.weight_scale", (rows, slice(None))[: scale.ndim]),
    ]
    read = read_ahead(HostArray(1, lambda request=request: [request]) for request in requests)
    threading.Timer(0.1, stored.release.set).start()
    np.testing.assert_array_equal(next(read), levels)
    np.testing.assert_array_equal(next(read), scale)
    assert stored.reads == [slice(0, 6)]
    # rows and columns in turn, as the devices of a mesh request them
    for rows in slice(0, 2), slice(2, 6):
        for columns in slice(0, 16), slice(16, None):
            part = tensors.part("llm.head.weight", (rows, columns))
            np.testing.assert_array_equal(part, levels[rows, columns])
            part = tensors.part("llm.head.weight_scale", (rows,))
            np.testing.assert_array_equal(part, scale[rows])
    assert stored.reads[1:] == [slice(0, 2), slice(2, 6)]


def test_scales_are_kept_until_they_are_requested():
    """Stacked layers are read as all levels, then all scales: no matrix is quantized twice."""
    stored = _Counted(np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32))
    stored.release.set()
    tensors = QuantizedTensors(stored, "int8")
    for part in "", "_scale":
        for start in range(8):
            index = (slice(start, start + 1), slice(None))[: 1 if part else 2]
            tensors.part(f"llm.head.weight{part}", index)
    assert len(stored.reads) == 8
