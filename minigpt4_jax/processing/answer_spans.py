"""Where the answers stand in a conversation that a tokenizer's chat template has rendered."""

import re
from collections.abc import Sequence
from itertools import takewhile

from minigpt4_jax.processing.chat_templates import TokenizerChatTemplate, Turn


def answer_spans(
    template: TokenizerChatTemplate, turns: Sequence[tuple[str, str]], system: str | None
) -> tuple[str, list[tuple[int, int]]]:
    """(the rendered conversation, where each answer with its end symbol begins and ends in it).

    The last turn is what generation continues: the prompt, the answer, the end symbol. Some templates
    prompt for an answer by more text than they write before answers of earlier turns, some write nothing
    after an answer, or not the same after the last one.
    """
    end = template.end_symbol
    (*earlier, (question, answer)) = turns
    asked: list[Turn] = [*earlier, (question, None)]
    prompt = template.render(asked, system=system)
    text = template.render(turns, system=system)
    if not text.startswith(prompt):
        text = prompt + answer + end
    spans: list[tuple[int, int]] = []
    for n, (past_question, past_answer) in enumerate(earlier):
        begins = template.render([*earlier[:n], (past_question, None)], system=system)
        start = len(begins)
        if not prompt.startswith(begins):
            pieces = template.pieces(asked, system)
            # what the template prompts for an answer by, as far as it is before earlier answers too
            between = _common_prefix(pieces[2 * n + 1], pieces[-1])
            before = re.sub(r"^\s*" + re.escape(end), "", pieces[2 * n])
            start = _after(text, before, spans[-1][1] if spans else 0)
            start = _after(text, past_question.strip(), start)
            start = _after(text, between, start)
        stop = _end_of_answer(text, past_answer, end, start)
        if stop is None:
            after = template.pieces(asked, system)[2 * n + 2]
            stop = _end_of_changed_answer(text, past_answer, end, after, start)
        spans.append((start, stop))
    start = len(prompt)
    stop = _end_of_answer(text, answer, end, start)
    if stop is None:
        after = template.pieces(turns, system)[-1]
        stop = _end_of_changed_answer(text, answer, end, after, start)
        if not text[:stop].endswith(end):  # the template writes none
            text, stop = text[:stop] + end, stop + len(end)
    return text[:stop], [*spans, (start, stop)]


def _after(text: str, part: str, start: int) -> int:
    """Where a part of a text that begins at or after `start` ends; `start` if there is none: the template
    has changed it."""
    found = text.find(part, start)
    return start if found < 0 else found + len(part)


def _end_of_answer(text: str, answer: str, end: str, start: int) -> int | None:
    """Where the end symbol of an answer that begins at or after `start` ends in a text.

    None: the template has changed the answer, or does not write the end symbol after it.
    """
    for written in (answer, answer.strip()):  # many templates strip messages
        stop = text.find(written, start)
        if stop >= 0 and (
            closing := re.compile(r"\s*" + re.escape(end)).match(text, stop + len(written))
        ):
            return closing.end()
    return None


def _end_of_changed_answer(text: str, answer: str, end: str, after: str, start: int) -> int:
    """As `_end_of_answer`, by the text that the template writes after the answer.

    after: that text. What the template made of the answer ends before it.
    """
    for written in (answer, answer.strip()):
        if (stop := text.find(written + after, start)) >= 0:
            stop += len(written)
            break
    else:
        stop = text.find(after, start) if after else len(text)
    closing = re.compile(r"\s*" + re.escape(end)).match(text, stop)
    return closing.end() if closing else stop


def _common_prefix(a: str, b: str) -> str:
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(character for character, _ in equal)
