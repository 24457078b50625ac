"""The order of batches: fixed by the seed, resumable anywhere, independent of the number of workers."""

import json
import logging

import pytest
from helpers.paths import TOKENIZER
from helpers.resuming import answers_of, data_config, same_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.mixture import MixtureComponent
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
    """Ten examples with different answers."""
    return [Example((p,), (), (name,)) for p, name in zip(photos, NAMES, strict=True)]


def loader(
    examples,
    *,
    batch_size=4,
    seed=1,
    prompts=STAGE2_PROMPTS,
    epochs=None,
    keep_remainder=False,
    **data,
):
    component = MixtureComponent("", ExampleList("", examples), prompts=prompts)
    return make_loader(
        [component], data_config(**data), CONFIG, TOKENIZER, batch_size=batch_size, seed=seed,
        epochs=epochs, keep_remainder=keep_remainder,
    )  # fmt: skip


def names(batch):
    """The answers of the rows with labels."""
    return [name for name in answers_of(batch) if name]


def test_batches_are_what_the_model_takes(examples):
    batch = next(loader(examples))
    assert isinstance(batch, Batch)
    assert batch.pixels.shape == (4, 1, 28, 28, 3)
    assert batch.tokens.shape[0] == 4
    assert batch.tokens.shape[1] % 8 == 0


def test_every_row_once_per_epoch_in_a_new_order(examples):
    batches = loader(examples)
    order = [name for _ in range(10) for name in names(next(batches))]
    epochs = [order[n : n + 10] for n in range(0, 40, 10)]
    assert all(sorted(epoch) == list(NAMES) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (batches.steps, batches.batches_per_epoch) == (None, 2)


def test_order_depends_on_the_seed(examples):
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


def test_fewer_examples_than_a_batch_repeat_endlessly(examples):
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
    uninterrupted = list(zip(range(10), loader(examples, seed=seed, crop=crop), strict=False))
    first = loader(examples, seed=seed, crop=crop, threads=threads)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.state()))
    first.close()
    second = loader(examples, seed=seed, crop=crop, threads=threads)
    next(second)  # batches read before do not matter
    second.restore(state)
    for step, batch in uninterrupted[stop:]:
        assert same_batch(batch, next(second)), step
    second.close()


def test_worker_processes_give_the_same_batches(examples):
    expected = loader(examples)
    batches = [next(expected) for _ in range(6)]
    with_workers = loader(examples, workers=2, threads=1)
    for batch in batches[:3]:
        assert same_batch(batch, next(with_workers))
    state = with_workers.state()
    with_workers.close()
    without_workers = loader(examples)
    without_workers.restore(state)
    for batch in batches[3:]:
        assert same_batch(batch, next(without_workers))


def test_iterating_after_close(examples):
    batches = loader(examples, threads=2)
    first = next(batches)
    batches.close()
    expected = loader(examples)
    assert same_batch(first, next(expected))
    assert same_batch(next(batches), next(expected))
    batches.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed was 1 and is now 2"),
        ({"batch_size": 5}, "batch_size was 4 and is now 5"),
        ({"shuffle": False}, "shuffle was True"),
        ({"prompts": ()}, "contents was"),
    ],
)
def test_state_of_other_settings_is_rejected(examples, changes, message):
    with pytest.raises(UserError, match=message):
        loader(examples, **changes).restore(loader(examples).state())


def test_state_of_other_data_is_rejected(examples):
    state = loader(examples).state()
    with pytest.raises(UserError, match="examples was 10 and is now 9"):
        loader(examples[:9]).restore(state)
    changed = [examples[0]._replace(answers=("z",)), *examples[1:]]
    with pytest.raises(UserError, match="contents was"):
        loader(changed).restore(state)
    moved = [e._replace(images=(e.images[0].replace("photos", "elsewhere"),)) for e in examples]
    loader(moved).restore(state)  # the same files in another folder


def test_no_examples():
    with pytest.raises(UserError, match="the dataset is empty"):
        loader([])


def test_system_messages_that_the_prompt_format_has_no_place_for(examples):
    asked = examples[0]._replace(questions=("Why?",), system="Be kind")
    with pytest.raises(UserError, match=r"data: 1 of 10 rows: .*system message.*prompt format"):
        loader([asked, *examples[1:]])


@pytest.mark.parametrize("threads", [0, 2])
def test_broken_image_is_named(examples, tmp_path, threads):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    batches = loader([examples[0]._replace(images=(str(broken),))], threads=threads)
    with pytest.raises(UserError, match=r"broken\.png: is a web page"):
        next(batches)
    batches.close()


def test_cut_answers_are_counted(examples, caplog):
    long = [examples[0]._replace(answers=("a dog " * 30,)), *examples]
    with caplog.at_level(logging.WARNING):
        loader(examples)
        assert not caplog.records
        loader(long)
    (record,) = caplog.records
    assert "1 of 11 answers are longer than max_text_length 20" in record.getMessage()
