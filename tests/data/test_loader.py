"""The order of batches: fixed by the seed, resumed anywhere, the same for any number of workers."""

import json
import logging

import numpy as np
import pytest
from helpers.paths import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.batching import Padding
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.chat_templates import STAGE2_PROMPTS
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28), qformer=QFormerConfig(queries=8), max_text_length=20
)
NAMES = "abcdefghij"


@pytest.fixture(scope="module")
def examples(photos):
    """Ten rows whose answers tell them apart."""
    return [Example((p,), (), (name,)) for p, name in zip(photos, NAMES, strict=True)]


def loader(examples, **changes):
    values = {"batch_size": 4, "seed": 1, "prompts": STAGE2_PROMPTS, "padding": Padding(8, 4)}
    return make_loader(examples, CONFIG, TOKENIZER, **{**values, "threads": 0, **changes})


def names(batch):
    """Which rows are labelled in a batch, by their answers."""
    found = []
    for tokens, answers in zip(batch.tokens, batch.label_positions, strict=True):
        text = TOKENIZER.decode([tokens[t] for t in answers if t >= 0])
        found.append(text.removesuffix("###"))
    return [name for name in found if name]


def equal(first, second):
    return all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_batches_are_what_the_model_takes(examples):
    batch = next(loader(examples))
    assert isinstance(batch, Batch)
    assert batch.pixels.shape == (4, 1, 28, 28, 3)
    assert batch.tokens.shape[0] == 4
    assert batch.tokens.shape[1] % 8 == 0


def test_every_row_once_an_epoch_in_another_order_each(examples):
    batches = loader(examples)
    order = [name for _ in range(10) for name in names(next(batches))]
    epochs = [order[n : n + 10] for n in range(0, 40, 10)]
    assert all(sorted(epoch) == list(NAMES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (batches.steps, batches.batches_per_epoch) == (None, 2)


def test_the_seed_decides(examples):
    def order(seed):
        return [names(batch) for batch in loader(examples, seed=seed, epochs=3)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    # Grain alone would give seed 2 the second epoch of seed 1 as its first
    flat = [name for batch in order(1) for name in batch]
    assert flat[10:20] != [name for batch in order(2) for name in batch][:10]


def test_without_shuffle_and_with_the_remainder(examples):
    batches = loader(examples, shuffle=False, epochs=1, keep_remainder=True)
    assert batches.steps == 3
    assert [names(batch) for batch in batches] == [list("abcd"), list("efgh"), list("ij")]
    assert [names(b) for b in loader(examples, shuffle=False, epochs=1)] == [
        list("abcd"), list("efgh"),
    ]  # fmt: skip


def test_fewer_examples_than_a_batch_repeat_without_end(examples):
    assert sorted(set(names(next(loader(examples[:3], batch_size=8))))) == list("abc")
    with pytest.raises(UserError, match="3 examples do not fill one batch of 8"):
        loader(examples[:3], batch_size=8, epochs=1)


@settings(max_examples=12, deadline=None)
@given(
    stop=st.integers(0, 9),
    seed=st.integers(0, 2**40),
    crop=st.booleans(),
    threads=st.integers(0, 3),
)
def test_resuming_at_any_step_gives_the_same_batches(examples, stop, seed, crop, threads):
    whole = list(zip(range(10), loader(examples, seed=seed, crop=crop), strict=False))
    first = loader(examples, seed=seed, crop=crop, threads=threads)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.state()))
    first.close()
    second = loader(examples, seed=seed, crop=crop, threads=threads)
    next(second)  # what it did before does not matter
    second.restore(state)
    for step, batch in whole[stop:]:
        assert equal(batch, next(second)), step
    second.close()


def test_worker_processes_give_the_same_batches(examples):
    expected = loader(examples)
    batches = [next(expected) for _ in range(6)]
    with_workers = loader(examples, workers=2, threads=1)
    for batch in batches[:3]:
        assert equal(batch, next(with_workers))
    state = with_workers.state()
    with_workers.close()
    alone = loader(examples)
    alone.restore(state)
    for batch in batches[3:]:
        assert equal(batch, next(alone))


def test_iterating_on_after_close(examples):
    batches = loader(examples, threads=2)
    first = next(batches)
    batches.close()
    expected = loader(examples)
    assert equal(first, next(expected))
    assert equal(next(batches), next(expected))
    batches.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2}, "seed was 1 and is now 2"),
        ({"batch_size": 5}, "batch_size was 4 and is now 5"),
        ({"shuffle": False}, "shuffle was True"),
        ({"prompts": ()}, "contents was"),
    ],
)
def test_a_state_of_other_settings_is_refused(examples, changes, named):
    with pytest.raises(UserError, match=named):
        loader(examples, **changes).restore(loader(examples).state())


def test_a_state_of_other_data_is_refused(examples):
    state = loader(examples).state()
    with pytest.raises(UserError, match="examples was 10 and is now 9"):
        loader(examples[:9]).restore(state)
    changed = [examples[0]._replace(answers=("z",)), *examples[1:]]
    with pytest.raises(UserError, match="contents was"):
        loader(changed).restore(state)
    moved = [e._replace(images=(e.images[0].replace("photos", "elsewhere"),)) for e in examples]
    loader(moved).restore(state)  # the same files in another place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be 1 or more"),
        ({"seed": -1}, "seed -1"),
        ({"epochs": 0}, "epochs 0"),
        ({"workers": -1}, "workers -1"),
        ({"threads": -1}, "threads -1"),
    ],
)
def test_wrong_settings(examples, changes, message):
    with pytest.raises(UserError, match=message):
        loader(examples, **changes)


def test_no_examples():
    with pytest.raises(UserError, match="the dataset is empty"):
        loader([])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_broken_image_is_named(examples, tmp_path, threads):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    batches = loader([examples[0]._replace(images=(str(broken),))], threads=threads)
    with pytest.raises(UserError, match=r"broken\.png: is a web page"):
        next(batches)
    batches.close()


def test_long_answers_are_counted(examples, caplog):
    long = [examples[0]._replace(answers=("a dog " * 30,)), *examples]
    with caplog.at_level(logging.WARNING):
        loader(examples)
        assert not caplog.records
        loader(long)
    (record,) = caplog.records
    assert "1 of 11 answers are longer than max_text_length 20" in record.getMessage()
