"""Our language model with the weights of one of transformers."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert.key_mapping import map_keys
from minigpt4_jax.models.llm import Llm


def with_weights(c, tensors, table):
    """Our model of a configuration, with tensors of transformers by the table that conversion uses."""
    found, unknown = map_keys(table, tensors)
    assert not unknown
    ours = nnx.eval_shape(lambda: Llm(c, None, nnx.Rngs(0)))  # drawing large weights takes long
    for path, leaf in nnx.to_flat_state(nnx.state(ours)):
        name = ".".join(map(str, path[1:]))
        if path[0] in ("blocks", "encoder_blocks"):
            layers = c.layers if path[0] == "blocks" else c.encoder_layers
            keys = [found.pop(f"llm.{path[0]}.{i}.{name}").key for i in range(layers)]
            first = tensors[keys[0]]
            value = first[None] if layers == 1 else np.stack([tensors[k] for k in keys])
        else:
            value = tensors[found.pop(".".join(["llm", *map(str, path)])).key]
        assert value.shape == leaf.get_value().shape, path
        leaf.set_value(jnp.asarray(value))
    assert not found
    return ours
