"""`evaluate score` gives the figures of the originals' own code (reference/eval), to the last digit."""

import hashlib
import json

import pytest
from helpers import tiny
from helpers.paths import REFERENCE

from minigpt4_jax.cli import evaluate
from minigpt4_jax.evaluation.benchmarks import find
from minigpt4_jax.evaluation.metrics import referring, vqa_normalizer, yes_no
from minigpt4_jax.inference.detokenize import completion_output
from minigpt4_jax.inference.requests import Completion

ORACLE = REFERENCE / "eval"
pytestmark = pytest.mark.skipif(not ORACLE.exists(), reason="needs ../shared/reference")
REFERRING = [
    ("refcoco", "val"),
    ("refcoco", "testA"),
    ("refcoco", "testB"),
    ("refcocog", "val"),
    ("refcocog", "test"),
]


def load(name):
    return json.loads((ORACLE / name).read_text(encoding="utf-8"))


@pytest.fixture
def score(tmp_path):
    """score(benchmark, data, predictions) -> what the command writes."""

    def run(name, data, predictions, *options):
        file, out = tmp_path / "predictions.jsonl", tmp_path / "out.json"
        lines = [json.dumps({"id": i, "answer": answer}) for i, answer in predictions]
        file.write_text("\n".join(lines))
        evaluate.main(
            ["score", f"--benchmark={name}", f"--data={data}", f"--predictions={file}",
             f"--json={out}", *options]
        )  # fmt: skip
        return json.loads(out.read_text())

    return run


@pytest.fixture
def write(tmp_path):
    def run(name, rows, lines=False):
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
        return path

    return run


def assert_prompts(name, data, hashes):
    rows = find(name).read(data, "")
    prompts = [f"<s>[INST] <Img><ImageHere></Img> {row.question} [/INST]" for row in rows]
    assert [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts] == hashes


@pytest.mark.parametrize("name", ["gqa", "vsr", "vizwiz", "hm"])
def test_sets_of_short_answers(name, score, write):
    want = load(f"sets/{name}.json")
    data = write(f"{name}.json", want["annotations"], lines=name == "hm")
    got = score(name, data, enumerate(want["raw_answers"]))
    assert got["score"] == pytest.approx(want["accuracy"], abs=1e-9)
    assert [row["score"] for row in got["per_row"]] == pytest.approx(want["per_item"], abs=1e-9)
    assert_prompts(name, data, want["prompt_sha256"])


def test_iconvqa_by_the_losses_of_its_choices(score, write):
    want = load("sets/iconvqa.json")
    got = score("iconvqa", write("i.json", want["annotations"]), enumerate(want["losses"]))
    assert got["score"] == pytest.approx(want["accuracy"], abs=1e-9)
    assert [row["score"] == 100 for row in got["per_row"]] == want["correct"]


def test_okvqa_of_raw_answers(score):
    want = load("vqa/okvqa_run.json")
    answers = [(row["question_id"], row["answer"]) for row in want["raw_answers"]]
    got = score("okvqa", ORACLE / "vqa", answers, "--split=test")
    assert got["original"] == want["scores"]
    assert got["score"] == want["scores"]["overall"]
    assert_prompts("okvqa", ORACLE / "vqa", want["prompt_sha256"])


@pytest.mark.parametrize("name", ["okvqa", "vqav2"])
def test_vqa_accuracy_of_the_api_and_of_lavis(name, score):
    answers = [(row["question_id"], row["answer"]) for row in load("vqa/predictions.json")]
    got = score(name, ORACLE / "vqa", answers)
    assert got["official"] == load("vqa/expected_official.json")
    assert got["lavis"] == load("vqa/expected_lavis.json")


def test_every_step_of_the_normalizer():
    for case in load("vqa/normalise.json"):
        text = case["input"]
        assert vqa_normalizer.process_punctuation(text) == case["punctuation"]
        assert vqa_normalizer.process_digits_articles(text) == case["digit_article"]
        assert vqa_normalizer.normalize(text) == case["both"]


def test_aokvqa(score, write):
    want = load("vqa/aokvqa.json")
    rows = [
        {"question_id": r["question_id"], "direct_answers": r["gt_ans"]} for r in want["results"]
    ]
    answers = [(r["question_id"], r["pred_ans"]) for r in want["results"]]
    got = score("aokvqa", write("a.json", rows), answers)
    assert got["score"] == pytest.approx(want["accuracy"], abs=1e-9)
    assert [row["score"] for row in got["per_row"]] == pytest.approx(want["per_item"], abs=1e-9)


def test_gqa_as_lavis_scores_it(score, write):
    want = load("vqa/gqa_lavis.json")
    rows = [{"image": "x.jpg", "question": "?", "answer": r["gt_ans"]} for r in want["results"]]
    got = score("gqa", write("g.json", rows), enumerate(r["pred_ans"] for r in want["results"]))
    assert got["official"]["accuracy"] == pytest.approx(want["accuracy"], abs=1e-9)
    assert [row["official"] for row in got["per_row"]] == want["per_item"]


@pytest.mark.parametrize(("name", "split"), REFERRING)
def test_referring_expressions_with_their_rounds(name, split, score):
    want = load(f"refcoco/expected_{name}_{split}.json")
    expressions = want["expressions"]
    answers = [(e["img_id"], e["raw_answers"]) for e in expressions]
    got = score(name, ORACLE / "refcoco", answers, f"--split={split}")
    assert got["score"] == pytest.approx(want["overall"]["resample"], abs=1e-9)
    assert [row["kept_answer"] for row in got["per_row"]] == [
        e["resample"]["kept_answer"] for e in expressions
    ]
    for row, expression in zip(got["per_row"], expressions, strict=True):
        of = expression["resample"]
        assert (row["accepted_in_round"], row["hit"]) == (of["accepted_in_round"], of["hit"])
        assert row["iou"] == pytest.approx(of["iou"], abs=1e-9)
    no_resample = got["original"]["no_resample"]["accuracy"]
    assert no_resample == pytest.approx(want["overall"]["no_resample"], abs=1e-9)


@pytest.mark.parametrize(("name", "split"), REFERRING)
def test_first_answers_alone_are_not_resampled(name, split, score):
    want = load(f"refcoco/expected_{name}_{split}.json")
    answers = [(e["img_id"], e["raw_answers"][0]) for e in want["expressions"]]
    got = score(name, ORACLE / "refcoco", answers, f"--split={split}")
    assert got["score"] == pytest.approx(want["overall"]["no_resample"], abs=1e-9)


@pytest.mark.parametrize(("name", "split"), REFERRING)
def test_questions_of_all_rounds(name, split):
    rows = find(name).read(ORACLE / "refcoco", split)
    expressions = load(f"refcoco/expected_{name}_{split}.json")["expressions"]
    for row, expression in zip(rows, expressions, strict=True):
        of = expression["resample"]
        asked = [
            referring.question_of_round(row.truth.expression, n) for n in range(of["rounds_asked"])
        ]
        assert asked == of["questions"]
        answers = expression["raw_answers"]
        more = [referring.needs_another_round(answers[:n]) for n in range(1, len(answers) + 1)]
        assert more == [True] * (len(answers) - 1) + [False]


@pytest.mark.parametrize("mode", ["resample", "no_resample"])
@pytest.mark.parametrize("split", ["val", "test", "testA", "testB"])
def test_answers_that_are_kept_are_those_of_the_file_the_original_writes(split, mode, score):
    # of a run on both benchmarks, whose files have one name: that of refcocog replaced refcoco's
    name = "refcocog" if split in ("val", "test") else "refcoco"
    file = load("refcoco/files_written.json")[mode][f"['refcoco', 'refcocog']_{split}.json"]
    expressions = load(f"refcoco/expected_{name}_{split}.json")["expressions"]
    rounds = slice(None) if mode == "resample" else slice(1)
    answers = [(e["img_id"], e["raw_answers"][rounds]) for e in expressions]
    if mode == "no_resample":
        answers = [(name, texts[0]) for name, texts in answers]
    kept = {}
    for row in score(name, ORACLE / "refcoco", answers, f"--split={split}")["per_row"]:
        if row["kept_answer"] is not None:
            kept.setdefault(row["id"], []).append(row["kept_answer"])
    assert {image: sorted(texts) for image, texts in kept.items()} == {
        image: sorted(texts)
        for image, texts in file.items()  # later rounds come last there
    }


class DecodesTo:
    """A tokenizer whose tokens spell one text."""

    def __init__(self, text):
        self._text = text

    def encode(self, text):
        return [5]

    def decode(self, ids, skip_special=True):
        return self._text


def test_what_the_original_keeps_of_decoded_tokens():
    config = tiny.config(qformer=False, chat_template="minigptv2", end_symbol="</s>")
    completion = Completion([5], [0.0], True, 0.0)
    for case in load("sets/generate_text.json"):
        output = completion_output(DecodesTo(case["decoded"]), config, completion, ())
        assert output.text == case["answer"], case


def test_iou():
    for case in load("refcoco/iou.json"):
        assert referring.iou(case["a"], case["b"]) == pytest.approx(case["iou"], abs=1e-9)


def test_pope_of_all_files(score):
    want = load("pope/expected.json")
    answers = [(row["question_id"], row["text"]) for row in load("pope/answers.json")]
    got = score("pope", ORACLE / "pope", answers)
    assert got["score"] == pytest.approx(100 * want["mean_f1"], abs=1e-9)
    for name, figures in want["files"].items():
        assert {key: got["files"][name][key] for key in figures} == pytest.approx(figures, abs=1e-9)
    assert [yes_no.read_pope(text) for _, text in answers] == want["yes_no"]


def test_pope_of_one_file_and_with_one_answer_to_everything(score):
    want = load("pope/expected.json")["files"]["popular"]
    texts = {row["question_id"]: row["text"] for row in load("pope/answers.json")}
    ids = [q["question_id"] for q in load("pope/questions.json") if q["category"] == "popular"]
    answers = [(n, texts[i]) for n, i in enumerate(ids, 1)]
    got = score("pope", ORACLE / "pope", answers, "--split=popular")["files"]
    assert {key: got["popular"][key] for key in want} == pytest.approx(want, abs=1e-9)
    yes = score("pope", ORACLE / "pope", [(i, "yes") for i in texts])["files"]
    for name, figures in load("pope/expected_special.json")["all_yes"]["files"].items():
        assert {key: yes[name][key] for key in figures} == pytest.approx(figures, abs=1e-9)
    # the original divides by zero
    no = score("pope", ORACLE / "pope", [(i, "no") for i in texts])
    assert no["score"] == 0
    for figures in no["files"].values():
        ratios = [figures[key] for key in ("TP", "precision", "recall", "f1", "yes_ratio")]
        assert ratios == [0] * 5 and figures["accuracy"] > 0


def test_pope_pairs_answers_with_labels_by_id_in_any_order(score):
    """The original pairs them by position, so that its figures for this order are others."""
    texts = {row["question_id"]: row["text"] for row in load("pope/answers.json")}
    special = load("pope/expected_special.json")["shuffled"]
    got = score("pope", ORACLE / "pope", [(i, texts[i]) for i in special["answers"]])
    want = load("pope/expected.json")
    assert got["score"] == pytest.approx(100 * want["mean_f1"], abs=1e-9)
    assert want["mean_f1"] != pytest.approx(special["mean_f1"])
