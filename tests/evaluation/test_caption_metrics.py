"""Caption metrics: equal to pycocoevalcap, its tokens included; CHAIR."""

import json
import shutil

import pytest
from helpers.paths import REFERENCE
from hypothesis import given
from hypothesis import strategies as st

from minigpt4_jax.cli import evaluate
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmarks import find
from minigpt4_jax.evaluation.metrics import chair, coco_objects, meteor
from minigpt4_jax.evaluation.metrics.captions import caption_scores
from minigpt4_jax.evaluation.metrics.ptb_tokenizer import tokenize

ORACLE = REFERENCE / "eval" / "captions"
needs_oracle = pytest.mark.skipif(not ORACLE.exists(), reason="needs ../shared/reference")
METEOR_MISSING = meteor.missing()


def load(name):
    return json.loads((ORACLE / name).read_text(encoding="utf-8"))


@needs_oracle
def test_tokens_of_the_java_program():
    cases = load("tokenizer.json")
    for case, tokens in zip(cases, tokenize([case["text"] for case in cases]), strict=True):
        assert tokens == case["tokens"], case["text"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("“curly” 😀 … dogs", "curly dogs"),
        ("2 ½ cups for €5 or £3", "2 1/2 cups for $ 5 or # 3"),
        ("1 1/2 [a] {b} (c)", "1\u00a01/2 -lsb- a -rsb- -lcb- b -rcb- -lrb- c -rrb-"),
        ("I cannot, gonna &amp; wanna", "i can not gon na & wan na"),
        ("x-1.5 a.b_c 5:30-6:30", "x-1 .5 a.b _ c 5:30 -6:30"),
        ("it\u2019s O\u2019Neil's C++ #tag @x", "it 's o\u2019neil 's c++ #tag @x"),
        ("Tel. (415) 555-1212", "tel. -lrb-415-rrb-\u00a0555-1212"),
        ("first\u2028second\x0bthird\rfourth", "first second third fourth"),
        (
            "[www.ab.org] 5.dog.ex.com ex.com/bucket x",
            "-lsb- www.ab.org -rsb- 5 dog.ex.com ex.com/bucket x",
        ),
        ("", ""),
    ],
)
def test_tokens_of_section_g(text, tokens):
    assert tokenize([text]) == [tokens]


def test_captions_are_tokenized_as_the_lines_of_one_text():
    # an abbreviation before a number, which the next caption begins with
    assert tokenize(["bus No.", "5 cars"]) == ["bus no.", "5 cars"]
    assert tokenize(["bus No.", "cars"]) == ["bus no", "cars"]
    # a month before the end of a line, and of the whole text
    assert tokenize(["Jan.3", "a", "Jan.3"]) == ["jan. 3", "a", "jan. .3"]


@needs_oracle
@pytest.mark.parametrize("subset", [None, "five", "one"])
def test_every_score_of_the_oracle(subset, tmp_path, monkeypatch):
    without_meteor = subset != "five" or METEOR_MISSING  # the program takes long to start
    if without_meteor:
        monkeypatch.setattr(meteor, "missing", lambda: "METEOR is left out here")
    truth, results, want = load("ground_truth.json"), load("results.json"), load("expected.json")
    if subset:
        sets = load("expected_subset.json")
        ids = sets["image_ids"] if subset == "five" else [sets["one_image_id"]]
        want = sets[subset]
        truth = {
            "images": [i for i in truth["images"] if i["id"] in ids],
            "annotations": [a for a in truth["annotations"] if a["image_id"] in ids],
        }
        results = [r for r in results if r["image_id"] in ids]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    lines = [json.dumps({"id": r["image_id"], "answer": r["caption"]}) for r in results]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    evaluate.main(["score", "--benchmark=coco_caption", f"--data={tmp_path / 'gt.json'}",
                   f"--predictions={tmp_path / 'p.jsonl'}", f"--json={tmp_path / 'out.json'}"])  # fmt: skip
    got = json.loads((tmp_path / "out.json").read_text())
    overall = {k: v for k, v in want["overall"].items() if k != "METEOR" or not without_meteor}
    assert {k: got["metrics"][k] for k in overall} == pytest.approx(overall, abs=1e-9)
    for row in got["per_row"]:
        of_image = want["per_image"][str(row["id"])]
        assert {k: row[k] for k in overall} == pytest.approx(
            {k: of_image[k] for k in overall}, abs=1e-9
        )


WORDS = st.sampled_from(["a", "cat", "the", "dog", "on", "mat", "1\u00a01/2"])
CAPTION = st.lists(WORDS, max_size=9).map(" ".join)
TRUE_CAPTION = CAPTION.map("one {}".format)  # pycocoevalcap fails where all references are empty
IMAGE = st.tuples(CAPTION, st.lists(TRUE_CAPTION, min_size=1, max_size=4))


@given(st.lists(IMAGE, min_size=1, max_size=5))
def test_scores_of_random_captions_equal_pycocoevalcap(images):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = [c for c, _ in images], [r for _, r in images]
    truth, results = dict(enumerate(references)), {i: [c] for i, c in enumerate(captions)}
    got = caption_scores(captions, references)
    values, rows = bleu.Bleu(4).compute_score(truth, results, verbose=0)
    for n in range(4):
        assert got.overall[f"Bleu_{n + 1}"] == pytest.approx(values[n], abs=1e-12)
        assert got.per_caption[f"Bleu_{n + 1}"] == pytest.approx(rows[n], abs=1e-12)
    for name, metric in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        value, of_each = metric.compute_score(truth, results)
        assert got.overall[name] == pytest.approx(value, abs=1e-12)
        assert got.per_caption[name] == pytest.approx(list(of_each), abs=1e-12)


def test_without_java_meteor_is_left_out_and_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    benchmark = find("coco_caption")
    row = type("Row", (), {"id": 1, "truth": ["a cat"], "group": ""})()
    result = benchmark.judge([row, row], ["a cat", "a dog"])
    assert "METEOR" not in result.extra["metrics"]
    assert "METEOR needs" in result.extra["note"]


def test_domains_of_nocaps_are_scored_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(meteor, "missing", lambda: "METEOR is left out here")
    domains, words = ["in", "in", "out", "out"], ["cat", "dog", "cow", "pig"]
    images = [{"id": n, "file_name": f"{n}.jpg", "domain": d} for n, d in enumerate(domains)]
    annotations = [{"image_id": n, "caption": f"a {word} here"} for n, word in enumerate(words)]
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    rows = find("nocaps").read(tmp_path, "")
    result = find("nocaps").judge(rows, ["a cat here", "a dog here", "a", "a"])
    assert result.extra["domains"]["in"]["CIDEr"] > 5 > result.extra["domains"]["out"]["CIDEr"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": []}, "has no images"),
        ({"images": [{"id": 1}], "annotations": []}, "1 images have no captions"),
        (
            {"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]},
            "not among its images",
        ),
        ({"annotations": []}, '"images" is missing'),
        ([], "expected an object"),
    ],
)
def test_bad_ground_truth_is_one_line(tmp_path, content, message):
    (tmp_path / "gt.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        find("coco_caption").read(tmp_path / "gt.json", "")


# --- CHAIR ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men ride horses near a fire engine.", ["person", "horse", "truck"]),
        ("a hot dog and a dog", ["hot dog", "dog"]),
        ("a baby elephant beside a baby", ["elephant", "person"]),
        ("toilet paper in a kitchen with orange juice", []),
        (
            "Knives, wine glasses and a cell phone on the dining table",
            ["knife", "wine glass", "cell phone", "dining table"],
        ),
        ("people sitting on benches watching buses", ["person", "bench", "bus"]),
        ("the skier's skis", ["person", "skis"]),
    ],
)
def test_objects_that_a_caption_mentions(caption, objects):
    (mentions,) = chair.mentions([caption], [()])
    assert mentions.objects == mentions.hallucinated == objects


def test_the_words_of_80_classes():
    words = coco_objects.object_words()
    assert len(set(words.values())) == 80
    assert all(chair.find_objects(" ".join(phrase)) == [name] for phrase, name in words.items())


def test_chair_from_coco_files(tmp_path):
    instances = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 17}, {"image_id": 2, "category_id": 18}],
    }
    captions = {"annotations": [{"image_id": 1, "caption": "a kitten on a sofa"}]}
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    (tmp_path / "captions_val2014.json").write_text(json.dumps(captions))
    rows = find("chair").read(tmp_path, "")
    result = find("chair").judge(rows, ["A cat sleeps on the couch.", "a cat, a puppy and a dog"])
    assert result.original["CHAIRi"] == pytest.approx(1 / 5)
    assert result.original["CHAIRs"] == pytest.approx(1 / 2)
    assert result.per_row[1]["hallucinated"] == ["cat"]
    assert find("chair").headline(result.per_row[1:]) == pytest.approx(100 / 3)
