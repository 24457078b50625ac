"""Padded arrays of a batch: tokens, lengths, label positions, pixels; one prompt for all its rows."""

import dataclasses

import numpy as np
from helpers.paths import TOKENIZER
from helpers.resuming import half
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import IMAGE, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.arrays import Padding
from minigpt4_jax.data.batching import BatchMaker, pad_sequences, tokenize_example
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.mixture import BatchOrder, MixtureComponent
from minigpt4_jax.processing import images
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT, STAGE2_PROMPTS
from minigpt4_jax.processing.sequences import TokenSequence
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28), qformer=QFormerConfig(queries=8), max_text_length=20
)


def maker(examples, prompts=STAGE2_PROMPTS, batch_size=None, **changes):
    """A BatchMaker whose batches are the examples in order, repeatedly."""
    size = batch_size or len(examples)
    component = MixtureComponent("", ExampleList("", examples), batch_size=size, prompts=prompts)
    epochs = 1 if size > len(examples) else None
    order = BatchOrder(
        [len(examples)], [1], [size], shuffle=False, epochs=epochs, keep_remainder=True
    )
    return BatchMaker((component,), order, TOKENIZER, CONFIG, 3, Padding(8, 4), **changes)


def arrays(make, step=0):
    loaded = make(step)
    assert not loaded.skipped
    return loaded.arrays


def text_after_image(prompt):
    """Token ids of the text after the image of a stage-2 prompt in the template."""
    return TOKENIZER.encode(CONFIG.prompt_template.replace("{}", prompt).split("<ImageHere>")[1])


def test_one_prompt_for_the_whole_batch(photos):
    examples = [Example((p,), (), ("a dog",)) for p in photos[:4]]
    make, prompts = maker(examples), set()
    for step in range(12):
        batch = arrays(make, step)
        prompt = text_after_image(make.draw_prompt(step))
        for tokens, length in zip(batch.tokens, batch.lengths, strict=True):
            answer = TOKENIZER.encode("a dog###")
            assert tokens[length - len(answer) : length].tolist() == answer
            prompt_end = length - len(answer)
            assert tokens[prompt_end - len(prompt) : prompt_end].tolist() == prompt
        prompts.add(make.draw_prompt(step))
    assert prompts == set(STAGE2_PROMPTS)


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


def test_text_only_batch_has_no_images():
    examples = [Example((), ("q",), ("c",))] * 2
    assert arrays(maker(examples), 0).pixels.shape == (2, 0, 28, 28, 3)


def test_prompt_gets_a_slot_for_each_image(photos):
    row = tokenize_example(
        Example(tuple(photos[:3]), (), ("a",)), TOKENIZER, CONFIG, STAGE2_PROMPTS[0]
    )
    assert row.tokens.count(IMAGE) == 24
    plain = tokenize_example(Example((photos[0],), (), ("a",)), TOKENIZER, CONFIG, "Describe it.")
    assert plain.tokens.count(IMAGE) == 8  # the image comes before a prompt without a slot


def test_version_2_questions_end_with_a_space(photos):
    config = dataclasses.replace(CONFIG, variant="minigpt-v2", prompt_template="[INST] {} [/INST]")
    example = Example((photos[0],), (f"{IMAGE_SLOT} [vqa] what?",), ("a",))
    question = TOKENIZER.encode("</Img> [vqa] what?  [/INST]")
    tokens = tokenize_example(example, TOKENIZER, config).tokens
    start = len(tokens) - 1 - tokens[::-1].index(IMAGE) + 1
    assert tokens[start : start + len(question)] == question
    text = tokenize_example(Example((), ("what?",), ("a",)), TOKENIZER, config).tokens
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


def test_shards_of_processes_are_the_rows_of_the_whole_batch(photos):
    """All processes pad to the longest row of the whole batch."""
    examples = [Example((p,), (), ("a dog " * n,)) for n, p in enumerate(photos[:4], 1)]
    options = {"crop": True, "image_ids": True}
    whole = arrays(maker(examples, **options), 5)
    parts = [arrays(maker(examples, shards={4: half(n, 4)}, **options), 5) for n in (0, 1)]
    for field, first, second in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(field, np.concatenate([first, second]))


def test_rows_of_an_image_have_its_number(photos):
    examples = [Example((p,), (), (text,)) for p in photos[:2] for text in ("a dog", "a cat")]
    assert arrays(maker(examples), 0).image_ids is None
    a, b, c, d = arrays(maker(examples, image_ids=True)).image_ids.tolist()
    assert a == b != c == d


def test_crops_depend_on_step_and_row(photos):
    examples = [Example((photos[0],), (), ("a",))] * 2
    make = maker(examples, crop=True)
    one, again, other = (arrays(make, step).pixels for step in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one[0] != one[1]).any()


sequences = st.builds(
    lambda tokens, labels: TokenSequence(tokens, [t for t in labels if t < len(tokens)], False),
    st.lists(st.integers(0, 99), min_size=1, max_size=70),
    st.lists(st.integers(1, 69), max_size=40, unique=True).map(sorted),
)


@given(st.lists(sequences, min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 20))
@settings(deadline=None)
def test_padding_properties(sequences, tokens_multiple, answers_multiple):
    padding = Padding(tokens_multiple, answers_multiple)
    tokens, lengths, answers = pad_sequences(sequences, 77, padding)
    assert tokens.dtype == lengths.dtype == answers.dtype == np.int32
    assert tokens.shape[1] % tokens_multiple == 0
    assert answers.shape[1] % answers_multiple == 0
    assert tokens.shape[1] < max(lengths) + tokens_multiple
    for n, row in enumerate(sequences):
        assert tokens[n, : lengths[n]].tolist() == row.tokens
        assert (tokens[n, lengths[n] :] == 77).all()
        assert answers[n][answers[n] >= 0].tolist() == row.label_positions
        assert (answers[n] < lengths[n]).all()
        assert (answers[n, len(row.label_positions) :] == -1).all()
