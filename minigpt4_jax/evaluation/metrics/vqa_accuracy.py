"""VQA accuracy in the versions that published numbers were made with."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minigpt4_jax.evaluation.metrics.vqa_normalizer import normalize, process_punctuation

Annotated = Mapping[str, Any]  # an annotated answer: {"answer": text, "answer_id": ...}
Accuracy = Callable[[str, Sequence[Annotated]], float]


def official(prediction: str, answers: Sequence[Annotated]) -> float:
    """The VQA API's accuracy of one question, 0..1 (vqaEval.py, VQAEval.evaluate).

    The mean over the answers of min(1, equal ones among the *other* answers / 3). Prediction and answers
    are normalized unless all answers are equal. Answers are told apart by all of their fields, so equal
    answers without distinct `answer_id` are not counted for each other.
    """
    texts = [_clean(answer["answer"]) for answer in answers]
    prediction = _clean(prediction)
    if len(set(texts)) > 1:
        texts, prediction = [normalize(text) for text in texts], normalize(prediction)
    wanted = prediction.lower()
    return _leave_one_out(answers, texts, lambda text: text.lower() == wanted)


def always_normalized(prediction: str, answers: Sequence[Annotated]) -> float:
    """As `official`, but normalized even where all answers are equal, and leaving out one answer by its
    position: the evaluator of the TextVQA challenge."""
    wanted = normalize(_clean(prediction))
    equal = [normalize(_clean(answer["answer"])) == wanted for answer in answers]
    return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(equal)


def lavis(prediction: str, answers: Sequence[Annotated]) -> float:
    """The accuracy of LAVIS (vqa_eval.py): the prediction is always normalized, answers only lose their
    punctuation, and upper case counts."""
    wanted = normalize(_clean(prediction))
    texts = [answer["answer"] for answer in answers]
    if len(set(texts)) > 1:
        texts = [process_punctuation(text) for text in texts]
    return _leave_one_out(answers, texts, lambda text: text == wanted)


def raw_matches(prediction: str, answers: Iterable[str]) -> float:
    """min(1, equal answers / 3) of texts as they are (LAVIS's A-OKVQA)."""
    return min(1.0, sum(answer == prediction for answer in answers) / 3.0)


def _leave_one_out(
    answers: Sequence[Annotated], texts: Sequence[str], matches: Callable[[str], bool]
) -> float:
    # Fields are compared after the text is processed, as the original changes it in place.
    processed = [{**answer, "answer": text} for answer, text in zip(answers, texts, strict=True)]
    total = 0.0
    for own in processed:
        others = (answer for answer in processed if answer != own)
        total += min(1, sum(matches(answer["answer"]) for answer in others) / 3)
    return total / len(processed)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


class VqaQuestion(NamedTuple):
    """What the tables of VQA accuracy group by."""

    id: str | int
    question_type: str
    answer_type: str
    answers: Sequence[Annotated]


def table(
    questions: Sequence[VqaQuestion], predictions: Sequence[str], of: Accuracy
) -> dict[str, Any]:
    """{"overall", "per_question_type", "per_answer_type", "per_question"} in percent, with two decimals
    as the VQA API prints them. of: the accuracy of one question."""
    accuracies = [of(p, q.answers) for q, p in zip(questions, predictions, strict=True)]
    by_question_type: dict[str, list[float]] = {}
    by_answer_type: dict[str, list[float]] = {}
    for question, accuracy in zip(questions, accuracies, strict=True):
        by_question_type.setdefault(question.question_type, []).append(accuracy)
        by_answer_type.setdefault(question.answer_type, []).append(accuracy)
    return {
        "overall": _percent(accuracies),
        "per_question_type": {name: _percent(v) for name, v in by_question_type.items()},
        "per_answer_type": {name: _percent(v) for name, v in by_answer_type.items()},
        "per_question": {
            str(q.id): round(100 * a, 2) for q, a in zip(questions, accuracies, strict=True)
        },
    }


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 2)
