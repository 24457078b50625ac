"""The file of rows that `batch` reads: its encoding, and the images of a row."""

import gzip
import json

import pytest

from minigpt4_jax.cli import batch
from minigpt4_jax.errors import UserError


def test_a_compressed_file_is_refused_once(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    with pytest.raises(UserError, match="compressed by gzip"):
        batch.read_rows(tmp_path / "rows.jsonl", None)


def test_images_under_other_keys_are_read_or_named(tmp_path):
    rows = [
        {"file_name": "a.png"}, {"images": ["a.png", "b.png"]}, {"photo": "a.PNG"},
        {"image": "a.png", "mask": "m.png"}, {"image": "a.png", "file_name": "b.png"}, {"id": "a"},
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row | {"prompt": "what is in a.png"}) + "\n" for row in rows)
    )
    one, two, other, beside, both, text = batch.read_rows(path, None)
    assert one.images == (str(tmp_path / "a.png"),) == beside.images
    assert two.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert '"photo" is \'a.PNG\'; name the key "image"' in other.error
    assert "has 'image' and 'file_name'; expected one of them" in both.error
    assert text.error is None and text.images == ()


def test_utf_8_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps({"prompt": "é"}).encode("utf-8-sig"))
    (row,) = batch.read_rows(tmp_path / "rows.jsonl", None)
    assert row.error is None and row.fields == {"prompt": "é"}
