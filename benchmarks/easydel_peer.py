"""EasyDeL's LLaMA of the same size, for `decode.py --easydel=PYTHON`; not run by hand.

Runs in a Python with `easydel pillow torch`. Reads "ROWS TOKENS" from each line of standard input, generates
that many tokens for that many prompts greedily, and prints the seconds. Weights are random: the work does not
depend on them.
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
    sizes, prompt_length = json.loads(sys.argv[1]), int(sys.argv[2])
    config = easydel.LlamaConfig(**sizes)
    model = easydel.LlamaForCausalLM(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(0)
    print("ready", flush=True)
    for line in sys.stdin:
        rows, new_tokens = map(int, line.split())
        ids = jnp.asarray(rng.integers(5, config.vocab_size, (rows, prompt_length)), jnp.int32)
        generation = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        with model.mesh:
            start = time.perf_counter()
            output = model.generate(
                ids, attention_mask=jnp.ones_like(ids), generation_config=generation
            )
            jax.block_until_ready(output.sequences)
            print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
