"""Mixtures: ratios, sizes, order, resumption, and rows that cannot be read."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from helpers.paths import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.data.batching import Padding, Share
from minigpt4_jax.data.dataset import ExampleList
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.loader import make_loader
from minigpt4_jax.data.mixture import MixtureComponent, MixtureSchedule, Order, Pick, cards
from minigpt4_jax.data.skipped import Broken, SkipCounter
from minigpt4_jax.errors import DataError, UserError
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(TOKENIZER)
CONFIG = ModelConfig(
    vision=VisionConfig(image_size=28), qformer=QFormerConfig(queries=8), max_text_length=20
)


class Questions:
    """A Source that draws: the answer tells the example, and the question what was drawn."""

    dropped: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, name, photos, bad=()):
        self.name, self._photos, self._bad = name, photos, bad

    def __len__(self):
        return len(self._photos)

    def example(self, index, rng):
        if index in self._bad:
            raise DataError(f"{self.name} {index}: a torn row", "row that is torn")
        drawn = rng.integers(10)
        question = f"{IMAGE_SLOT} {drawn}?"
        return Example((self._photos[index],), (question,), (f"{self.name}{index}",))


def half(host, size):
    rows = range(size * host // 2, size * (host + 1) // 2)
    return Share(tuple(rows), frozenset(rows))


def answers(batch):
    return [
        TOKENIZER.decode([tokens[t] for t in row if t >= 0]).removesuffix("###")
        for tokens, row in zip(batch.tokens, batch.label_positions, strict=True)
    ]


def mixture(photos, **changes):
    parts = [
        MixtureComponent("a", Questions("a", photos), ratio=2, batch_size=4),
        MixtureComponent("b", Questions("b", photos[:5]), ratio=1, batch_size=2),
        MixtureComponent("c", ExampleList("c", [Example((), ("so?",), ("c",))] * 3), ratio=1),
    ]
    if changes.get("mix_by") == "example":
        parts = [part._replace(batch_size=0) for part in parts]
    values = {"batch_size": 6, "seed": 1, "padding": Padding(8, 4), "threads": 0}
    return make_loader(parts, CONFIG, TOKENIZER, **{**values, **changes})


def equal(first, second):
    return all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def together(parts):
    """The rows of several processes as one batch."""
    fields = [f for f in zip(*parts, strict=True) if f[0] is not None]
    return Batch(*map(np.concatenate, fields))


# --- the order ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**40))
def test_ratios_hold_over_a_pack_and_turns_are_counted(ratios, seed):
    deck = MixtureSchedule(cards(ratios), seed)
    before = Counter()
    for turn in range(2 * len(deck.pack)):
        part, count = deck.deal(turn)
        assert count == before[part]
        before[part] += 1
        if (turn + 1) % len(deck.pack) == 0:
            shares = [before[n] / (turn + 1) for n in range(len(ratios))]
            np.testing.assert_allclose(shares, np.array(ratios) / sum(ratios))


def test_packs_differ_and_fractions_have_cards():
    deck = MixtureSchedule(cards([5, 5]), 1)
    dealt = [tuple(deck.deal(10 * pack + n)[0] for n in range(10)) for pack in range(8)]
    assert len(set(dealt)) > 4
    counts = np.bincount(cards([0.5, 0.25, 1e-9]))
    assert counts[2] == 1
    assert abs(counts[0] - 2 * counts[1]) <= 1
    assert np.bincount(cards([115, 14])).tolist() == [115, 14]


@settings(deadline=None, max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    st.sampled_from(["step", "example"]),
    st.integers(0, 99),
)  # fmt: skip
def test_every_example_of_a_part_once_an_epoch(parts, by, seed):
    lengths, ratios, sizes = zip(*parts, strict=True)
    sizes = sizes[:1] * len(sizes) if by == "example" else sizes
    order = Order(lengths, ratios, sizes, by=by, seed=seed)
    seen = {n: [] for n in range(len(parts))}
    for step in range(30):
        picks = order.batch(step)
        assert len(picks) == order.size(step)
        if by == "step":
            assert len({pick.part for pick in picks}) == 1
        for pick in picks:
            assert pick.turn == len(seen[pick.part])
            seen[pick.part].append(order.index(pick))
    for part, indices in seen.items():
        for start in range(0, len(indices) - lengths[part] + 1, lengths[part]):
            epoch = indices[start : start + lengths[part]]
            assert sorted(epoch) == list(range(lengths[part]))


def test_equal_parts_have_orders_of_their_own():
    order = Order([50, 50], [1, 1], [1, 1], seed=3)
    first, second = ([order.index(Pick(part, n)) for n in range(50)] for part in (0, 1))
    assert first != second


# --- batches -----------------------------------------------------------------------------------


def test_a_batch_of_one_part_with_its_own_size(photos):
    batches, seen = mixture(photos), Counter()
    for _ in range(8):
        batch = next(batches)
        names = {answer[0] for answer in answers(batch)}
        assert len(names) == 1
        (name,) = names
        assert len(batch.tokens) == {"a": 4, "b": 2, "c": 6}[name]
        seen[name] += 1
    assert seen == {"a": 4, "b": 2, "c": 2}


def test_rows_of_all_parts_in_a_batch(photos):
    batches = mixture(photos, mix_by="example")
    seen = Counter(answer[0] for _ in range(8) for answer in answers(next(batches)))
    assert seen == {"a": 24, "b": 12, "c": 12}
    assert len({answer[0] for answer in answers(next(batches))}) > 1


def test_what_a_source_draws_is_new_each_epoch_and_the_same_each_time(photos):
    def drawn():
        part = MixtureComponent("a", Questions("a", photos[:1]))
        batches = make_loader([part], CONFIG, TOKENIZER, batch_size=1, threads=0)
        return [next(batches).tokens.tolist() for _ in range(12)]

    first = drawn()
    assert drawn() == first
    assert len({str(tokens) for tokens in first}) > 3


@pytest.mark.parametrize(("mix_by", "workers"), [("step", 0), ("step", 2), ("example", 0)])
def test_a_mixture_resumes_anywhere(photos, mix_by, workers):
    plain = mixture(photos, mix_by=mix_by)
    expected = [next(plain) for _ in range(9)]
    for stop in (3,) if workers else range(9):
        first = mixture(photos, mix_by=mix_by, workers=workers)
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state()))
        first.close()
        second = mixture(photos, mix_by=mix_by, workers=workers)
        second.restore(state)
        assert all(equal(next(second), batch) for batch in expected[stop:])
        second.close()


def test_hosts_share_the_same_batches(photos):
    whole = mixture(photos)
    hosts = [mixture(photos, share=partial(half, n)) for n in (0, 1)]
    hosts[0].restore(whole.state())
    for _ in range(6):
        batch, parts = next(whole), [next(host) for host in hosts]
        assert equal(batch, together(parts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix_by": "epoch"}, "mix_by 'epoch'"),
        ({"epochs": 1}, "a mixture has no end"),
        ({"max_broken": 2}, "max_broken 2"),
    ],
)
def test_refused(photos, changes, message):
    with pytest.raises(UserError, match=message):
        mixture(photos, **changes)


def test_a_state_of_another_mixture_is_refused(photos):
    state = mixture(photos).state()
    other = [MixtureComponent("a", Questions("a", photos), ratio=3, batch_size=4)]
    with pytest.raises(UserError, match="a ratio was 2 and is now 3"):
        make_loader(other, CONFIG, TOKENIZER, batch_size=6, seed=1).restore(state)


def test_tokens_decide_how_many_rows(photos):
    def size(tokens, **changes):
        part = MixtureComponent("a", Questions("a", photos), tokens=tokens)
        batches = make_loader(
            [part], CONFIG, TOKENIZER, batch_size=0, padding=Padding(8, 4), threads=0, **changes
        )
        batch = next(batches)
        assert batch.tokens.size <= tokens
        return len(batch.tokens)

    width = next(mixture(photos, mix_by="example")).tokens.shape[1]
    assert size(10 * width) == 10
    assert size(10 * width + 7, multiple=4) == 8
    with pytest.raises(UserError, match=r"more than its 8 tokens"):
        size(8)


# --- rows that cannot be read --------------------------------------------------------------------


def with_faults(photos, tmp_path, **changes):
    """Image 2 is no image, image 4 is missing, and the row of image 5 is torn."""
    web = tmp_path / "web.jpg"
    web.write_bytes(b"<html>")
    paths = [*photos]
    paths[2], paths[4] = str(web), str(tmp_path / "none.jpg")
    parts = [MixtureComponent("a", Questions("a", paths, bad=(5,)))]
    values = {"batch_size": 4, "threads": 0, "padding": Padding(8, 4), "max_broken": 0.5}
    return make_loader(parts, CONFIG, TOKENIZER, **{**values, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_rows_are_replaced_and_counted(photos, tmp_path, workers):
    batches = with_faults(photos, tmp_path, workers=workers)
    made = [next(batches) for _ in range(5)]
    batches.close()
    assert batches.tally.rows == 20
    causes = batches.tally.causes
    assert set(causes) == {"file that is no image", "image that is missing", "row that is torn"}
    assert min(causes.values()) >= 2  # each comes up twice in two epochs
    assert all(batch.pixels.any(axis=(1, 2, 3, 4)).all() for batch in made)
    told = [answer for batch in made for answer in answers(batch)]
    assert not {"a2", "a4", "a5"} & set(told)
    assert len(told) == 20
    again = with_faults(photos, tmp_path)
    assert all(equal(next(again), batch) for batch in made)
    assert again.tally.state() == batches.tally.state()
    third = with_faults(photos, tmp_path)
    third.restore(json.loads(json.dumps(again.state())))
    assert third.tally.causes == causes
    assert "rows left out (" in str(again.tally)


def test_hosts_agree_on_the_shape_of_a_batch_with_broken_rows(photos, tmp_path):
    whole = with_faults(photos, tmp_path)
    hosts = [with_faults(photos, tmp_path, share=partial(half, n)) for n in (0, 1)]
    for _ in range(5):
        batch, parts = next(whole), [next(host) for host in hosts]
        assert equal(batch, together(parts))
    assert sum((host.tally.causes for host in hosts), Counter()) == whole.tally.causes


def test_the_first_is_an_error_where_none_may_be_broken(photos, tmp_path):
    batches = with_faults(photos, tmp_path, max_broken=0, batch_size=10)
    with pytest.raises(UserError, match=r"a: (image|a \d)"):
        next(batches)
    batches.close()


def test_too_many_broken_rows_end_the_run(photos, tmp_path):
    batches = with_faults(photos, tmp_path, max_broken=0.01)
    with pytest.raises(UserError, match=r"max_broken = 0\.01 .*; data: \d of \d+ rows left out"):
        for _ in range(50):
            next(batches)


def test_a_few_broken_rows_at_the_start_do_not_end_a_run_over_many():
    tally, fault = SkipCounter(0.01, examples=50_000), Broken("a", "torn", "a 5: torn")
    tally.add(4, [fault] * 4)
    tally.add(4, [fault] * 4)
    with pytest.raises(UserError, match="11 of 12 rows left out"):
        tally.add(4, [fault] * 3)


def test_nothing_can_be_read(photos):
    part = MixtureComponent("a", Questions("a", photos, bad=range(10)))
    batches = make_loader([part], CONFIG, TOKENIZER, batch_size=2, threads=0, max_broken=1)
    with pytest.raises(UserError, match="a torn row: nor can"):
        next(batches)


def test_images_that_are_all_broken_leave_a_row_without_labels(tmp_path):
    examples = [Example((str(tmp_path / "none.png"),), (), ("a",))] * 3
    batches = make_loader(examples, CONFIG, TOKENIZER, batch_size=2, threads=0, max_broken=1)
    batch = next(batches)
    assert (batch.label_positions == -1).all()
    assert not batch.pixels.any()
    assert batches.tally.skipped == 16
