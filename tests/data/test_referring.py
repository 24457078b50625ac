"""RefCOCO in both directions and Visual Genome: boxes, texts, and pickles that contain only data."""

import io
import pickle
import re
from fractions import Fraction
from pathlib import Path

import pytest
from helpers.published_layouts import Disk, FixedDraws, choices, first_draw
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_jax.data.datasets.referring import _read_refs, _row, make_identify, make_refer
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT

pytestmark = pytest.mark.smoke
CAT = "COCO_train2014_000000000007.jpg"
IMAGE_SIZE = {"id": 7, "width": 200, "height": 100, "file_name": CAT}
FOLDERS = {
    "refcoco": ("refcoco", "unc"),
    "refcocop": ("refcoco+", "unc"),
    "refcocog": ("refcocog", "umd"),
}  # and split


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


def ref(**changes):
    sentences = [{"tokens": ["the", "ear"], "raw": "The Ear!", "sent": "the ear", "sent_id": 0},
            {"tokens": ["it"], "raw": "left one", "sent": "left one", "sent_id": 1}]  # fmt: skip
    return {"ref_id": 0, "ann_id": 4, "image_id": 7, "category_id": 1, "split": "train",
            "file_name": "COCO_train2014_000000000007_4.jpg", "sent_ids": [0, 1],
            "sentences": sentences, **changes}  # fmt: skip


def python2(value):
    """A pickle as Python 2 wrote it by default: protocol 0, texts as bytes."""
    if isinstance(value, dict):
        return "(d" + "".join(python2(k) + python2(v) + "s" for k, v in value.items())
    if isinstance(value, list):
        return "(l" + "".join(python2(v) + "a" for v in value)
    return f"S{value!r}\n" if isinstance(value, str) else f"I{value}\n"


def write_refs(disk, refs, folder="refcoco", split="unc", data=None):
    disk.json(f"refs/{folder}/instances.json", {
        "images": [IMAGE_SIZE], "categories": [{"id": 1, "name": "cat"}], "info": {},
        "annotations": [{"id": 4, "image_id": 7, "bbox": [20.0, 29, 50.5, 71], "category_id": 1}],
    })  # fmt: skip
    data = (python2(refs) + ".").encode() if data is None else data
    disk.bytes(f"refs/{folder}/refs({split}).p", data)


@pytest.mark.parametrize("name", FOLDERS)
def test_refcoco_in_both_directions(disk, name):
    cat = disk.picture(f"coco/{CAT}", (20, 10))  # the size in instances.json is used
    write_refs(disk, [ref(), ref(split="testA"), ref(ann_id=5), ref(sentences=[])], *FOLDERS[name])
    refer, identify = disk.open(name, "refs", "coco"), disk.open(f"inv{name}", "refs", "coco")
    box = "{<10><29><35><100>}"
    assert first_draw(refer) == Example((cat,), (f"{IMAGE_SLOT} [refer] the ear",), (box,))
    assert refer.example(0, FixedDraws(2, 1)) == Example(
        (cat,), (f"{IMAGE_SLOT} [refer] where is left one ?",), (box,)
    )
    asks = f"{IMAGE_SLOT} [identify] {box}"
    assert first_draw(identify) == Example((cat,), (asks,), ("the ear",))
    assert identify.example(0, FixedDraws(5, 1)) == Example(
        (cat,), (f"{IMAGE_SLOT} [identify] this {box} is",), ("left one",)
    )
    for source in (refer, identify):
        assert choices(source, 0, 2) == [7, 2]
        assert len(source) == 1 and source.left_out == {"of another split": 1}
        assert source.dropped == {
            "whose image or box is not in instances.json": 1, "without words": 1,
        }  # fmt: skip


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_refs_of_every_protocol(disk, protocol):
    disk.picture(f"coco/{CAT}")
    write_refs(disk, None, data=pickle.dumps([ref()], protocol))
    assert first_draw(disk.open("refcoco", "refs", "coco")).answers == ("{<10><29><35><100>}",)


class CreatesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(disk):
    (disk.root / "coco").mkdir()
    created = disk.root / "created"
    for refs in (
        CreatesFile(created),
        [ref(split=CreatesFile(created))],
        [ref(**{"ann_id": range(3)})],
    ):
        write_refs(disk, None, data=pickle.dumps(refs))
        with pytest.raises(UserError, match=r"refs\(unc\)\.p: asks to run .*; nothing was run"):
            disk.open("refcoco", "refs", "coco")
    assert not created.exists()


@given(st.integers(0, 400), st.integers(0, 255))
def test_damaged_pickles_are_user_errors(place, byte):
    data = bytearray(pickle.dumps([ref()]))
    data[place % len(data)] = byte
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: io.BytesIO(bytes(data)))
        try:
            assert isinstance(_read_refs(Path("refs(unc).p")), list)
        except UserError as e:
            assert "refs(unc).p" in str(e)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a pickle or is damaged"),
        (pickle.dumps({"refs": []}), "holds an object; expected a list of references"),
        (pickle.dumps([3]), r"refs\(unc\)\.p, row 1: a row is int 3"),
        (pickle.dumps([{"split": "train", "image_id": 7}]), 'row 1: .*"ann_id" is missing'),
        (pickle.dumps([ref(sentences=[{"sent": "it"}])]), 'row 1: .*"raw" is missing'),
    ],
)
def test_malformed_refs_are_named(disk, data, message):
    (disk.root / "coco").mkdir()
    write_refs(disk, None, data=data)
    with pytest.raises(UserError, match=message):
        disk.open("refcoco", "refs", "coco")


def test_refvg(disk):
    first = disk.picture("vg/VG_100K_2/1.jpg")
    url = "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg"
    disk.json("vg/image_data.json", [
        {"image_id": 1, "url": url, "width": 800, "height": 600, "coco_id": None},
        {"image_id": 3, "url": url.replace("1.jpg", "3.jpg"), "width": 800, "height": 600},
    ])  # fmt: skip

    def region(phrase, x, y, width, height):
        return {"region_id": 1, "image_id": 1, "phrase": phrase,
                "x": x, "y": y, "width": width, "height": height}  # fmt: skip

    disk.json("vg/region_descriptions.json", [
        {"id": 1, "regions": [
            region("the Clock is green.", 421, 57, 82, 139), region("large", 0, 0, 128, 128),
            region("at the edge", -4, 590, 20, 15), region("flat", 3, 3, 0, 9),
            region(" ", 1, 1, 9, 9),
        ]},
        {"id": 2, "regions": [region("lost", 1, 1, 9, 9)]},
        {"id": 3, "regions": [region("no file", 1, 1, 9, 9)]},
    ])  # fmt: skip
    source = disk.open("refvg", "vg")
    asks = f"{IMAGE_SLOT} [refer] the clock is green"
    assert first_draw(source) == Example((first,), (asks,), ("{<52><9><62><32>}",))
    assert first_draw(source, 1).answers == ("{<0><98><2><100>}",)  # clipped to the image
    assert source.left_out == {"of 16384 pixels or more": 1}
    assert source.dropped == {
        "with an empty box or one outside its image": 1, "without words": 1,
        "whose image is not in image_data.json": 1, "without their image": 1,
    }  # fmt: skip


@given(
    *[st.integers(-50, 700)] * 2, *[st.integers(1, 700)] * 2, *[st.integers(1, 640)] * 2,
    st.integers(0, 6), st.integers(0, 6),
)  # fmt: skip
def test_boxes_are_in_hundredths_of_the_image(x, y, width, height, W, H, refer, identify):
    row = _row("1.jpg", ["it"], [x, y, width, height], (W, H))
    if x >= W or y >= H or x + width <= 0 or y + height <= 0:
        assert row.fault
        return
    corners = [(x, W), (y, H), (x + width, W), (y + height, H)]
    expected = [int(100 * Fraction(min(max(v, 0), size), size)) for v, size in corners]
    (box,) = make_refer(("1.jpg",), row.fields, FixedDraws(refer, 0)).answers
    assert [
        int(n) for n in re.fullmatch(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>\}", box).groups()
    ] == expected
    (asks,) = make_identify(("1.jpg",), row.fields, FixedDraws(identify, 0)).questions
    assert asks.count(box) == 1
