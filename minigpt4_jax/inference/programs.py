"""What the engine compiles: prefill, resume from a cache, decode, beam search.

Every function takes the model first; `Engine` binds it. Shapes: see BatchInputs and DecodeState.
"""

import jax
import jax.numpy as jnp

from minigpt4_jax.inference import beam_search
from minigpt4_jax.inference.beam_search import Hypotheses, SearchInputs
from minigpt4_jax.inference.decode_state import BatchInputs, DecodeState, advance, constrain_state
from minigpt4_jax.inference.sampling import SamplingStages
from minigpt4_jax.models.kv_cache import KVCache
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import constrain


def prefill(
    model: MiniGpt,
    inputs: BatchInputs,
    cache_length: int,
    max_new_tokens: int,
    stages: SamplingStages,
) -> DecodeState:
    """Process the prompts and choose each row's first token. max_new_tokens: N of the bucket."""
    read = model.prefill(inputs.tokens, inputs.visual, inputs.lengths, cache_length, pad_cross=True)
    return _first_tokens(model, read.last, read.cache, inputs, read.lengths, max_new_tokens, stages)


def resume(
    model: MiniGpt,
    cache: KVCache,
    inputs: BatchInputs,
    prefix_length: jax.Array,
    max_new_tokens: int,
    stages: SamplingStages,
) -> DecodeState:
    """As `prefill`; inputs: what follows the first `prefix_length` positions, which are cached."""
    embeds = model.merge(inputs.tokens, inputs.visual)
    positions = prefix_length + jnp.arange(embeds.shape[1])
    positions = jnp.broadcast_to(positions, inputs.tokens.shape)
    hidden, cache = model.llm.decode(embeds, positions, cache)
    last = jnp.take_along_axis(hidden, inputs.lengths[:, None, None] - 1, axis=1)[:, 0]
    lengths = prefix_length + inputs.lengths
    return _first_tokens(model, last, cache, inputs, lengths, max_new_tokens, stages)


def _first_tokens(
    model: MiniGpt,
    last: jax.Array,  # [B, D]: hidden state of each row's last token
    cache: KVCache,
    inputs: BatchInputs,
    lengths: jax.Array,  # [B]: of the whole prompts, with a cached prefix
    max_new_tokens: int,
    stages: SamplingStages,
) -> DecodeState:
    b = inputs.lengths.shape[0]
    state = DecodeState(
        cache,
        token=jnp.zeros(b, jnp.int32),
        position=lengths - 1,
        ids=jnp.full((b, max_new_tokens), -1, jnp.int32),
        logprobs=jnp.zeros((b, max_new_tokens), jnp.float32),
        num_generated=jnp.zeros(b, jnp.int32),
        done=inputs.max_new_tokens <= 0,
        hit_stop=jnp.zeros(b, bool),
        nonfinite=jnp.zeros(b, bool),
        max_new_tokens=inputs.max_new_tokens,
        stop_sequences=inputs.stop_sequences,
        keys=inputs.keys,
        sampling=inputs.sampling,
    )
    return constrain_state(advance(state, model.decoder.logits(last), stages))


def decode(
    model: MiniGpt,
    state: DecodeState,
    steps: jax.Array,
    max_ended: jax.Array,
    stages: SamplingStages,
) -> DecodeState:
    """Up to `steps` more tokens for every row, until `max_ended` more rows, or all, are done."""
    decoder = model.decoder
    b, num_done = state.done.shape[0], jnp.sum(state.done)
    enough_done = num_done + jnp.minimum(max_ended, b - num_done)

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        i, s = carry
        embeds = decoder.embed_tokens(s.token[:, None])
        hidden, cache = decoder.decode(embeds, s.position[:, None], s.cache)
        return i + 1, advance(s._replace(cache=cache), decoder.logits(hidden[:, 0]), stages)

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        return (carry[0] < steps) & (jnp.sum(carry[1].done) < enough_done)

    _, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))
    return constrain_state(state)


def search(
    model: MiniGpt,
    tokens: jax.Array,
    visual: jax.Array,
    inputs: SearchInputs,
    num_beams: int,
    max_new_tokens: int,
    stages: SamplingStages,
) -> tuple[Hypotheses, jax.Array]:
    """Beam search, its result replicated."""
    result = beam_search.search(model, tokens, visual, inputs, num_beams, max_new_tokens, stages)
    replicated: tuple[Hypotheses, jax.Array] = jax.tree.map(constrain, result)
    return replicated
