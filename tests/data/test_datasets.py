"""Published datasets, read from miniatures of their files: prompt, answer and image of known rows."""

import logging
import pickle

import numpy as np
import pytest
from helpers.published_layouts import Disk, FixedDraws, choices, first_draw
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_jax.data.datasets import DATASETS, open_dataset
from minigpt4_jax.data.datasets.vqa import VQA_PROMPTS, make_answered
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT

pytestmark = pytest.mark.smoke
CAT, DOG = "COCO_train2014_000000000007.jpg", "COCO_train2014_000000000009.jpg"


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path)


@pytest.fixture
def coco(disk):
    """Paths of the images of a cat and a dog."""
    return disk.picture(f"coco/{CAT}"), disk.picture(f"coco/{DOG}")


def examples(source):
    return [first_draw(source, n) for n in range(len(source))]


# --- captions --------------------------------------------------------------------------------


def test_cc_sbu_align(disk):
    cat = disk.picture("align/image/7.jpg")
    disk.json("align/filter_cap.json", {"annotations": [
        {"image_id": "7", "caption": "A Cat. It sits."}, {"image_id": 8, "caption": "gone"},
        {"image_id": 7, "caption": " "},
    ]})  # fmt: skip
    source = disk.open("cc_sbu_align", "align")
    assert examples(source) == [Example((cat,), (), ("A Cat. It sits.",))]
    assert source.dropped == {"without their image": 1, "without a caption": 1}
    assert examples(disk.open("cc_sbu_align", "align/filter_cap.json")) == examples(source)


def test_coco_caption(disk, coco):
    disk.json("ann/coco_karpathy_train.json", [
        {"image": f"train2014/{CAT}", "caption": 'A "Cat".\n', "image_id": "coco_7"},
        {"image": "val2014/COCO_val2014_000000000001.jpg", "caption": "no", "image_id": "coco_1"},
    ])  # fmt: skip
    source = disk.open("coco_caption", "ann", "coco")
    asks = f"{IMAGE_SLOT} [caption] Briefly describe this image."
    assert examples(source) == [Example((coco[0],), (asks,), ("a cat",))]
    assert choices(source, 0, 1) == [17]
    photo = source.example(0, FixedDraws(6))
    assert photo.questions == (f"{IMAGE_SLOT} [caption] A photo of ",)  # one more space comes later
    assert source.left_out == {"with an image that is not of train2014": 1}
    assert source.dropped == {}


def test_textcaps_caption(disk):
    sign = disk.picture("textcaps/train_images/0f.jpg")
    disk.json("textcaps/TextCaps_0.1_train.json", {"dataset_name": "textcaps", "data": [
        {"image_id": "0f", "caption_str": "A sign: STOP!", "image_width": 8, "caption_id": 1},
    ]})  # fmt: skip
    source = disk.open("textcaps_caption", "textcaps")
    asks = f"{IMAGE_SLOT} [caption] Briefly describe this image."
    assert examples(source) == [Example((sign,), (asks,), ("a sign stop",))]
    assert choices(source, 0, 1) == [17]


# --- questions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "key"),
    [
        ("coco_vqa", "vqa_train.json", "answer"),
        ("ok_vqa", "okvqa_train.json", "answer"),
        ("aok_vqa", "aokvqa_v1p0_train.json", "direct_answers"),
    ],
)
def test_questions_about_coco(disk, coco, name, file, key):
    cat = {"image": f"train2014/{CAT}", "question_id": 1, "question": "What Animal is this?"}
    lost = {"image": "val2014/COCO_val2014_000000000001.jpg", "question_id": 2, "question": "Who?"}
    disk.json(f"ann/{file}", [
        {**cat, key: ["Cat.", "cat", "kitten"]}, {**lost, key: ["me"]}, {**cat, key: ["...", ""]},
    ])  # fmt: skip
    if name == "coco_vqa":
        disk.json("ann/vqa_val.json", [{**cat, "image": f"train2014/{DOG}", key: ["dog"] * 10}])
    source = disk.open(name, "ann", "coco")
    asks = f"{IMAGE_SLOT} [vqa] what animal is this?"
    assert first_draw(source) == Example((coco[0],), (asks,), ("cat",))
    assert source.example(0, FixedDraws(1, 2)) == Example(
        (coco[0],),
        (f"{IMAGE_SLOT} [vqa] Based on the image, respond to this question with a short answer: "
         "what animal is this?",),
        ("kitten",),
    )  # fmt: skip
    assert source.dropped == {"without their image": 1, "without a question or an answer": 1}
    assert len(source) == (2 if name == "coco_vqa" else 1)
    if name == "coco_vqa":
        assert first_draw(source, 1) == Example((coco[1],), (asks,), ("dog",))


def test_aok_vqa_as_its_authors_publish_it(disk, coco):
    disk.json("aokvqa_v1p0_train.json", [
        {"image_id": 9, "question": "Why?", "direct_answers": ["so"], "choices": ["so", "no"]},
    ])  # fmt: skip
    source = disk.open("aok_vqa", ".", "coco")
    assert first_draw(source) == Example((coco[1],), (f"{IMAGE_SLOT} [vqa] why?",), ("so",))


@given(st.lists(st.sampled_from(["yes", "no", "2", "a red cup"]), min_size=1, max_size=10))
def test_answers_are_drawn_in_proportion_to_their_frequency(answers):
    for prompt in range(len(VQA_PROMPTS)):
        drawn = [
            make_answered((), ["q?", answers], FixedDraws(prompt, n)).answers[0]
            for n in range(len(answers))
        ]
        assert sorted(drawn) == sorted(answers)


@pytest.mark.parametrize("authors", [False, True])
def test_gqa(disk, authors):
    picture = disk.picture("gqa/images/23.jpg")
    row = {"question": "Is the sky Dark?", "answer": "Yes", "fullAnswer": "Yes, it is dark."}
    rows = {"02930152": {**row, "imageId": "23"}} if authors else [{**row, "image": "23.jpg"}]
    disk.json("gqa/train_balanced_questions.json", rows)
    source = disk.open("gqa", "gqa")
    asks = f"{IMAGE_SLOT} [vqa] is the sky dark?"
    assert examples(source) == [Example((picture,), (asks,), ("yes",))]


def test_ocrvqa(disk):
    cover = disk.picture("ocr/images/0761183272.png")
    book = {
        "imageURL": "http://ecx.images-amazon.com/images/I/61Y5.png",
        "title": "T",
        "genre": "G",
    }
    two = {"questions": ["Who is the author?", "Is it old?"], "answers": ["Kay, P.", "No"]}
    disk.json("ocr/dataset.json", {
        "0761183272": {**book, **two, "split": 1}, "1": {**book, **two, "split": 3},
    })  # fmt: skip
    source = disk.open("ocrvqa", "ocr")
    assert examples(source) == [
        Example((cover,), (f"{IMAGE_SLOT} [vqa] who is the author?",), ("kay, p",)),
        Example((cover,), (f"{IMAGE_SLOT} [vqa] is it old?",), ("no",)),
    ]
    assert source.left_out == {"of another split": 2}


# --- Flickr30k -------------------------------------------------------------------------------


def test_flickr(disk):
    man = disk.picture("flickr/images/1000092795.jpg")
    grounded = "<p>A man</p> {<1><2><30><100>} sits."
    rows = {
        "groundedcaption": {"grounded_caption": grounded},
        "captiontobbox": {"caption": "A man sits.", "output": "<p>A man</p> {<1><2><30><100>}"},
        "phrasetobbox": {"phrase": "A man", "bbox": "{<1><2><30><100>}<delim>{<0><0><9><9>}"},
    }
    for name, row in rows.items():
        disk.json(f"flickr/{name}.json", [{"image_id": 1000092795, **row}])
    source = disk.open("flickr_grounded_caption", "flickr")
    asks = f"{IMAGE_SLOT} [grounding] please describe this image in details"
    assert examples(source) == [Example((man,), (asks,), (grounded,))]
    assert choices(source, 0, 1) == [4]
    assert examples(disk.open("flickr_CaptionToPhrase", "flickr")) == [
        Example(
            (man,), (f"{IMAGE_SLOT} [detection] A man sits.",), ("<p>A man</p> {<1><2><30><100>}",)
        )
    ]
    assert examples(disk.open("flickr_ObjectToPhrase", "flickr")) == [
        Example((man,), (f"{IMAGE_SLOT} [detection] A man",),
                ("<p>A man</p> {<1><2><30><100>}<delim>{<0><0><9><9>}",))
    ]  # fmt: skip


# --- dialogues -------------------------------------------------------------------------------


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("name", "file"),
    [("llava_detail", "detail_23k.json"), ("llava_reason", "complex_reasoning_77k.json")],
)
def test_llava_questions(disk, coco, name, file):
    disk.json(f"llava/{file}", [
        {"id": "000000000007", "image": "000000000007.jpg",
         "conversations": turns("What is\n it: Describe!\n<image>", "A Cat.\nIt sits.")},
        {"id": "000000000009", "conversations": turns("Only asked")},
    ])  # fmt: skip
    source = disk.open(name, "llava", "coco")
    asks = f"{IMAGE_SLOT} what is it describe"
    assert examples(source) == [Example((coco[0],), (asks,), ("A Cat.\nIt sits.",))]
    assert source.dropped == {"without a question or an answer": 1}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("llava_conversation", "conversation_58k.json"),
        ("multitask_conversation", "multi_task_conversation.json"),
    ],
)
def test_conversations(disk, coco, name, file):
    talk = turns("<image>\nWhat is it?", "A cat.", "[refer] the Ear", "{<1><2><3><4>}")
    disk.json(file, [{"id": "000000000007", "conversations": talk}])
    source = disk.open(name, ".", "coco")
    assert examples(source) == [
        Example(
            (coco[0],),
            (f"{IMAGE_SLOT} What is it?", "[refer] the Ear"),
            ("A cat.", "{<1><2><3><4>}"),
        )
    ]


def test_unnatural_instruction(disk):
    def task(asks, constraints, output):
        more = {"instruction_with_input": asks, "constraints": constraints, "output": output}
        return {"instruction": "Sort", "instances": [{**more, "input": ""}, {}]}

    disk.json("un/filtered_unnatural_instruction.json", [
        task("Sort: 3, 1.", "Numbers only.", "1, 3."), task("Say Hi", None, "Hi!"),
        task("Say nothing", None, "..."),
    ])  # fmt: skip
    source = disk.open("unnatural_instruction", "un")
    assert examples(source) == [
        Example((), ("sort 3, 1 numbers only",), ("1, 3",)),
        Example((), ("say hi",), ("hi",)),
    ]
    assert source.dropped == {"without a question or an answer": 1}


# --- every dataset ---------------------------------------------------------------------------


def test_an_example_depends_only_on_its_index_and_the_generator(disk, coco):
    row = {"image": f"train2014/{CAT}", "question": "What?", "answer": ["a", "b", "c"]}
    disk.json("okvqa_train.json", [{**row, "question": f"{n}?"} for n in range(20)])
    source = disk.open("ok_vqa", ".", "coco")
    copy = pickle.loads(pickle.dumps(source))  # as a worker process receives it
    drawn = [source.example(n, np.random.default_rng(n)) for n in range(20)]
    again = [copy.example(n, np.random.default_rng(n)) for n in reversed(range(20))]
    assert again[::-1] == drawn
    assert len({example.answers for example in drawn}) == 3
    with pytest.raises(IndexError):
        source.example(20, np.random.default_rng(0))


def test_missing_images_are_counted_and_named(disk, coco, caplog):
    missing = [{"image": f"{n}.jpg", "question": "What?", "answer": ["a"]} for n in range(3)]
    present = [{"image": CAT, "question": "What?", "answer": ["a"]}]
    disk.json("okvqa_train.json", missing)
    with pytest.raises(UserError, match=r"no example .* 3 without their image .*coco/0\.jpg"):
        disk.open("ok_vqa", ".", "coco")
    disk.json("okvqa_train.json", missing + present)
    with caplog.at_level(logging.INFO):
        assert len(disk.open("ok_vqa", ".", "coco")) == 1
    assert "1 examples; rows not used: 3 without their image (the first: " in caplog.text
    assert len(disk.open("ok_vqa", ".", "coco", check_images=False)) == 4


VQA_ROW = {"image": CAT, "question": "What?", "answer": ["a"]}


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("ok_vqa", "okvqa_train.json", [VQA_ROW, {"image": CAT, "question": "?"}],
         r'okvqa_train\.json, row 2: .*"answer" is missing'),
        ("ok_vqa", "okvqa_train.json", [{**VQA_ROW, "answer": ["a", 3]}],
         r'row 1: "answer" is a list; expected a list of strings'),
        ("ok_vqa", "okvqa_train.json", [VQA_ROW, 7], "row 2: a row is int 7"),
        ("ok_vqa", "okvqa_train.json", {"rows": []}, 'expected a list under "annotations"'),
        ("ok_vqa", "okvqa_train.json", [], "no example in"),
        ("gqa", "train_balanced_questions.json", {"1": {"imageId": 1, "question": 5}},
         r'row "1": "question" is int 5; expected a string'),
        ("ocrvqa", "dataset.json", {"1": {"questions": ["a"], "answers": [], "split": 1}},
         r'row "1": 1 "questions" and 0 "answers"'),
        ("ocrvqa", "dataset.json", [], "expected an object"),
        ("textcaps_caption", "TextCaps_0.1_train.json", {"data": [{"image_id": ""}]},
         'row 1: "image_id" is a string; expected a string or an integer'),
        ("llava_detail", "detail_23k.json", [{"id": "1", "conversations": [{"from": "human"}]}],
         'row 1: .*"value" is missing'),
        ("llava_detail", "detail_23k.json", [{"id": "1", "conversations": "hi"}],
         '"conversations" is a string; expected a list of objects'),
        ("unnatural_instruction", "filtered_unnatural_instruction.json", [{"instances": []}],
         'row 1: "instances" is empty'),
    ],
)  # fmt: skip
def test_malformed_rows_are_named(disk, coco, name, file, content, message):
    disk.json(file, content)
    with pytest.raises(UserError, match=message) as e:
        disk.open(name, ".", "coco")
    assert "\n" not in str(e.value)


def test_missing_files_and_unknown_names_are_named(disk, coco):
    with pytest.raises(
        UserError, match=r"no such dataset; did you mean coco_vqa\? known are cc_sbu"
    ):
        open_dataset("cocovqa", ".")
    with pytest.raises(UserError, match=r"no file .*vqa_train.json; expected a folder with vqa_tr"):
        disk.open("coco_vqa", ".", "coco")
    disk.json("okvqa_train.json", [VQA_ROW])
    with pytest.raises(UserError, match="image folder is not named; name it as `images`"):
        disk.open("ok_vqa", ".")
    with pytest.raises(UserError, match=r"there is no image folder .*nowhere"):
        disk.open("ok_vqa", ".", "nowhere")
    with pytest.raises(UserError, match="no annotations are named"):
        open_dataset("ok_vqa", ())


def test_all_datasets_of_the_published_mixture_are_known():
    assert {*DATASETS} == {
        "cc_sbu_align", "coco_caption", "textcaps_caption", "coco_vqa", "ok_vqa", "aok_vqa", "gqa",
        "ocrvqa", "refcoco", "refcocop", "refcocog", "invrefcoco", "invrefcocop", "invrefcocog",
        "refvg", "flickr_grounded_caption", "flickr_CaptionToPhrase", "flickr_ObjectToPhrase",
        "llava_detail", "llava_reason", "llava_conversation", "multitask_conversation",
        "unnatural_instruction",
    }  # fmt: skip
