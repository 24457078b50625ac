"""POPE: is an object in the image? Three files of questions with different absent objects (arXiv
2305.10355); answers are read as LLaVA's eval_pope.py does."""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.data.annotations import identity_of, text_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Answer, Benchmark, DataFile, Published, Result, Row
from minigpt4_jax.evaluation.benchmarks.common import LLAVA, LLAVA_ZOO, label_of, row_result
from minigpt4_jax.evaluation.layout import find_file, read_rows
from minigpt4_jax.evaluation.metrics import yes_no
from minigpt4_jax.evaluation.predictions import texts

SPLITS = ("random", "popular", "adversarial")
# LLaVA's own list of all questions, whose ids are unique over the three files
JOINED = ("llava_pope_test.jsonl", "questions.json", "questions.jsonl")
REQUEST = "\nAnswer the question using a single word or phrase."
# Of 2023, on which LLaVA and others report; the file of today has 3,000.
RANDOM_ROWS_OF_2023 = 2910


def read(data: Path, split: str) -> list[Row]:
    """coco_pope_{split}.json: lines (or a list) of {"question_id", "image", "text", "label"}.

    Without a split all three files, with ids that are unique over them: those of llava_pope_test.jsonl
    if it is in the folder, else numbers from 0 in the order random, popular, adversarial."""
    if split:
        if split not in SPLITS:
            raise UserError(f"--split={split}: pope has the splits {', '.join(SPLITS)}")
        return _read_file(data, split)
    if data.is_file():
        raise UserError(
            f"--data={data}: expected the folder of the three files of POPE, or --split=NAME"
        )
    parts = {name: _read_file(data, name) for name in SPLITS}
    joined = next((data / name for name in JOINED if (data / name).is_file()), None)
    if joined is None:
        rows = [row for name in SPLITS for row in parts[name]]
        return [_renamed(row, number) for number, row in enumerate(rows)]
    return _in_joined_order(joined, parts)


def _read_file(data: Path, split: str) -> list[Row]:
    rows = []
    for where, row in read_rows(find_file(data, (f"coco_pope_{split}.json",), "pope")):
        name, label = identity_of(row, "question_id", where), label_of(row, where, ("yes", "no"))
        place, question = _place(row, where), _question(row, where)
        rows.append(Row(name, question, (place,), label, group=split))
    return rows


def _place(row: dict[str, Any], where: str) -> str:
    return f"coco/val2014/{text_of(row, 'image', where)}"


def _question(row: dict[str, Any], where: str) -> str:
    """As LLaVA asks it; its own list has the request already."""
    return f"{text_of(row, 'text', where).removesuffix(REQUEST)}{REQUEST}"


def _in_joined_order(path: Path, parts: dict[str, list[Row]]) -> list[Row]:
    """The rows with the ids of the joined list, in its order. A row is found by its file, image and
    question; LLaVA's script pairs by position within the file, which is the same in LLaVA's list."""
    waiting: dict[tuple[str, str, str], deque[Row]] = defaultdict(deque)
    for split, of_split in parts.items():
        for row in of_split:
            waiting[split, row.images[0], row.question].append(row)
    rows = []
    for where, joined in read_rows(path):
        split = text_of(joined, "category", where)
        place, question = _place(joined, where), _question(joined, where)
        if not waiting[split, place, question]:
            raise UserError(
                f"{where}: its question is not in coco_pope_{split}.json; the files are of different versions"
            )
        row = waiting[split, place, question].popleft()
        rows.append(_renamed(row, identity_of(joined, "question_id", where)))
    if left := [row for of_key in waiting.values() for row in of_key]:
        raise UserError(
            f"data {path}: has {len(rows)} questions, the three files have {len(left)} more, the first in "
            f"coco_pope_{left[0].group}.json; the files are of different versions"
        )
    return rows


def _renamed(row: Row, name: str | int) -> Row:
    return Row(name, row.question, row.images, row.truth, group=row.group)


def judge(rows: Sequence[Row], answers: Sequence[Answer]) -> Result:
    """Accuracy, precision, recall, F1 and share of yes, of each file. score: the mean F1 of the files."""
    given = texts(answers, "pope")
    readings = [yes_no.read_pope(answer) for answer in given]
    per_row = [
        row_result(row, answer, reading == row.truth, reading=reading, label=row.truth,
                   truth=row.truth, group=row.group)
        for row, answer, reading in zip(rows, given, readings, strict=True)
    ]  # fmt: skip
    files = _files(per_row)
    figures = {"mean_f1": headline(per_row) / 100}
    extra = {"files": files, "versions": _versions(rows)}
    return Result(headline(per_row), figures, {}, per_row, extra)


def headline(per_row: Sequence[Mapping[str, Any]]) -> float:
    """The mean F1 of the files, in percent."""
    files = _files(per_row)
    return 100 * float(sum(measures["f1"] for measures in files.values()) / len(files))


def _files(per_row: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for entry in per_row:
        pairs[entry["group"]].append((entry["reading"], entry["label"]))
    return {
        group: yes_no.measures(*zip(*of_group, strict=True)) for group, of_group in pairs.items()
    }


def _versions(rows: Sequence[Row]) -> dict[str, str]:
    """Which version of the random file these rows are."""
    number = sum(row.group == "random" for row in rows)
    if not number:
        return {}
    known = {RANDOM_ROWS_OF_2023: "2023, as in LLaVA's published figures", 3000: "current"}
    return {"random": f"{number} questions" + (f" ({known[number]})" if number in known else "")}


_SOURCE = "https://github.com/RUCAIBox/POPE (output/coco)"
BENCHMARK = Benchmark(
    name="pope", title="POPE", kind="yes_no", metric="mean F1", folder="pope",
    files=tuple(DataFile((f"pope/coco_pope_{split}.json",), _SOURCE) for split in SPLITS),
    images=(DataFile(("coco/val2014",), "http://images.cocodataset.org/zips/val2014.zip"),),
    read=read, judge=judge, headline=headline,
    published=(Published(LLAVA, 85.9, LLAVA_ZOO),),
)  # fmt: skip
