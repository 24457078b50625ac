"""Packed rows hold every example of the padded batch once, in one piece, in its own segment."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import IMAGE
from minigpt4_jax.data.arrays import BatchArrays, BatchLayout, PackedArrays, Padding
from minigpt4_jax.data.packing import first_fit, pack

P, PAD = 2, 999
PADDING = Padding(4, 2)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), width=st.integers(1, 40))
def test_first_fit_assigns_every_example_and_opens_no_needless_row(lengths, width):
    rows = first_fit(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(n <= width or len(row) == 1 for n, row in zip(sums, rows, strict=True))
    shortest = [min(lengths[i] for i in row) for row in rows]
    for earlier in range(len(rows)):
        for later in range(earlier + 1, len(rows)):
            assert sums[earlier] + shortest[later] > width


def padded(seed, examples, images):
    """A batch of random rows: 0 to `images` images of P tokens, then question and answer."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(examples):
        num_images, question = rng.integers(0, images + 1), rng.integers(1, 6)
        answer = rng.integers(0, 5)
        slots = int(num_images) * P
        slots -= int(rng.integers(0, 2) and num_images > 0)  # a truncated prompt
        tokens = [IMAGE] * slots + rng.integers(3, 90, question + answer).tolist()
        rows.append((tokens, slots + question))
    width = max(len(tokens) for tokens, _ in rows) + 3
    tokens = np.full((examples, width), PAD, np.int32)
    labels = np.full((examples, 6), -1, np.int32)
    for n, (row, first) in enumerate(rows):
        tokens[n, : len(row)] = row
        labels[n, : len(row) - first] = np.arange(first, len(row))
    lengths = np.array([len(row) for row, _ in rows], np.int32)
    pixels = rng.normal(size=(examples, images, 1, 1, 3)).astype(np.float32)
    return BatchArrays(pixels, tokens, lengths, labels)


def segment_of(packed, row, segment, first):
    """-> (tokens, positions of labels, indices of visual tokens) of a segment."""
    span = np.flatnonzero(packed.segments[row] == segment)
    assert np.array_equal(span, np.arange(span[0], span[0] + len(span)))  # in one piece
    assert packed.positions[row, span].tolist() == list(range(len(span)))
    tokens = packed.tokens[row, span]
    labels = [a - span[0] for a in packed.label_positions[row] if a in span and a >= 0]
    visual = packed.visual_index[row, span][tokens == IMAGE]
    return tuple(tokens.tolist()), tuple(labels), tuple(first * P + visual)


@settings(deadline=None)
@given(
    seed=st.integers(0, 1000), examples=st.sampled_from([1, 2, 6, 12]), images=st.integers(0, 2),
    width=st.integers(1, 60), micro=st.sampled_from([1, 2]), multiple=st.integers(1, 3),
    blocks=st.sampled_from([1, 2]),
)  # fmt: skip
def test_every_example_keeps_its_labels_and_visual_tokens(
    seed, examples, images, width, micro, multiple, blocks
):
    batch = padded(seed, examples, images)
    micro = micro if examples % micro == 0 else 1
    blocks = blocks if examples // micro % blocks == 0 else 1
    packed = pack(
        batch, width, P, PAD, micro_batches=micro, rows_multiple=multiple, padding=PADDING,
        blocks=blocks,
    )  # fmt: skip
    if images:
        assert packed.pixels.shape == (examples * images, 1, 1, 1, 3)
        np.testing.assert_array_equal(packed.pixels[:, 0], batch.pixels.reshape(-1, 1, 1, 3))
    else:
        assert packed.pixels.shape == (micro * blocks, 0, 1, 1, 3)
    rows, share = len(packed.tokens) // micro, examples // micro
    assert rows % (multiple * blocks) == 0 and rows * micro == len(packed.tokens)
    for m in range(micro):
        packed_examples = []
        for row in range(m * rows, (m + 1) * rows):
            count = packed.segments[row].max()  # the last segment is padding, if there is any
            used = packed.lengths[row]
            assert (packed.tokens[row, used:] == PAD).all()
            full = used == packed.tokens.shape[1]
            for segment in range(count + full):
                packed_examples.append(segment_of(packed, row, segment, m * share * images))
        expected = []
        for i in range(m * share, (m + 1) * share):
            tokens = batch.tokens[i, : batch.lengths[i]]
            labels = tuple(a for a in batch.label_positions[i].tolist() if a >= 0)
            first = i * images * P
            slots = tuple(range(first, first + int((tokens == IMAGE).sum())))
            expected.append((tuple(tokens.tolist()), labels, slots))
        assert sorted(packed_examples) == sorted(expected)
    labels = (packed.label_positions >= 0).sum()
    assert labels == (batch.label_positions >= 0).sum()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 99), micro=st.sampled_from([1, 2]), processes=st.sampled_from([2, 4]))
def test_processes_pack_the_parts_of_one_batch(seed, micro, processes):
    """Each packs its own examples; some may be shorter than the layout says."""
    batch = padded(seed, 8, 2)
    lengths = tuple(int(n) for n in batch.lengths)
    labels = tuple(int((a >= 0).sum()) for a in batch.label_positions)
    batch.label_positions[1] = -1  # its image could not be opened
    options = {"micro_batches": micro, "rows_multiple": 2, "padding": PADDING, "blocks": processes}
    complete = pack(
        batch, 24, P, PAD, layout=BatchLayout(lengths, labels, tuple(range(8))), **options
    )
    each = 8 // processes
    parts = []
    for n in range(processes):
        rows = tuple(range(n * each, (n + 1) * each))
        own = BatchArrays(*(a[list(rows)] for a in batch[:4]))
        parts.append(pack(own, 24, P, PAD, layout=BatchLayout(lengths, labels, rows), **options))
    for field in PackedArrays._fields:
        together = np.concatenate([getattr(part, field) for part in parts])
        np.testing.assert_array_equal(together, getattr(complete, field), err_msg=field)
