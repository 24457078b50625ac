"""GQA's own evaluation (eval.py of gqadataset.org), as far as test-dev has the files for it.

Consistency needs answers to the entailed questions, validity and plausibility the file of choices, and
grounding attention maps with scene graphs: none of these is published for test-dev.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from minigpt4_jax.evaluation.metrics.statistics import mean_percent, ratio


class GqaQuestion(NamedTuple):
    """answer: the true one. balanced: others are not evaluated. structural, semantic: types of the
    question; "" in files without types. group: of questions with one distribution of answers."""

    answer: str
    balanced: bool = True
    structural: str = ""
    semantic: str = ""
    group: str | None = None


def figures(questions: Sequence[GqaQuestion], answers: Sequence[str]) -> dict[str, Any]:
    """exact_match: percent of answers that equal the true one, upper case and spaces included. With types
    also binary, open (percent of the questions to be answered with a free choice or not), by type, and
    distribution (lower is better)."""
    pairs = [(q, a) for q, a in zip(questions, answers, strict=True) if q.balanced]
    if not pairs:
        return {}
    found: dict[str, Any] = {"exact_match": mean_percent([a == q.answer for q, a in pairs])}
    if not all(q.structural for q, _ in pairs):
        return found
    hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in pairs:
        hit = answer == question.answer
        kind = "open" if question.structural == "query" else "binary"
        hits[""][kind].append(hit)
        hits["per_structural_type"][question.structural].append(hit)
        hits["per_semantic_type"][question.semantic].append(hit)
    tables = {
        name: {key: mean_percent(values) for key, values in table.items()}
        for name, table in hits.items()
    }
    return found | tables.pop("") | {"distribution": distribution(pairs)} | tables


def distribution(pairs: Sequence[tuple[GqaQuestion, str]]) -> float:
    """The chi-square distance of the answers given in each group from the true ones, averaged over groups
    by their number of questions, over 100."""
    true: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        if question.group is not None:
            true[question.group][question.answer] += 1
            given[question.group][answer] += 1
    total = sum(counts.total() for counts in true.values())
    distance = sum(
        counts.total() * sum((given[group][a] - n) ** 2 / n for a, n in counts.items())
        for group, counts in true.items()
    )
    return ratio(distance, total) / 100
