"""The few array sizes of a server's running batch, so that all its programs can be compiled at the start."""

from collections.abc import Sequence

from minigpt4_jax.inference.requests import NUM_STOPS, STOP_WIDTH, BucketSizes, Request
from minigpt4_jax.inference.sampling import CANDIDATES, SamplingStages, branches, required_stages
from minigpt4_jax.utils.rounding import next_power_of_two

ROWS = (1, 8, 32, 128, 512)
SMALLEST_CACHE = 128  # tokens
FINE_ROWS = 32  # from here on, unused slots take a noticeable part of a decoding step
# Prompt tokens processed at a time. 48 and 96: 32 visual tokens and a question, short or long.
PROMPTS = (32, 48, 64, 96, 128, 256, 512, 1024, 2048)
PIECES = (32, 64)  # as many after a cached beginning, besides the longest piece


class BatchShapes:
    """The sizes that a RunningBatch rounds up to, instead of the finer ones of `bucket_sizes`.

    Attributes:
        rows: numbers of rows, ascending.
        cache_lengths: S of a few rows, ascending: 128, 256, 512, ...
        fine_cache_lengths: S of FINE_ROWS and more: 128, 192, 256, 384, ...
        prompts: tokens of a prompt, or of a piece of it, ascending; the last is the longest piece. For a
            model that does not read in pieces the last holds the longest prompt.
        pieces: sizes of what follows a cached beginning of a prompt; none for such a model.
        stages: sampling stages, cheapest first: greedy; all options with a top_k of at most CANDIDATES;
            all options with the whole vocabulary. Where programs skip what no row needs, without the first.
    """

    def __init__(
        self,
        vocab: int,
        *,
        max_rows: int,
        context: int,
        max_new_tokens: int,
        prefill_tokens: int,
        reads_in_pieces: bool = True,
    ):
        """context: of a prompt and its answer together; prefill_tokens: of a piece of a prompt;
        reads_in_pieces: see ModelConfig."""
        self._vocab, self._max_new_tokens = vocab, next_power_of_two(max_new_tokens)
        self.rows = _steps(ROWS, max_rows)
        self.prompts = [n for n in PROMPTS if n <= prefill_tokens] or [PROMPTS[0]]
        longest = max(-(-context // 64) * 64, SMALLEST_CACHE, self.prompts[-1])
        coarse = [SMALLEST_CACHE << n for n in range(16)]
        self.cache_lengths = _steps(coarse, longest)
        self.fine_cache_lengths = _steps(
            [n * step // 2 for n in coarse for step in (2, 3)], longest
        )
        longest_piece = self.prompts[-1]
        self.pieces = sorted({*(n for n in PIECES if n < longest_piece), longest_piece})
        if not reads_in_pieces:
            self.prompts, self.pieces = _steps(PROMPTS, longest), []
        greedy = SamplingStages(False, 0, False)
        filtered = SamplingStages(True, CANDIDATES, True)
        everything = SamplingStages(True, 0, True)
        self.stages = [] if branches() else [greedy]
        self.stages += [*([filtered] if vocab > CANDIDATES else []), everything]

    def num_rows(self, count: int) -> int:
        """Rows of the arrays for some requests."""
        return _fit(self.rows, count)

    def sizes(self, requests: Sequence[Request], rows: int = 1) -> BucketSizes:
        """The other sizes of arrays of `rows` rows."""
        tokens = max(len(request.tokens) + request.max_new_tokens for request in requests)
        return self.with_cache(tokens, rows)

    def with_cache(self, tokens: int, rows: int = 1) -> BucketSizes:
        """The sizes with a cache of at least some tokens."""
        length = _fit(self.cache_lengths_of(rows), tokens)
        return BucketSizes(length, self._max_new_tokens, NUM_STOPS, STOP_WIDTH)

    def cache_lengths_of(self, rows: int) -> list[int]:
        """S of arrays of `rows` rows, ascending."""
        return self.cache_lengths if rows < FINE_ROWS else self.fine_cache_lengths

    def prompt(self, tokens: int, *, resumed: bool) -> int:
        """The size of a prompt, or of what follows its cached beginning."""
        return _fit(self.pieces if resumed else self.prompts, tokens)

    def choose_stages(self, requests: Sequence[Request]) -> SamplingStages:
        """The cheapest stages that serve these requests."""
        needed = required_stages([request.sampling for request in requests], self._vocab)
        return next(stages for stages in self.stages if _covers(stages, needed))


def _steps(steps: Sequence[int], largest: int) -> list[int]:
    """The steps below the largest size, and that."""
    return [step for step in steps if step < largest] + [largest]


def _fit(sizes: Sequence[int], n: int) -> int:
    """The smallest of ascending sizes that is at least n."""
    return next(size for size in sizes if size >= n)


def _covers(stages: SamplingStages, needed: SamplingStages) -> bool:
    if not needed.random:
        enough_candidates = True
    else:
        unlimited = 1 << 31
        enough = stages.num_candidates or unlimited
        enough_candidates = stages.random and enough >= (needed.num_candidates or unlimited)
    return enough_candidates and stages.penalties >= needed.penalties
