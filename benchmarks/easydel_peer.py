"""EasyDeL's LLaMA of the same size, for decode.py: run by a Python that has `easydel pillow torch`.

Reads "ROWS TOKENS" from each line of standard input, generates that many tokens for so many prompts
by greedy choice, and prints the seconds. Its weights are random: the work does not depend on them.
"""

import json
import sys
import time

import easydel
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import GenerationConfig


def main() -> None:
    sizes, prompt = json.loads(sys.argv[1]), int(sys.argv[2])
    config = easydel.LlamaConfig(**sizes)
    model = easydel.LlamaForCausalLM(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(0)
    print("ready", flush=True)
    for line in sys.stdin:
        rows, tokens = map(int, line.split())
        ids = jnp.asarray(rng.integers(5, config.vocab_size, (rows, prompt)), jnp.int32)
        wanted = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        with model.mesh:
            begin = time.perf_counter()
            found = model.generate(ids, attention_mask=jnp.ones_like(ids), generation_config=wanted)
            jax.block_until_ready(found.sequences)
            print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
