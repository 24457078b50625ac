"""Reading .pth and .bin without torch: equal to torch.load for all dtypes, strides and shared storages."""

import contextlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.formats.pickles import read_pickle
from convert.formats.readers import open_file
from minigpt4_jax.errors import UserError

torch = pytest.importorskip("torch")
ZIP = (True, False)  # the format of torch since 1.6, and the older one

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
no_deadline = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(path: Path, state: dict) -> None:
    reader = open_file(path)
    assert set(reader.tensors) == set(state)
    for name, want in state.items():
        got = reader.read(name)
        want = want.detach()
        assert got.shape == tuple(want.shape) == reader.tensors[name].shape
        assert got.dtype == reader.tensors[name].dtype
        if want.dtype == torch.bfloat16:
            assert got.dtype.name == "bfloat16"
            assert np.array_equal(got.view(np.uint16), want.contiguous().view(torch.uint16).numpy())
        else:
            assert got.dtype == want.numpy().dtype
            assert np.array_equal(got, want.numpy(), equal_nan=got.dtype.kind == "f")


@st.composite
def tensors(draw):
    """A tensor, often a view: transposed, sliced with steps, narrowed, expanded."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    x = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["transpose", "step", "narrow", "expand"]))
        if x.ndim == 0:
            break
        axis = draw(st.integers(0, x.ndim - 1))
        if kind == "transpose":
            x = x.transpose(0, axis)
        elif kind == "step":
            x = x[(slice(None),) * axis + (slice(None, None, 2),)]
        elif kind == "narrow" and x.shape[axis] > 1:
            x = x.narrow(axis, 1, x.shape[axis] - 1)
        elif kind == "expand":
            x = x.unsqueeze(axis).expand(*x.shape[:axis], 2, *x.shape[axis:])
    return x


@no_deadline
@given(
    state=st.dictionaries(st.text(min_size=1, max_size=8), tensors(), min_size=1, max_size=4),
    new=st.booleans(),
)
def test_state_dicts_equal_those_read_by_torch(tmp_path, state, new):
    path = tmp_path / "x.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=new)
    check(path, state)


@pytest.mark.parametrize("new", ZIP)
def test_shared_storages_parameters_and_other_values_beside_weights(tmp_path, new):
    big = torch.arange(24.0).reshape(4, 6)
    linear = torch.nn.Linear(3, 2)
    state = {"a": big, "b": big[1:3, ::2], "c": big.T, "tied": big, "p": torch.nn.Parameter(big[0])}
    state |= {f"layer.{k}": v for k, v in linear.state_dict().items()}
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(3)).sum().backward()
    optimizer.step()
    path = tmp_path / "x.pth"
    saved = {
        "model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "scaler": None,
        "config": {"run": {"lr": 1e-4, "sizes": (1, 2), "names": {"x"}}}, "dtype": torch.float16,
        "size": torch.Size([2, 3]), "device": torch.device("cpu"), "big": 1 << 70, "text": "é\n",
    }  # fmt: skip
    torch.save(saved, path, _use_new_zipfile_serialization=new)
    check(path, state)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s},
                                  lambda s: {"module": {"model": s}}])  # fmt: skip
def test_nested_state_dicts(tmp_path, wrap):
    state = torch.nn.Linear(2, 2).state_dict()
    torch.save(wrap(state), tmp_path / "x.pth")
    check(tmp_path / "x.pth", state)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "b": 1}, "text", {"model": {"x": 3}}])
def test_files_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match="expected a dictionary of weights"):
        open_file(tmp_path / "x.pth")


@pytest.mark.parametrize("new", ZIP)
def test_a_saved_module_names_its_class_and_is_not_built(tmp_path, new):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        open_file(tmp_path / "x.pth")


class RunsCommand:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new", ZIP)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_not_run(tmp_path, new, protocol):
    torch.save({"model": {"w": torch.ones(2)}, "x": RunsCommand(tmp_path / "ran")}, tmp_path / "x.pth",
               _use_new_zipfile_serialization=new, pickle_protocol=protocol)  # fmt: skip
    with pytest.raises(UserError, match=r"posix\.system"):
        open_file(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


MALICIOUS = [
    b"cbuiltins\neval\n(V1\ntR.", b"c__builtin__\nexec\n(V1\ntR.", b"(S'id'\nios\nsystem\n.",
    b"cos\nsystem\n(S'id'\ntR.", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
    b"ctorch\nload\n(V1\ntR.", b"ctorch.storage\n_load_from_bytes\n(V1\ntR.",
    b"ctorch.serialization\nStorage\n.", b"\x80\x02\x82\x01.", b"(cos\nsystem\nS'id'\no.",
    b"cbuiltins\ngetattr\n(ctorch\nSize\nS'x'\ntR.", b"ctorch\nhub.FloatStorage\n(tR.",
    b"cnumpy.core.multiarray\n_reconstruct\n(tR.", b"Pno.",
]  # fmt: skip


@pytest.mark.parametrize("data", MALICIOUS)
def test_other_ways_to_run_code_are_refused(data):
    with pytest.raises(UserError):
        read_pickle(io.BytesIO(data), "x")


@no_deadline
@given(data=st.binary(max_size=80))
def test_random_bytes_are_a_user_error_or_plain_data(data):
    with contextlib.suppress(UserError):
        read_pickle(io.BytesIO(b"\x80\x02" + data + b"."), "x")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


@no_deadline
@given(value=plain, protocol=st.integers(0, 5))
def test_plain_data_equals_that_read_by_pickle(value, protocol):
    if protocol < 3 and b"" in _leaves(value):
        return  # bytes go through _codecs.encode there, as text
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol)), "x") == value


def _leaves(value):
    if isinstance(value, bytes):
        yield b""
    elif isinstance(value, dict):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _leaves(v)


@pytest.mark.parametrize("new", ZIP)
def test_every_truncation_is_a_user_error(tmp_path, new):
    state = {"a": torch.ones(5, 7), "b": torch.zeros(3)}
    torch.save({"model": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    data = (tmp_path / "x.pth").read_bytes()
    for end in range(0, len(data) - 1, 37):
        cut = tmp_path / "cut.pth"
        cut.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"cut\.pth"):
            reader = open_file(cut)
            for name in reader.tensors:
                reader.read(name)


def test_a_tensor_past_its_storage_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(300)}, path)
    data = path.read_bytes()
    assert data.count(b"M,\x01") == 2  # BININT2 300: the storage's size and the tensor's
    at = data.rindex(b"M,\x01")
    path.write_bytes(data[:at] + b"M-\x01" + data[at + 3 :])
    with pytest.raises(UserError, match=r"past its storage|damaged"):
        open_file(path)
