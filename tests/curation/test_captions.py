"""Stage 1: caption lists to tables, in constant memory; the shards that img2dataset brings back."""

import csv
import gzip
import io
import json
import random
import tarfile
import tracemalloc

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4_jax import errors
from minigpt4_jax.cli import curate
from minigpt4_jax.curation import caption_lists
from minigpt4_jax.curation.caption_lists import read_list
from minigpt4_jax.errors import UserError

ROWS = [
    {"url": "http://a.example/1.jpg", "caption": "a dog", "rank": 1},
    {
        "url": "https://a.example/2.jpg",
        "caption": 'two\tcats, "one"\nblack \u00e9\u732b',
        "rank": 2,
    },
    {"url": "ftp://a.example/3.jpg", "caption": "no", "rank": 3},
    {"url": "http://a.example/4.jpg", "caption": " ", "rank": 4},
    {"url": None, "caption": "x", "rank": None},
    {"url": "http://a.example/5.jpg", "caption": "[}], {\\", "rank": 5.5},
]


@pytest.fixture
def command(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: curate.main([*map(str, arguments)]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def as_the_original(rows):
    """The TSV of convert_cc_sbu.py: csv.DictWriter with tabs over all rows."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=rows[0].keys(), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("form", ("list", "indented", "lines", "gzip"))
def test_lists_become_the_originals_table(command, tmp_path, form):
    text = {
        "indented": json.dumps(ROWS, indent=2), "lines": "\n".join(map(json.dumps, ROWS)) + "\n",
    }.get(form, json.dumps(ROWS, ensure_ascii=False))  # fmt: skip
    source = tmp_path / ("list.json.gz" if form == "gzip" else "list.json")
    source.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode())
    out = tmp_path / "list.tsv"
    code, said, err = command("captions", f"--input={source}", f"--output={out}")
    assert code == 0, err
    assert "3 of 6 rows" in said and "2 without a URL" in said and "1 without a caption" in said
    assert "img2dataset --url_list=" in said and "--image_size=224" in said
    assert out.read_text() == as_the_original([ROWS[0], ROWS[1], ROWS[5]])
    code, _, err = command("captions", f"--input={source}", f"--output={out}")
    assert code == 2 and "pass --overwrite" in err
    table = tmp_path / "list.parquet"
    assert command("captions", f"--input={source}", f"--output={table}")[0] == 0
    rows = pyarrow.parquet.read_table(table).to_pylist()
    assert [row["caption"] for row in rows] == [ROWS[i]["caption"] for i in (0, 1, 5)]


FIELDS = st.dictionaries(st.text(max_size=6), st.text() | st.integers() | st.none(), max_size=4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(FIELDS, max_size=8),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
)  # fmt: skip
def test_pieces_of_any_size_give_what_json_gives(tmp_path_factory, rows, chunk, indent):
    path = tmp_path_factory.getbasetemp() / "pieces.json"
    path.write_text(
        json.dumps(rows, ensure_ascii=chunk % 2 == 0, indent=indent), "utf-8", "surrogatepass"
    )
    try:
        path.read_text("utf-8")
    except UnicodeDecodeError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_lists, "CHUNK", chunk)
        assert list(read_list(path)) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"url": "a"}, {"url": ', "row 2: is not JSON"),
        ('[{"url": "a"}', "after row 1 comes the end of the file"),
        ('[{"url": "a"} {"url": "b"}]', "after row 1 comes '{'"),
        ('[{"url": "a"}] 3', "more after the end of its list"),
        ("[3]", "row 1: a row is int 3"),
        ("url\tcaption", "starts with 'u'"),
        ("", "starts with ''"),
        ("[]", "has no row with a URL"),
        ('[{"url": "http://a", "caption": "b"}, {"c": 1, "url": "http://a", "caption": "b"}]', "the keys c"),
        ('[{"url": "http://a", "caption": "b", "c": []}]', '"c" is a list'),
    ],
)  # fmt: skip
def test_damaged_lists_leave_nothing(command, tmp_path, text, message):
    source = tmp_path / "list.json"
    source.write_text(text)
    for name in ("list.tsv", "list.parquet"):
        code, _, err = command("captions", f"--input={source}", f"--output={tmp_path / name}")
        assert code == 2 and message in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["list.json"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    for count in (20_000, 60_000):
        source = tmp_path / f"{count}.json"
        row = json.dumps(
            {"url": "http://a.example/1.jpg", "caption": "a caption of some words " * 4}
        )
        source.write_text("[" + ", ".join([row] * count) + "]")
        counts = caption_lists.Counts()
        tracemalloc.start()
        rows = caption_lists.usable_rows(read_list(source), counts)
        caption_lists.write_tsv(rows, tmp_path / "out.tsv")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert counts.written == count
    assert source.stat().st_size > 7_000_000
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 8_000_000


# --- shards -----------------------------------------------------------------------------------


def write_shard(folder, number, rows, *, stats=True):
    """A shard as img2dataset writes it."""
    rng = random.Random(number)
    with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
        for n in range(rows):
            image = io.BytesIO()
            Image.new("RGB", (20, 16), tuple(rng.randrange(256) for _ in "rgb")).save(image, "JPEG")
            for suffix, data in (("jpg", image.getvalue()), ("json", b'{"caption": "a text"}')):
                member = tarfile.TarInfo(f"{number:05}{n:04}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if stats:
        statuses = {"success": rows, "HTTP Error 404: Not Found": 2}
        content = {
            "count": rows + 2,
            "successes": rows,
            "failed_to_download": 2,
            "status_dict": statuses,
        }
        (folder / f"{number:05}_stats.json").write_text(json.dumps(content))


def test_downloaded_shards_are_summed_up_and_opened(command, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in (0, 1):
        write_shard(folder, number, 3)
    sheet = f"--sheet={tmp_path / 'sheet.png'}"
    code, said, _ = command("shards", folder, sheet)
    assert code == 0, said
    assert "2 shards, 0 missing" in said and "6 of 10 images downloaded (60.0%)" in said
    assert "4 HTTP Error 404" in said and (tmp_path / "sheet.png").exists()
    code, said, _ = command("shards", folder, sheet, "--expected=4")
    assert code == 1 and "2 missing" in said and "missing: 00002.tar, 00003.tar" in said
    write_shard(folder, 2, 2, stats=False)
    code, said, _ = command("shards", folder, sheet)
    assert code == 1 and "1 shards without statistics" in said and "00002.tar" in said
    data = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(data[: len(data) // 2])
    (folder / "00002_stats.json").write_text('{"count": 2, "successes": 2}')
    code, said, _ = command("shards", folder, sheet)
    assert code == 1 and "shards that are damaged" in said
    (folder / "00002_stats.json").write_text("[]")
    code, _, err = command("shards", folder, sheet)
    assert code == 2 and "is no statistics file" in err


def test_a_folder_without_shards_is_told(command, tmp_path):
    code, _, err = command("shards", tmp_path)
    assert code == 2 and "has no shard such as 00000.tar" in err
    with pytest.raises(UserError, match="there is no such directory"):
        curate.main(["shards", str(tmp_path / "none")])
