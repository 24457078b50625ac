"""Every benchmark answers every mistake in its files, or in predictions for it, with one line."""

import json
import re

import pytest
from helpers import benchmark_layouts

from minigpt4_jax.cli import evaluate
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmarks import BENCHMARKS, find
from minigpt4_jax.evaluation.layout import rows_of
from minigpt4_jax.evaluation.metrics import meteor

NAMES = [name for name in BENCHMARKS if not name.startswith("shapes")]
# named by the number of their row, which no file can have twice
NUMBERED = {"gqa", "vsr", "hm", "vizwiz", "iconvqa"}
FOREIGN = "COCO_train2014_000000999999_1"


class Case:
    """The files of one benchmark in a folder of its own, and predictions that fit them."""

    def __init__(self, name, root, folder):
        self.benchmark = find(name)
        self.data = root / self.benchmark.folder
        self.split = self.benchmark.splits[0] if self.benchmark.splits else ""
        self._root, self._predictions = root, folder / "predictions.jsonl"
        ids = [row.id for row in self.benchmark.read(self.data, self.split)]
        self.lines = [{"id": i, "answer": 0 if name == "iconvqa" else "a"} for i in ids]

    @property
    def files(self):
        """The annotation files that are read."""
        places = [[self._root / p.format(split=self.split) for p in file.paths]
                  for file in self.benchmark.files]  # fmt: skip
        return [next(p for p in of_file if p.is_file()) for of_file in places]

    def score(self, *options):
        text = "".join(
            line if isinstance(line, str) else json.dumps(line) + "\n" for line in self.lines
        )
        self._predictions.write_text(text)
        return evaluate.main(
            ["score", f"--benchmark={self.benchmark.name}", f"--data={self.data}", f"--split={self.split}",
             f"--predictions={self._predictions}", *options]
        )  # fmt: skip

    def read_and_judge(self):
        rows = rows_of(self.benchmark, self.data, self.split)
        answer = 0 if self.benchmark.ranked else "a"
        return self.benchmark.judge(rows, [answer] * len(rows))

    def edit(self, change):
        """Change the rows of the first annotation file."""
        path = self.files[0]
        if len(lines := path.read_text().splitlines()) > 1:
            rows = list(map(json.loads, lines))
            change(rows)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return
        content = json.loads(lines[0])
        key = next((k for k in ("images", "annotations", "data") if k in content), "")
        change(content[key] if key else content)
        path.write_text(json.dumps(content))


@pytest.fixture
def case(request, tmp_path, monkeypatch):
    monkeypatch.setattr(meteor, "missing", lambda: "METEOR is left out here")
    root = benchmark_layouts.write_all(tmp_path / "data", request.param)
    return Case(request.param, root, tmp_path)


def of_all(names=NAMES):
    return pytest.mark.parametrize("case", names, indirect=True)


def expect(case, message, *options):
    with pytest.raises(UserError, match=message) as error:
        case.score(*options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


@of_all()
def test_the_files_as_they_are_have_a_score(case, capsys):
    assert case.score() == 0
    assert case.benchmark.metric in capsys.readouterr().out


@of_all()
def test_wrong_folder(case, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, problem in (("nowhere", "no such (file or )?folder"), ("empty", "it has no files")):
        message = expect(case, problem, f"--data={tmp_path / folder}")
        assert case.files[0].name in message  # what belongs there


@of_all()
def test_wrong_split(case):
    message = expect(case, "--split=trian: ", "--split=trian")
    known = case.split or {"scienceqa": "train", "coco_caption": "test", "gqa": "testdev"}.get(
        case.benchmark.name, ""
    )
    assert known in message  # the splits that there are


@of_all()
def test_empty_files(case):
    for path in case.files:
        before = path.read_bytes()
        path.write_text("")
        expect(case, re.escape(path.name))
        path.write_text("[]" if before.lstrip().startswith(b"[") else "{}")
        expect(case, re.escape(path.name))
        path.write_bytes(before)
    assert case.score() == 0


@of_all()
def test_files_of_another_kind(case):
    path = case.files[0]
    for text in (
        '[{"foo": 1}]',
        '{"foo": 1}',
        '{"foo": {"bar": 1}}',
        "[1]",
        "nonsense",
        '[{"a": 1',
    ):
        path.write_text(text)
        expect(case, re.escape(path.name))


@of_all()
def test_values_of_another_kind(case):
    """Each field of the files in turn: the score, or one line that names the file or its row."""
    for path in case.files:
        before = path.read_text()
        lines = [json.loads(line) for line in before.splitlines()]
        whole = len(lines) == 1
        content = lines[0] if whole else lines
        for holder, key in fields(content):
            value = holder[key]
            for other in (None, True, -1, 2.5, float("nan"), "", "x", [], [1], {}, {"x": 1}):
                holder[key] = other
                texts = [json.dumps(content)] if whole else map(json.dumps, content)
                path.write_text("\n".join(texts))
                try:
                    case.read_and_judge()
                except UserError as error:
                    assert "\n" not in str(error) and len(str(error)) < 600
                    assert path.name in str(error) or str(case.data) in str(error), error
            holder[key] = value
        path.write_text(before)


def fields(content):
    """(object or list, key) of every value in the first entries of nested objects and lists."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    rows = isinstance(content, list) or all(isinstance(v, dict) for v in content.values())
    for key, value in list(entries)[: 1 if rows else None]:
        yield content, key
        if isinstance(value, (dict, list)):
            yield from fields(value)


@of_all(
    [
        name
        for name in NAMES
        if name not in NUMBERED | {"scienceqa", "refcoco", "refcoco+", "refcocog"}
    ]
)
def test_ids_that_are_twice_in_the_data(case):
    case.edit(lambda rows: rows.append(rows[0]))
    expect(case, "twice", *(["--split=random"] if case.benchmark.name == "pope" else []))


@pytest.mark.parametrize("case", ["scienceqa", "gqa"], indirect=True)
def test_questions_that_are_twice_in_an_object_of_questions(case):
    row = {"question": "is it?", "answer": "yes", "imageId": "1", "choices": ["a"]}
    text = json.dumps({"12": row, "345": row}).replace("345", "12")
    case.files[0].write_text(text)
    expect(case, rf'{case.files[0].name}: .*an object has "12" twice')


@of_all()
def test_predictions_that_do_not_fit(case):
    right = list(case.lines)
    name = str(right[0]["id"])
    for lines, problem in (
        (right[1:], rf"1 id is without an answer \({name}\)"),
        ([*right, right[0]], rf"1 id is answered more than once \({name}\)"),
        ([*right, {**right[0], "id": FOREIGN}], rf"1 id is not in the data \({FOREIGN}\)"),
        ([{**line, "id": f"{FOREIGN}_{n}"} for n, line in enumerate(right)], "are not in the data"),
        ([], "predictions.jsonl: is empty"),
        ([*right, "{\n"], "line .*: is not JSON"),
        ([{**right[0], "answer": None}, *right[1:]], "line 1: .*null; expected text"),
        ([{**right[0], "answer": [1.5, "a"]}, *right[1:]], "a list; expected text"),
        ([{"answer": "a"}, *right[1:]], 'line 1: .*"id" is missing'),
        ([json.dumps(right) + "\n"], "one JSON list; expected JSON lines"),
        ([json.dumps(right[0])[:-1] + ', "answer": "b"}\n'], 'line 1: .* has "answer" twice'),
    ):
        case.lines = lines
        expect(case, problem)


@of_all()
def test_ids_may_be_texts_or_numbers_in_any_order(case, tmp_path):
    out = tmp_path / "out.json"
    scores = []
    for change in (lambda line: line, lambda line: {**line, "id": str(line["id"])}):
        case.lines = [change(line) for line in reversed(case.lines)]
        case.score(f"--json={out}")
        scores.append(json.loads(out.read_text()))
    assert scores[0] == scores[1]
    assert {"benchmark", "score", "original", "official", "per_row"} <= set(scores[0])


@of_all([name for name in NAMES if name != "iconvqa"])
def test_answers_in_any_writing(case):
    """Empty, of any script, with marks that formats use; the numbers are in the oracle's tests."""
    odd = ["", " \t", "é 猫 😀", "\ud83d", "<p>cat</p> {<1><2><3><4>}<delim>{<5><6><7><8>}", "\u2028{<1>",
           "{<٣><1><2><3>}", "No, yes.", "a" * 5000, "1" * 5000, "<s></s>[/INST]"]  # fmt: skip
    for start in range(0, len(odd), len(case.lines)):
        given = (odd[start:] + odd)[: len(case.lines)]
        case.lines = [
            {**line, "answer": text} for line, text in zip(case.lines, given, strict=False)
        ]
        assert case.score() == 0
