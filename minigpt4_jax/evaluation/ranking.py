"""Candidates ranked by their loss, as the original's multi_select does, and by their mean loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Row
from minigpt4_jax.processing.chat_templates import with_images
from minigpt4_jax.processing.images import open_image
from minigpt4_jax.processing.sequences import training_prompt

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model

RANKED_BATCH = 10  # rows of the original's batches, on which its losses depend
PADDING = "none"  # the candidate that fills rows with fewer of them


def rank_rows(
    model: "Model", rows: Sequence[Row], images: Sequence[Path | None]
) -> list[dict[str, list[float]] | UserError]:
    """{"losses", "mean_losses"} of the candidates of each row of one batch.

    losses: summed negative log-likelihood / (padded length - 1), where the length is that of the
    longest k-th candidate of the batch; rows with fewer candidates have PADDING there. mean_losses: of a
    candidate's tokens. A row whose image cannot be read has the error instead, and is not in the batch.
    """
    errors: dict[int, UserError] = {}
    for i, image in enumerate(images):
        try:
            if image is not None:
                open_image(image)
        except UserError as e:
            errors[i] = e
    kept = [i for i in range(len(rows)) if i not in errors]
    ranked = iter(_rank(model, [rows[i] for i in kept], [images[i] for i in kept]) if kept else ())
    return [errors[i] if i in errors else next(ranked) for i in range(len(rows))]


def _rank(
    model: "Model", rows: Sequence[Row], images: Sequence[Path | None]
) -> list[dict[str, list[float]]]:
    from minigpt4_jax.inference.scoring import answer_rows, padded_mean

    columns = max(len(row.candidates) for row in rows)
    padded = [[*row.candidates, *[PADDING] * (columns - len(row.candidates))] for row in rows]
    counts = [int(image is not None) for image in images]
    prompts = [
        training_prompt(model.tokenizer, model.config, with_images(row.question, count))
        for row, count in zip(rows, counts, strict=True)
    ]
    # All columns in one call, so that an image is encoded once.
    groups = [[] if image is None else [image] for image in images]
    nll, lengths = model.score(
        groups * columns, prompts * columns, [row[k] for k in range(columns) for row in padded]
    )
    nll, lengths = nll.reshape(columns, -1), lengths.reshape(columns, -1)  # [columns, rows]
    losses = np.stack([
        padded_mean(
            answer_rows(model.tokenizer, model.config, prompts, counts, [row[k] for row in padded]),
            nll[k],
        )
        for k in range(columns)
    ])  # fmt: skip
    means = nll / lengths
    return [
        {"losses": losses[:n, i].tolist(), "mean_losses": means[:n, i].tolist()}
        for i, n in enumerate(len(row.candidates) for row in rows)
    ]
