"""What several benchmarks share: prompts, checks of fields, results of right-or-wrong rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from minigpt4_jax.data.annotations import field_of, identity_of, kind, objects_of
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Published, Row
from minigpt4_jax.evaluation.metrics.vqa_accuracy import VqaQuestion

PAPER = "MiniGPT-v2 paper, arXiv 2310.09478"
MODEL = "MiniGPT-v2 7B"
LLAVA = "LLaVA-1.5 7B"
LLAVA_ZOO = "github.com/haotian-liu/LLaVA, docs/MODEL_ZOO.md"
BLIP2_README = "github.com/salesforce/LAVIS, projects/blip2/README.md"
MINIGPT4_PAPER = "MiniGPT-4 paper, arXiv 2304.10592"


def short_answer(question: str) -> str:
    """The original's prompt for questions with short answers; the question goes in unchanged."""
    return f"[vqa] Based on the image, respond to this question with a short answer: {question}"


def of_paper(score: float, split: str = "") -> Published:
    """A figure of MiniGPT-v2 7B in its paper."""
    return Published(MODEL, score, PAPER, split)


def of_chat_model(score: float) -> Published:
    """A figure of the MiniGPT-v2 chat model in the first version of its paper."""
    return Published(f"{MODEL} chat", score, f"{PAPER}, first version (quoted in arXiv 2401.13601)")


def no_split(name: str, split: str, only: str = "") -> None:
    """UserError: a split of a benchmark that has one. only: its name, which is accepted."""
    if split not in ("", only):
        raise UserError(f"--split={split}: {name} has one split" + (f", {only}" if only else ""))


def row_result(row: Row, answer: Any, score: float, **fields: Any) -> dict[str, Any]:
    """An entry of `Result.per_row`. score: a fraction, or whether the answer is right."""
    return {"id": row.id, "answer": answer, "score": 100.0 * score, **fields}


def vqa_question(row: Mapping[str, Any], where: str) -> VqaQuestion:
    """The fields of an annotation of the VQA API."""
    answers = objects_of(dict(row), "answers", where)
    for answer in answers:
        if not isinstance(answer.get("answer"), str):
            raise UserError(
                f'{where}: an answer has {kind(answer.get("answer"))} as "answer"; expected text'
            )
    require_answers(answers, where)
    return VqaQuestion(
        identity_of(dict(row), "question_id", where),
        str(row.get("question_type", "")), str(row.get("answer_type", "")), answers,
    )  # fmt: skip


def require_answers(answers: Sequence[Any], where: str, key: str = "answers") -> None:
    """UserError: there are none."""
    if not answers:
        raise UserError(f'{where}: "{key}" is empty; expected the answers of people')


def label_of(row: Mapping[str, Any], where: str, labels: Sequence[Any] = (0, 1)) -> Any:
    """The label of a row. UserError: it is none of `labels`."""
    label = field_of(dict(row), "label", where)
    if label not in labels:
        raise UserError(
            f'{where}: "label" is {kind(label)}; expected {" or ".join(map(str, labels))}'
        )
    return label
