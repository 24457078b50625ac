"""Questions with the answer yes or no: reading answers, and what is counted over them."""

from collections.abc import Sequence

from minigpt4_jax.evaluation.metrics.statistics import ratio


def read_pope(answer: str) -> str:
    """ "yes" or "no" as LLaVA's eval_pope.py reads it: "no" if a word before the first period is `No`,
    `no` or `not`, and "yes" otherwise, whatever the answer says."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_first_word(answer: str) -> str | None:
    """ "yes" or "no" by the first word in any case, true and false included; None if it is neither."""
    words = "".join(c if c.isalnum() else " " for c in answer.lower()).split()
    readings = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
    return readings.get(words[0]) if words else None


def counts(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """TP, FP, TN and FN of "yes" and "no"; any label but "no" is yes."""
    table = {"TP": 0, "FP": 0, "TN": 0, "FN": 0}
    for prediction, label in zip(predictions, labels, strict=True):
        yes = label != "no"
        name = ("TP" if yes else "FP") if prediction == "yes" else ("FN" if yes else "TN")
        table[name] += 1
    return table


def measures(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """The counts with accuracy, precision, recall, f1 and yes_ratio (fractions). A ratio whose divisor
    is 0 is 0; the original ends with an error there."""
    c = counts(predictions, labels)
    precision = ratio(c["TP"], c["TP"] + c["FP"])
    recall = ratio(c["TP"], c["TP"] + c["FN"])
    return {
        **c,
        "accuracy": ratio(c["TP"] + c["TN"], sum(c.values())),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(c["TP"] + c["FP"], sum(c.values())),
    }
