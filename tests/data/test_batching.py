"""Padded arrays of a batch: tokens, lengths, answers, pixels; one prompt for all its rows."""

import dataclasses

import numpy as np
from helpers.paths import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import IMAGE, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.batching import BatchMaker, Padding, Share, example_row, pad_rows
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.mixture import MixtureComponent, Order
from minigpt4_jax.processing import images
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT, STAGE2_PROMPTS
from minigpt4_jax.processing.sequences import TokenSequence
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28), qformer=QFormerConfig(queries=8), max_text_length=20
)


def maker(examples, prompts=STAGE2_PROMPTS, batch_size=None, **changes):
    """Its batch 0, 1, ... are the examples in their order, over and over."""
    size = batch_size or len(examples)
    part = MixtureComponent("", ExampleList("", examples), batch_size=size, prompts=prompts)
    epochs = 1 if size > len(examples) else None
    order = Order([len(examples)], [1], [size], shuffle=False, epochs=epochs, keep_remainder=True)
    return BatchMaker((part,), order, TOKENIZER, CONFIG, 3, Padding(8, 4), **changes)


def arrays(make, step=0):
    made = make(step)
    assert not made.broken
    return made.arrays


def words(prompt):
    """Ids of the text behind the image of a stage-2 prompt in the template."""
    return TOKENIZER.encode(CONFIG.prompt_template.replace("{}", prompt).split("<ImageHere>")[1])


def test_one_prompt_for_the_whole_batch(photos):
    examples = [Example((p,), (), ("a dog",)) for p in photos[:4]]
    make, seen = maker(examples), set()
    for step in range(12):
        batch = arrays(make, step)
        asked = words(make.draw_prompt(step))
        for tokens, length in zip(batch.tokens, batch.lengths, strict=True):
            answer = TOKENIZER.encode("a dog###")
            assert tokens[length - len(answer) : length].tolist() == answer
            before = length - len(answer)
            assert tokens[before - len(asked) : before].tolist() == asked
        seen.add(make.draw_prompt(step))
    assert seen == set(STAGE2_PROMPTS)


def test_no_prompts_give_bare_visual_tokens(photos):
    examples = [Example((photos[0],), (), ("a dog",))]
    batch = arrays(maker(examples, prompts=()), 0)
    row = [1] + [IMAGE] * 8 + TOKENIZER.encode("a dog###")
    assert batch.tokens[0, : len(row)].tolist() == row
    assert (batch.tokens[0, len(row) :] == TOKENIZER.pad_id).all()


def test_pixels_follow_rows_and_images(photos):
    examples = [
        Example((photos[0],), (), ("a",)),
        Example((photos[1], photos[2]), (f"{IMAGE_SLOT}{IMAGE_SLOT} q",), ("b",)),
        Example((), ("q",), ("c",)),
    ]
    batch = arrays(maker(examples), 0)
    assert batch.pixels.shape == (3, 2, 28, 28, 3)
    assert batch.pixels.dtype == np.uint8
    for row, column, n in ((0, 0, 0), (1, 0, 1), (1, 1, 2)):
        np.testing.assert_array_equal(batch.pixels[row, column], images.load_pixels(photos[n], 28))
    assert not batch.pixels[0, 1].any()
    assert not batch.pixels[2].any()
    assert [(tokens == IMAGE).sum() for tokens in batch.tokens] == [8, 16, 0]


def test_text_alone_has_no_images():
    examples = [Example((), ("q",), ("c",))] * 2
    assert arrays(maker(examples), 0).pixels.shape == (2, 0, 28, 28, 3)


def test_a_drawn_prompt_gets_a_slot_for_each_image(photos):
    row = example_row(Example(tuple(photos[:3]), (), ("a",)), TOKENIZER, CONFIG, STAGE2_PROMPTS[0])
    assert row.tokens.count(IMAGE) == 24
    plain = example_row(Example((photos[0],), (), ("a",)), TOKENIZER, CONFIG, "Describe it.")
    assert plain.tokens.count(IMAGE) == 8  # a prompt without a slot has the image in front


def test_version_2_questions_end_with_a_space(photos):
    config = dataclasses.replace(CONFIG, variant="minigpt-v2", prompt_template="[INST] {} [/INST]")
    example = Example((photos[0],), (f"{IMAGE_SLOT} [vqa] what?",), ("a",))
    asked = TOKENIZER.encode("</Img> [vqa] what?  [/INST]")
    tokens = example_row(example, TOKENIZER, config).tokens
    start = len(tokens) - 1 - tokens[::-1].index(IMAGE) + 1
    assert tokens[start : start + len(asked)] == asked
    text = example_row(Example((), ("what?",), ("a",)), TOKENIZER, config).tokens
    assert text[1 : 1 + len(TOKENIZER.encode("[INST] what? [/INST]"))] == TOKENIZER.encode(
        "[INST] what? [/INST]"
    )


def test_missing_rows_have_no_labels(photos):
    examples = [Example((p,), (), ("a dog",)) for p in photos[:2]]
    batch = arrays(maker(examples, batch_size=4), 0)
    assert batch.tokens.shape[0] == batch.pixels.shape[0] == 4
    assert (batch.label_positions[:2] >= 0).any(axis=1).all()
    assert (batch.label_positions[2:] == -1).all()
    assert (batch.lengths > 0).all()


def half(n: int, size: int) -> Share:
    """The rows of the first process of two, or of the second."""
    rows = range(size * n // 2, size * (n + 1) // 2)
    return Share(tuple(rows), frozenset(rows))


def test_shares_are_the_rows_of_the_whole_batch(photos):
    """Rows of one process are short, yet padded as the longest of all."""
    examples = [Example((p,), (), ("a dog " * n,)) for n, p in enumerate(photos[:4], 1)]
    whole = arrays(maker(examples, crop=True), 5)
    parts = [arrays(maker(examples, crop=True, shares={4: half(n, 4)}), 5) for n in (0, 1)]
    for field, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(field, np.concatenate([first, second]))


def test_crops_differ_by_step_and_row_and_are_repeatable(photos):
    examples = [Example((photos[0],), (), ("a",))] * 2
    make = maker(examples, crop=True)
    one, again, other = (arrays(make, step).pixels for step in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one[0] != one[1]).any()


rows = st.builds(
    lambda tokens, labels: TokenSequence(tokens, [t for t in labels if t < len(tokens)], False),
    st.lists(st.integers(0, 99), min_size=1, max_size=70),
    st.lists(st.integers(1, 69), max_size=40, unique=True).map(sorted),
)


@given(st.lists(rows, min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 20))
@settings(deadline=None)
def test_padding_properties(rows, tokens_multiple, answers_multiple):
    tokens, lengths, answers = pad_rows(rows, 77, Padding(tokens_multiple, answers_multiple))
    assert tokens.dtype == lengths.dtype == answers.dtype == np.int32
    assert tokens.shape[1] % tokens_multiple == 0
    assert answers.shape[1] % answers_multiple == 0
    assert tokens.shape[1] < max(lengths) + tokens_multiple
    for n, row in enumerate(rows):
        assert tokens[n, : lengths[n]].tolist() == row.tokens
        assert (tokens[n, lengths[n] :] == 77).all()
        assert answers[n][answers[n] >= 0].tolist() == row.label_positions
        assert (answers[n] < lengths[n]).all()
        assert (answers[n, len(row.label_positions) :] == -1).all()
