"""The part `prefill` of serve.py."""

import argparse
import asyncio
import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import Table
from http_load import Outcome, first_token_seconds, percentiles, post
from serve_common import Row, Server, make_rows

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates, sequences
from minigpt4_jax.processing.tokenizer import load_tokenizer

MAX_ANSWER = 1024  # the server's own limit
ANSWERS = 7  # with the long prompt a batch of 8 rows, which is not resized


def prefill(args: argparse.Namespace, server: Server, table: Table) -> None:
    """The gaps between the pieces of running answers while a prompt is processed that fills most of the
    context, and once it has left."""
    prompts = long_prompts(args, args.rounds)
    during: list[float] = []
    after: list[float] = []
    admitted = []
    for number, prompt in enumerate(prompts):
        rows = make_rows(ANSWERS, seed=6000 + number)
        rows = [row._replace(max_tokens=min(args.context // 2, MAX_ANSWER)) for row in rows]
        answers, long = asyncio.run(_admit_beside(server, rows, prompt))
        _check(rows, answers, long)
        during += _gaps(answers, long.sent, long.ended)
        after += _gaps(answers, long.ended, min(answer.ended for answer in answers))
        admitted.append(long)
    first = percentiles(first_token_seconds(admitted))
    name = f"{ANSWERS} answers"
    table.row(f"{name}, long prompt", len(admitted), "", *first, *percentiles(during), max(during))
    table.row(f"{name} alone", "", "", "", "", "", *percentiles(after), max(after))
    tokens = ", ".join(str(long.prompt_tokens) for long in admitted)
    print(f"# tokens of the long prompts: {tokens}", flush=True)


def long_prompts(args: argparse.Namespace, count: int) -> list[Row]:
    """Questions without an image whose prompts fill the context but for a few tokens, none of which begins
    like another."""
    folder = Path(args.model)
    config = model_directory.read_config(folder)
    tokenizer = load_tokenizer(model_directory.tokenizer_dir(folder), config.tokenizer.kind)
    template = chat_templates.chat_format(config, tokenizer)

    def num_tokens(words: Sequence[str]) -> int:
        prompt = template.render([(" ".join(words), None)])
        return len(sequences.prompt_tokens(tokenizer, config, prompt, images=0))

    rng = np.random.default_rng(6000)
    rows = []
    for n in range(count):
        words = [str(number) for number in rng.integers(100, 1000, args.context)]
        lengths = range(args.context)
        fitting = bisect.bisect(lengths, args.context - 8, key=lambda k: num_tokens(words[:k])) - 1
        rows.append(Row(b"", " ".join(words[:fitting]), 2, n))
    return rows


async def _admit_beside(
    server: Server, rows: Sequence[Row], prompt: Row
) -> tuple[list[Outcome], Outcome]:
    """Begin answers, and send a prompt when all of them are being written."""
    begun = [asyncio.Event() for _ in rows]
    answers = asyncio.gather(
        *(post(server.port, n, row.body(), begun=begun[n]) for n, row in enumerate(rows))
    )
    waiting = asyncio.gather(*(event.wait() for event in begun))
    await asyncio.wait([answers, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    long = await post(server.port, len(rows), prompt.body())
    return await answers, long


def _check(rows: Sequence[Row], answers: Sequence[Outcome], long: Outcome) -> None:
    for row, answer in zip(rows, answers, strict=True):
        if answer.tokens != row.max_tokens:
            raise UserError(f"an answer has {answer.tokens} tokens: {answer.error}")
    if long.status != 200 or long.error:
        raise UserError(f"the long prompt: {long.status} {long.error}")
    if min(answer.ended for answer in answers) <= long.ended:
        raise UserError("the answers ended before the long prompt's; pass a larger --context")


def _gaps(answers: Sequence[Outcome], start: float, end: float) -> list[float]:
    """Seconds between two pieces of an answer, as far as they overlap an interval."""
    found = []
    for answer in answers:
        times = np.array(answer.arrivals)
        overlaps = (times[1:] > start) & (times[:-1] < end)
        found += np.diff(times)[overlaps].tolist()
    return found
