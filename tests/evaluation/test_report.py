"""Reports of results, and comparisons of two."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.cli import evaluate
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmarks import find
from minigpt4_jax.evaluation.compare import compare
from minigpt4_jax.evaluation.metrics.answer_form import answer_form, repetition
from minigpt4_jax.evaluation.report import write_report
from minigpt4_jax.evaluation.report_curves import curves_of_run
from minigpt4_jax.evaluation.results import describe, write_scores

COUNT = 12


@pytest.fixture
def make(tmp_path):
    """make(name, answers): the results of VSR, of rows that are true and false in turn."""
    rows = [
        {"image": f"{n}.jpg", "caption": f"<b>statement</b> {n}", "label": (n + 1) % 2}
        for n in range(COUNT)
    ]
    (tmp_path / "vsr.json").write_text(json.dumps(rows))
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((60, 80, 3), 255, np.uint8)).save(picture)

    def results(folder, answers):
        benchmark = find("vsr")
        rows = benchmark.read(tmp_path / "vsr.json", "")
        scores = describe(benchmark, "", rows, benchmark.judge(rows, answers)) | {"model": folder}
        for entry in scores["per_row"]:
            entry |= {
                "image": str(picture),
                "true_box": [10, 10, 40, 50],
                "predicted_box": [60, 5, 20, 30],
            }
        out = tmp_path / folder / "vsr"
        out.mkdir(parents=True)
        write_scores(out, scores)
        return tmp_path / folder

    return results


def test_report_is_one_file_with_its_pictures(make):
    folder = make("model", ["true"] * 10 + ["maybe", "no"])
    evaluate.main(["report", str(folder), "--shown=3"])
    html = (folder / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', html), "it refers to something outside"
    assert html.count("data:image/jpeg;base64,") == 6
    assert html.count("</span> predicted") == 2  # what the colours of the boxes mean
    assert "&lt;b&gt;statement" in html and "<b>statement" not in html
    assert "MiniGPT-v2 7B 60.6" in html
    table = " ".join(html.split("Answers by true label")[1].split("</table>")[0].split())
    assert re.findall(r">(\d+)</td>", table) == ["5", "0", "1", "5", "1", "0"]
    markdown = (folder / "report.md").read_text()
    assert re.search(
        r"\| VSR zero-shot test \| accuracy \| 41.67 \| [\d.]+ to [\d.]+ \| 12 \|", markdown
    )


def test_every_file_of_pope_has_a_confusion_table(tmp_path):
    for name in ("random", "popular", "adversarial"):
        row = {"question_id": name, "image": "0.jpg", "text": "Is there a cat?", "label": "yes"}
        (tmp_path / f"coco_pope_{name}.json").write_text(json.dumps(row))
    rows = find("pope").read(tmp_path, "")
    scores = describe(find("pope"), "", rows, find("pope").judge(rows, ["Yes", "No", "Yes"]))
    html = write_report([scores], tmp_path).read_text()
    found = re.findall(r"<caption>(\w+)</caption>(.*?)</table>", html, re.DOTALL)
    cells = {name: re.findall(r">(\d)</td>", table) for name, table in found}
    assert cells == {
        "random": ["1", "0", "0", "0"],
        "popular": ["0", "1", "0", "0"],
        "adversarial": ["1", "0", "0", "0"],
    }


def test_curves_over_checkpoints_and_of_a_run(make, tmp_path):
    folders = [make(f"step_{step}", ["true"] * right + [""] * (COUNT - right)) for step, right in
               ((100, 2), (20, 8), (300, 12))]  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    lines = [
        {"step": 10, "eval/gqa": 10.0},
        {"step": 20, "loss": 1.0},
        {"step": 30, "eval/gqa": 20.0},
    ]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4')
    (curve,) = curves_of_run(run)
    assert curve.points == [(10, 10), (30, 20)]
    evaluate.main(["report", *map(str, folders), f"--run={run}", f"--out={tmp_path}"])
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 2
    assert [float(step) for step in re.findall(r"<title>step (\d+)", html)] == [
        20,
        100,
        300,
        10,
        30,
    ]


def test_compare_says_the_paired_difference_and_where_rows_part(make, tmp_path, capsys):
    a = make("a", ["true"] * COUNT)
    b = make("b", ["true", "false"] * 4 + ["false", "true"] * 2)
    evaluate.main(["compare", str(a), str(b), f"--json={tmp_path / 'c.json'}", "--rows=1"])
    out = capsys.readouterr().out
    assert "A 50.00, B 66.67" in out
    assert "+16.67 points" in out and "better in 4 rows, worse in 2" in out
    assert out.count("A (100): true") == 1  # the worst first
    (written,) = json.loads((tmp_path / "c.json").read_text()).values()
    assert [row["id"] for row in written["parted"]] == [8, 10, 1, 3, 5, 7]
    low, high = written["interval"]
    assert low < 16.67 < high


def test_compare_of_other_rows_and_nothing_to_compare(make, tmp_path):
    a = make("a", ["true"] * COUNT)
    scores = json.loads((a / "vsr" / "scores.json").read_text())
    with pytest.raises(UserError, match=r"2 rows are only in A \(10, 11\)"):
        compare(scores, scores | {"per_row": scores["per_row"][:10]})
    (tmp_path / "other").mkdir()
    write_scores(tmp_path / "other", scores | {"benchmark": "gqa"})
    with pytest.raises(UserError, match="nothing to compare"):
        evaluate.main(["compare", str(a), str(tmp_path / "other")])
    with pytest.raises(UserError, match="no results there"):
        evaluate.main(["compare", str(a), str(a / "vsr" / "nothing")])
    no_results = [{}, *(scores | {"per_row": rows} for rows in (1, [], [1], [{}]))]
    for content in no_results:
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="has no scores"):
            evaluate.main(["report", str(tmp_path / "other.json")])


def test_the_difference_of_a_score_that_is_no_mean_of_rows():
    """POPE's mean F1: B finds one of two more, and A has two wrong rows, B one."""

    def results(readings):
        labels = ["yes", "yes", "no", "no"]
        rows = [
            {"id": n, "answer": r, "score": 100.0 * (r == label), "reading": r, "label": label}
            | {"group": "random"}
            for n, (r, label) in enumerate(zip(readings, labels, strict=True))
        ]
        return {"benchmark": "pope", "score": find("pope").headline(rows), "per_row": rows}

    result = compare(results(["yes", "no", "no", "yes"]), results(["yes", "yes", "no", "yes"]))
    assert result.scores == pytest.approx((50, 80))
    assert result.difference == pytest.approx(30)  # the rows' mean differs by 25
    assert result.interval[0] <= 30 <= result.interval[1]


def test_lower_is_better_where_a_benchmark_says_so():
    row = {"id": 1, "answer": "", "score": 100.0, "objects": ["cat"], "hallucinated": ["cat"]}
    a = {"benchmark": "chair", "score": 100.0, "higher_is_better": False, "per_row": [row]}
    result = compare(a, a | {"per_row": [row | {"score": 0.0, "hallucinated": []}]})
    assert (result.better, result.worse, result.difference) == (1, 0, -100)


def test_scores_of_answers_without_references():
    lines = [
        {"answer": "{<1><2><3><4>} ok", "finish_reason": "stop"},
        {"answer": "a b c d a b c d", "finish_reason": "length"},
        {"answer": "", "finish_reason": "stop"},
        {"error": "broken"},
    ]
    form = answer_form(lines, boxes=True)
    assert form["words"] == pytest.approx(10 / 3)
    assert form["stopped"] == form["box_errors"] == pytest.approx(2 / 3)
    assert form["empty"] == pytest.approx(1 / 3)
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert "box_errors" not in answer_form(lines, boxes=False)
