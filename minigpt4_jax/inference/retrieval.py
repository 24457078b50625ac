"""Image-text retrieval: re-ranking the most similar candidates, and recall (LAVIS' retrieval task)."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minigpt4_jax.errors import UserError

NOT_RANKED = -100.0  # score of candidates that are not among the k most similar
RANKS = (1, 5, 10)


class RetrievalScores(NamedTuple):
    """Scores of all pairs; float32."""

    image_to_text: np.ndarray  # [images, texts]
    text_to_image: np.ndarray  # [texts, images]
    similarities: np.ndarray  # [images, texts]: cosines, before re-ranking


def rerank(
    similarities: np.ndarray, match: Callable[[np.ndarray], np.ndarray], k: int
) -> RetrievalScores:
    """Add a matching score to the similarities of each row's k most similar candidates.

    similarities [images, texts]; match: pairs [N, 2] of image and text numbers -> scores [N].
    """
    images, texts = similarities.shape
    by_image = _top(similarities, min(k, texts))  # [images, k]
    by_text = _top(similarities.T, min(k, images))  # [texts, k]
    pairs = {(i, int(j)) for i in range(images) for j in by_image[i]}
    pairs |= {(int(i), j) for j in range(texts) for i in by_text[j]}
    ordered = np.array(sorted(pairs))
    matching = np.zeros_like(similarities)  # each pair is scored once, for both directions
    matching[ordered[:, 0], ordered[:, 1]] = match(ordered)
    total = matching + similarities
    return RetrievalScores(_keep(total, by_image), _keep(total.T, by_text), similarities)


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """The columns of the k largest scores of each row: [rows, k]."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _keep(scores: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """scores with NOT_RANKED in all columns but those [rows, k]."""
    kept = np.full(scores.shape, NOT_RANKED, np.float32)
    rows = np.arange(len(scores))[:, None]
    kept[rows, columns] = scores[rows, columns]
    return kept


def recall(
    scores: RetrievalScores,
    texts_of_image: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
    image_of_text: Sequence[int],
) -> dict[str, float]:
    """R@1, R@5 and R@10 in percent, and their means, in both directions.

    texts_of_image: the right texts of each image; image_of_text: the right image of each text. Keys:
    text_r1, text_r5, text_r10, text_mean (an image finds its texts), image_r1 ... (a text finds its
    image), and mean. UserError: other numbers of images and texts than the scores'.
    """
    images, texts = scores.image_to_text.shape
    if len(texts_of_image) != images or len(image_of_text) != texts:
        raise UserError(
            f"recall: truth for {len(texts_of_image)} images and {len(image_of_text)} texts; the scores "
            f"have {images} and {texts}"
        )
    text_ranks = [
        min(_rank(row, j) for j in texts_of_image[i]) for i, row in enumerate(scores.image_to_text)
    ]
    image_ranks = [
        _rank(row, i) for row, i in zip(scores.text_to_image, image_of_text, strict=True)
    ]
    metrics: dict[str, float] = {}
    for name, ranks in (("text", text_ranks), ("image", image_ranks)):
        for k in RANKS:
            metrics[f"{name}_r{k}"] = 100.0 * float(np.mean(np.array(ranks) < k))
        metrics[f"{name}_mean"] = float(np.mean([metrics[f"{name}_r{k}"] for k in RANKS]))
    metrics["mean"] = (metrics["text_mean"] + metrics["image_mean"]) / 2
    return metrics


def _rank(row: np.ndarray, column: int) -> int:
    """How many candidates come before a column; of equal scores, the later one comes first, as the
    original sorts."""
    order = np.argsort(row)[::-1]
    return int(np.flatnonzero(order == column)[0])
