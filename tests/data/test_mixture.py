"""Mixtures: ratios, batch sizes, order, resuming, and rows that cannot be read."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from helpers.paths import TOKENIZER
from helpers.questions import Questions
from helpers.resuming import answers_of, data_config, half, joined, same_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.mixture import (
    BatchOrder,
    ExampleRef,
    MixtureComponent,
    MixtureSchedule,
    mixture_cycle,
)
from minigpt4_jax.data.skipped import SkipCounter, SkippedRow
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28), qformer=QFormerConfig(queries=8), max_text_length=20
)


def loader(components, *, batch_size=6, seed=1, multiple=1, shard=None, **data):
    return make_loader(
        components, data_config(**data), CONFIG, TOKENIZER, batch_size=batch_size, seed=seed,
        multiple=multiple, shard=shard,
    )  # fmt: skip


def mixture(photos, **changes):
    components = [
        MixtureComponent("a", Questions("a", photos), ratio=2, batch_size=4),
        MixtureComponent("b", Questions("b", photos[:5]), ratio=1, batch_size=2),
        MixtureComponent("c", ExampleList("c", [Example((), ("so?",), ("c",))] * 3), ratio=1),
    ]
    if changes.get("mix_by") == "example":
        components = [component._replace(batch_size=0) for component in components]
    return loader(components, **changes)


# --- the order ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**40))
def test_ratios_hold_over_a_cycle_and_turns_are_counted(ratios, seed):
    schedule = MixtureSchedule(mixture_cycle(ratios), seed)
    turns = Counter()
    for number in range(2 * len(schedule.cycle)):
        component, earlier = schedule.turn(number)
        assert earlier == turns[component]
        turns[component] += 1
        if (number + 1) % len(schedule.cycle) == 0:
            shares = [turns[n] / (number + 1) for n in range(len(ratios))]
            np.testing.assert_allclose(shares, np.array(ratios) / sum(ratios))


def test_cycles_differ_and_every_component_has_a_turn():
    schedule = MixtureSchedule(mixture_cycle([5, 5]), 1)
    cycles = [tuple(schedule.turn(10 * cycle + n)[0] for n in range(10)) for cycle in range(8)]
    assert len(set(cycles)) > 4
    counts = np.bincount(mixture_cycle([0.5, 0.25, 1e-9]))
    assert counts[2] == 1
    assert abs(counts[0] - 2 * counts[1]) <= 1
    assert np.bincount(mixture_cycle([115, 14])).tolist() == [115, 14]


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    st.sampled_from(["step", "example"]),
    st.integers(0, 99),
)  # fmt: skip
def test_every_example_of_a_component_once_per_epoch(components, mix_by, seed):
    lengths, ratios, sizes = zip(*components, strict=True)
    sizes = sizes[:1] * len(sizes) if mix_by == "example" else sizes
    order = BatchOrder(lengths, ratios, sizes, mix_by=mix_by, seed=seed)
    indices = {n: [] for n in range(len(components))}
    for step in range(30):
        refs = order.examples(step)
        assert len(refs) == order.batch_size(step)
        if mix_by == "step":
            assert len({ref.component for ref in refs}) == 1
        for ref in refs:
            assert ref.draw == len(indices[ref.component])
            indices[ref.component].append(order.source_index(ref))
    for component, drawn in indices.items():
        for start in range(0, len(drawn) - lengths[component] + 1, lengths[component]):
            epoch = drawn[start : start + lengths[component]]
            assert sorted(epoch) == list(range(lengths[component]))


def test_a_mixture_is_endless():
    assert BatchOrder([5, 5], [1, 1], [1, 1]).steps is None
    with pytest.raises(ValueError, match="epochs=2: a mixture is endless"):
        BatchOrder([5, 5], [1, 1], [1, 1], epochs=2)


def test_components_of_equal_length_are_shuffled_differently():
    order = BatchOrder([50, 50], [1, 1], [1, 1], seed=3)
    first, second = (
        [order.source_index(ExampleRef(component, n)) for n in range(50)] for component in (0, 1)
    )
    assert first != second


# --- batches -----------------------------------------------------------------------------------


def test_batches_of_one_component_with_its_own_size(photos):
    batches, counts = mixture(photos), Counter()
    for _ in range(8):
        batch = next(batches)
        names = {answer[0] for answer in answers_of(batch)}
        assert len(names) == 1
        (name,) = names
        assert len(batch.tokens) == {"a": 4, "b": 2, "c": 6}[name]
        counts[name] += 1
    assert counts == {"a": 4, "b": 2, "c": 2}


def test_batches_with_rows_of_all_components(photos):
    batches = mixture(photos, mix_by="example")
    counts = Counter(answer[0] for _ in range(8) for answer in answers_of(next(batches)))
    assert counts == {"a": 24, "b": 12, "c": 12}
    assert len({answer[0] for answer in answers_of(next(batches))}) > 1


def test_random_choices_of_a_source_differ_by_epoch_and_are_reproducible(photos):
    def tokens():
        batches = loader([MixtureComponent("a", Questions("a", photos[:1]))], batch_size=1, seed=0)
        return [next(batches).tokens.tolist() for _ in range(12)]

    first = tokens()
    assert tokens() == first
    assert len({str(row) for row in first}) > 3


@pytest.mark.parametrize("mix_by", ["step", "example"])
def test_mixture_resumes_anywhere(photos, mix_by):
    """Without worker processes; test_resume.py has a mixture with them."""
    uninterrupted = mixture(photos, mix_by=mix_by)
    expected = [next(uninterrupted) for _ in range(9)]
    for stop in range(9):
        first = mixture(photos, mix_by=mix_by)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state()))
        first.close()
        second = mixture(photos, mix_by=mix_by)
        second.restore(state)
        assert all(same_batch(next(second), batch) for batch in expected[stop:])
        second.close()


def test_processes_make_the_rows_of_the_same_batches(photos):
    complete = mixture(photos)
    processes = [mixture(photos, shard=partial(half, n)) for n in (0, 1)]
    processes[0].restore(complete.state())
    for _ in range(6):
        assert same_batch(next(complete), joined([next(process) for process in processes]))


def test_state_of_another_mixture_is_rejected(photos):
    state = mixture(photos).state()
    other = [MixtureComponent("a", Questions("a", photos), ratio=3, batch_size=4)]
    with pytest.raises(UserError, match="a ratio was 2 and is now 3"):
        loader(other).restore(state)


def test_batch_size_from_a_number_of_tokens(photos):
    def rows(tokens, **changes):
        component = MixtureComponent("a", Questions("a", photos), tokens=tokens)
        batch = next(loader([component], seed=0, **changes))
        assert batch.tokens.size <= tokens
        return len(batch.tokens)

    width = next(mixture(photos, mix_by="example")).tokens.shape[1]
    assert rows(10 * width) == 10
    assert rows(10 * width + 7, multiple=4) == 8
    with pytest.raises(UserError, match=r"more than its 8 tokens"):
        rows(8)


# --- rows that cannot be read --------------------------------------------------------------------


def with_faults(photos, tmp_path, **changes):
    """File 2 is no image, file 4 is missing, and row 5 is torn."""
    web = tmp_path / "web.jpg"
    web.write_bytes(b"<html>")
    paths = [*photos]
    paths[2], paths[4] = str(web), str(tmp_path / "none.jpg")
    components = [MixtureComponent("a", Questions("a", paths, invalid=(5,)))]
    return loader(components, **{"batch_size": 4, "seed": 0, "max_broken": 0.5, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_rows_are_replaced_and_counted(photos, tmp_path, workers):
    batches = with_faults(photos, tmp_path, workers=workers)
    read = [next(batches) for _ in range(5)]
    batches.close()
    assert batches.skip_counter.rows == 20
    causes = batches.skip_counter.causes
    assert set(causes) == {"file that is no image", "image that is missing", "row that is torn"}
    assert min(causes.values()) >= 2  # each is drawn twice in two epochs
    assert all(batch.pixels.any(axis=(1, 2, 3, 4)).all() for batch in read)
    answers = [answer for batch in read for answer in answers_of(batch)]
    assert not {"a2", "a4", "a5"} & set(answers)
    assert len(answers) == 20
    again = with_faults(photos, tmp_path)
    assert all(same_batch(next(again), batch) for batch in read)
    assert again.skip_counter.state() == batches.skip_counter.state()
    third = with_faults(photos, tmp_path)
    third.restore(json.loads(json.dumps(again.state())))
    assert third.skip_counter.causes == causes
    assert "rows skipped (" in str(again.skip_counter)


def test_processes_agree_on_the_shape_of_a_batch_with_broken_rows(photos, tmp_path):
    complete = with_faults(photos, tmp_path)
    processes = [with_faults(photos, tmp_path, shard=partial(half, n)) for n in (0, 1)]
    for _ in range(5):
        assert same_batch(next(complete), joined([next(process) for process in processes]))
    total = sum((process.skip_counter.causes for process in processes), Counter())
    assert total == complete.skip_counter.causes


def test_first_broken_row_is_an_error_if_none_is_allowed(photos, tmp_path):
    batches = with_faults(photos, tmp_path, max_broken=0, batch_size=10)
    with pytest.raises(UserError, match=r"a: (image|a \d)"):
        next(batches)
    batches.close()


def test_too_many_broken_rows_are_an_error(photos, tmp_path):
    batches = with_faults(photos, tmp_path, max_broken=0.01)
    with pytest.raises(UserError, match=r"max_broken = 0\.01 .*; data: \d of \d+ rows skipped"):
        for _ in range(50):
            next(batches)


def test_a_few_broken_rows_at_the_start_of_a_large_dataset_are_no_error():
    counter, row = SkipCounter(0.01, num_examples=50_000), SkippedRow("a", "torn", "a 5: torn")
    counter.add(4, [row] * 4)
    counter.add(4, [row] * 4)
    with pytest.raises(UserError, match="11 of 12 rows skipped"):
        counter.add(4, [row] * 3)


@pytest.mark.parametrize(("num_examples", "allowed"), [(30, 8), (1000, 270)])
def test_rows_that_are_drawn_again_and_again_are_counted_once(num_examples, allowed):
    """Broken rows among all count, as for missing images: replacements and epochs add none."""
    share = 0.27

    def rows(numbers):
        return [SkippedRow("a", "torn", f"a {number}: torn") for number in numbers]

    counter = SkipCounter(share, num_examples)
    for _ in range(3):  # replacements are broken too, so 4 of 10 draws or more
        counter.add(10, rows(range(4)))
    counter.add(4 * num_examples, rows(range(allowed)) * 4)
    resumed = SkipCounter(share, num_examples)
    other = SkipCounter(share, num_examples)  # of another process
    resumed.restore(SkipCounter.total([counter.report(), other.report()]).state())
    with pytest.raises(UserError, match=r"max_broken = 0\.27 of all"):
        resumed.add(1, rows([allowed]))


def test_replacements_are_draws_too():
    """With a fifth of a large dataset broken, a fourth as many rows are skipped as are used."""
    row = SkippedRow("a", "torn", "a 5: torn")
    counter = SkipCounter(0.2, num_examples=50_000)
    counter.add(2000, [row] * 500)
    with pytest.raises(UserError, match="501 of 2000 rows skipped"):
        counter.add(0, [row])


def test_no_readable_row_is_an_error(photos):
    component = MixtureComponent("a", Questions("a", photos, invalid=range(10)))
    batches = loader([component], batch_size=2, seed=0, max_broken=1)
    with pytest.raises(UserError, match="a torn row: none of the replacements"):
        next(batches)


def test_row_without_a_readable_image_has_no_labels(tmp_path):
    examples = ExampleList("", [Example((str(tmp_path / "none.png"),), (), ("a",))] * 3)
    batches = loader([MixtureComponent("", examples)], batch_size=2, seed=0, max_broken=1)
    batch = next(batches)
    assert (batch.label_positions == -1).all()
    assert not batch.pixels.any()
    assert batches.skip_counter.skipped == 16
