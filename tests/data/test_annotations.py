"""Lists in JSON files, read one row at a time."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_jax.data.annotations import read_list
from minigpt4_jax.errors import UserError

pytestmark = pytest.mark.smoke
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
rows = st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=5)


def read(text, key=""):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt4_jax.data.annotations.read_text", lambda path: text)
        return [row for _, row in read_list(Path("rows.json"), key)]


@given(rows, st.sampled_from([None, 0, 2, "\t"]), st.booleans(), st.sampled_from(["", " ", "\n\n"]))
def test_lists_are_read_as_by_the_json_module(value, indent, ascii, around):
    assert read(around + json.dumps(value, indent=indent, ensure_ascii=ascii) + around) == value
    assert read(json.dumps({"info": {}, "data": value}, indent=indent), "data") == value


@given(rows, st.data())
def test_a_damaged_list_is_a_user_error(value, data):
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    text = text[:at] + data.draw(st.sampled_from(["", "[", "]", ",", "x", '"'])) + text[at + 1 :]
    try:
        assert read(text) == json.loads(text)
    except UserError as e:
        assert str(e).startswith("data rows.json")
        assert "is not JSON at line" in str(e) or "expected" in str(e)


def test_rows_and_errors_have_positions(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\ufeff[{"a": 1},\n {"a": 2}]', encoding="utf-8")
    assert list(read_list(path)) == [
        (f"data {path}, row 1", {"a": 1}), (f"data {path}, row 2", {"a": 2}),
    ]  # fmt: skip
    path.write_text('[{"a": 1},\n {"a" 2}]')
    with pytest.raises(UserError, match=r"rows\.json: is not JSON at line 2 \(.*, column 7\)"):
        list(read_list(path))
    for twice in ('[{"a": 1}, {"b": {"a": 1, "a": 2}}]', "[" + "1" * 5000 + "]"):
        path.write_text(twice)
        with pytest.raises(
            UserError, match=r"rows\.json: cannot be read \((an object has \"a\" twice|E)"
        ):
            list(read_list(path))
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        list(read_list(path))
    with pytest.raises(UserError, match="there is no such file"):
        list(read_list(tmp_path / "none.json"))
