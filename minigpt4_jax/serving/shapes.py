"""The few array sizes that the scheduler uses, so that all programs can be compiled at the start."""

from collections.abc import Sequence

from minigpt4_jax.inference.requests import BucketSizes, Request
from minigpt4_jax.inference.sampling import SamplingStages, required_stages
from minigpt4_jax.utils.rounding import next_power_of_two

NUM_STOPS, STOP_WIDTH = 32, 16  # stop sequences of a row, tokens of each
SMALLEST_CACHE = 128  # tokens
PROMPT_CHUNKS = (64, 128, 256, 512, 1024, 2048)  # tokens of a prompt processed at a time
CANDIDATES = 64  # most likely tokens that the cheaper random choice considers


class Shapes:
    """The sizes for one server."""

    def __init__(self, context: int, max_rows: int, max_new_tokens: int, prefill_chunk: int):
        """context: tokens of prompt and answer together; max_rows: answers decoded together;
        prefill_chunk: one of PROMPT_CHUNKS, the longest that is used."""
        self.context, self.max_rows, self.prefill_chunk = context, max_rows, prefill_chunk
        self.max_new_tokens = next_power_of_two(max_new_tokens)
        self.rows = _ladder([1, 8, 32, 128, 512], max_rows)
        self.prompt_chunks = [size for size in PROMPT_CHUNKS if size <= prefill_chunk]
        largest = max(-(-context // 64) * 64, SMALLEST_CACHE, prefill_chunk)
        self.cache_lengths = _ladder([SMALLEST_CACHE << n for n in range(16)], largest)

    @property
    def suffix_chunks(self) -> list[int]:
        """Sizes of a chunk that follows cached tokens."""
        return sorted({self.prompt_chunks[0], self.prefill_chunk})

    def bucket_sizes(self, cache_length: int) -> BucketSizes:
        """The engine's sizes with this cache length."""
        return BucketSizes(cache_length, self.max_new_tokens, NUM_STOPS, STOP_WIDTH)


def _ladder(steps: Sequence[int], largest: int) -> list[int]:
    """The steps below the largest size, and that."""
    return [step for step in steps if step < largest] + [largest]


def fit(sizes: Sequence[int], n: int) -> int:
    """The smallest of ascending sizes that is at least n."""
    return next(size for size in sizes if size >= n)


def stage_sets(vocab: int) -> list[SamplingStages]:
    """The sampling programs, cheapest first: greedy; all options, with a top_k of at most CANDIDATES;
    all options, with the whole vocabulary."""
    greedy = SamplingStages(False, 0, False, False)
    filtered = SamplingStages(True, CANDIDATES, True, True)
    everything = SamplingStages(True, 0, True, True)
    return [greedy, filtered, everything] if vocab > CANDIDATES else [greedy, everything]


def choose_stages(requests: Sequence[Request], vocab: int) -> SamplingStages:
    """The cheapest set that serves these requests."""
    needed = required_stages([request.sampling for request in requests], vocab)
    return next(stages for stages in stage_sets(vocab) if _covers(stages, needed))


def _covers(stages: SamplingStages, needed: SamplingStages) -> bool:
    candidates = needed.num_candidates or (1 << 31 if needed.random else 0)
    return (
        stages.random >= needed.random
        and (stages.num_candidates or 1 << 31) >= candidates
        and stages.repetition_penalty >= needed.repetition_penalty
        and stages.min_new_tokens >= needed.min_new_tokens
    )


def shorten_stop_sequences(request: Request) -> list[Sequence[int]]:
    """The stop sequences that fit the arrays; the request's `stop_check` finds the others."""
    fitting = [ids for ids in request.stop_sequences if len(ids) <= STOP_WIDTH]
    return fitting[:NUM_STOPS]
