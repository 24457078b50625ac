"""How large the arrays of a running batch are for some requests."""

from collections.abc import Sequence

from minigpt4_jax.inference.batch_shapes import BatchShapes
from minigpt4_jax.inference.decode_state import DecodeState
from minigpt4_jax.inference.requests import BucketSizes, Request
from minigpt4_jax.inference.runner import ModelRunner
from minigpt4_jax.inference.sampling import SamplingStages
from minigpt4_jax.utils.rounding import next_power_of_two

SMALLEST_SIZES = BucketSizes(1, 1, 1, 1)


class BatchSizing:
    """Numbers of rows, bucket sizes and sampling stages: of the fixed shapes of a server, or else powers of
    two and the buckets of the requests."""

    def __init__(
        self,
        runner: ModelRunner,
        *,
        min_rows: int = 1,
        min_sizes: BucketSizes = SMALLEST_SIZES,
        max_cache_tokens: int | None = None,
        stages: SamplingStages | None = None,
        shapes: BatchShapes | None = None,
    ):
        """The arguments are those of RunningBatch."""
        self.shapes, self.max_cache_tokens = shapes, max_cache_tokens
        self._runner, self._min_rows, self._min_sizes = runner, min_rows, min_sizes
        self._fixed_stages = stages

    def num_rows(self, count: int) -> int:
        """Rows of the arrays for `count` requests."""
        if self.shapes is not None:
            return self.shapes.num_rows(count)
        return next_power_of_two(max(count, self._min_rows))

    def sizes(self, requests: Sequence[Request], rows: int = 1) -> BucketSizes:
        """The other sizes of arrays of `rows` rows."""
        if self.shapes is not None:
            return self.shapes.sizes(requests, rows)
        sizes = self._runner.bucket_sizes(requests, self.num_rows(1))
        return BucketSizes(*map(max, sizes, self._min_sizes))

    def cache_length(self, tokens: int) -> int:
        """Cache slots that one row with this many tokens takes."""
        if self.shapes is not None:
            return self.shapes.with_cache(tokens).cache_length
        return self._runner.cache_length(tokens, 1)

    def needed(self, requests: Sequence[Request]) -> tuple[int, BucketSizes]:
        """Rows and the other sizes of the smallest arrays for these requests together."""
        rows = self.num_rows(len(requests))
        return rows, self.sizes(requests, rows)

    def exceeds_cache(self, requests: Sequence[Request]) -> bool:
        """Whether these requests together need more than max_cache_tokens."""
        rows, sizes = self.needed(requests)
        return (
            self.max_cache_tokens is not None and rows * sizes.cache_length > self.max_cache_tokens
        )

    def fits(self, request: Request, state: DecodeState) -> bool:
        """Whether a row of the state is large enough for a request."""
        needed = self.sizes([request], state.ids.shape[0])
        return all(n <= m for n, m in zip(needed, sizes_of(state), strict=True))

    def stages(self, requests: Sequence[Request]) -> SamplingStages:
        """The sampling stages that serve these requests."""
        if self.shapes is not None:
            return self.shapes.choose_stages(requests)
        return self._fixed_stages or self._runner.stages(requests)


def sizes_of(state: DecodeState) -> BucketSizes:
    """The sizes that a state was made with."""
    num_stops, stop_width = state.stop_sequences.shape[1:]
    return BucketSizes(state.cache.length, state.ids.shape[1], num_stops, stop_width)
