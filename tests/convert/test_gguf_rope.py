"""Rotary scalings of GGUF files: the logits of transformers for the same directory, or one line."""

import copy
import warnings
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gguf_files import write_gguf
from helpers.llm_weights import with_weights
from helpers.released_files import llm_config, llm_state

from convert.formats.gguf import Gguf
from convert.formats.tensors import DTYPES, Tensor
from convert.llm_config import llm_config as our_config
from convert.llm_keys import llm_table
from minigpt4_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VALUES = llm_config(
    vocab_size=100, hidden_size=64, num_attention_heads=1, num_key_value_heads=1, head_dim=64,
    rope_theta=500000.0, max_position_embeddings=32768, num_hidden_layers=1,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 100, (1, 24))
POSITIONS = np.arange(24)[None] * 301  # far apart, so that the slow frequencies turn too
LINEAR = {"rope_type": "linear", "factor": 4.0}


def llama3(factor, original, low=1.0, high=4.0):
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }  # fmt: skip


def divisors(rope):
    """rope_freqs.weight as llama.cpp's conversion script writes it for Llama 3.1."""
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 64, 2) / 64)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    ratio = rope["original_max_position_embeddings"] / wavelengths
    smooth = (ratio - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    found = np.where(ratio > high, 1.0, np.where(ratio < low, rope["factor"], between))
    return found.astype(np.float32)


# metadata under llama.rope, and rope_scaling of the same model's config.json
SCALINGS = {
    "no scaling": ({}, None),
    "none, whatever the factor": ({"scaling.type": "none", "scaling.factor": 4.0}, None),
    "linear": ({"scaling.type": "linear", "scaling.factor": 4.0}, LINEAR),
    "a factor alone is linear, as in llama.cpp": ({"scaling.factor": 4.0}, LINEAR),
    "a factor of 2023": ({"scale_linear": 4.0}, LINEAR),
    "another theta": ({"freq_base": 1000.0}, {"rope_theta": 1000.0}),
    "Llama 3.1": ({}, llama3(8.0, 8192)),
    "Llama 3.2": ({}, llama3(32.0, 8192)),
    "Llama 3 of a shorter context": ({}, llama3(16.0, 4096)),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    state = llm_state(VALUES, np.float32)
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    return Gguf(write_gguf(path, VALUES, state)), state


def with_rope(source, metadata, freqs=None):
    """The same file with other metadata, and rope_freqs.weight if they are given."""
    source = copy.copy(source)
    source._values = dict(source._values)
    for name, value in metadata.items():
        field = SimpleNamespace(contents=lambda value=value: value)
        source._values[f"llama.rope.{name}"] = field
    if freqs is not None:
        tensor = Tensor(freqs.shape, DTYPES["float32"], freqs.nbytes, lambda: freqs, None)
        source.tensors = source.tensors | {"rope_freqs.weight": tensor}
        source.reader = SimpleNamespace(read=lambda name: source.tensors[name].load())
    return source


def their_logits(state, rope):
    values = VALUES | (
        {} if rope is None else rope if "rope_type" not in rope else {"rope_scaling": rope}
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**copy.deepcopy(values)))
    tensors = {k: torch.tensor(v) for k, v in state.items() if "inv_freq" not in k}
    model.load_state_dict(tensors)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.eval()(torch.tensor(IDS), position_ids=torch.tensor(POSITIONS))
    return found.logits.numpy()


@pytest.mark.parametrize("name", SCALINGS)
def test_logits_are_those_of_transformers(file, name):
    source, state = file
    metadata, rope = SCALINGS[name]
    is_llama3 = rope is not None and rope.get("rope_type") == "llama3"
    changed = with_rope(source, metadata, divisors(rope) if is_llama3 else None)
    config = our_config(changed.hf_config(), "a.gguf", [])
    plain = {k: v for k, v in state.items() if "inv_freq" not in k}
    model = with_weights(config, plain, llm_table("llama"))
    embeds = model.embed_tokens(jnp.asarray(IDS))
    hidden = model(embeds, jnp.array([IDS.shape[1]]), positions=jnp.asarray(POSITIONS))
    theirs = their_logits(state, rope)
    np.testing.assert_allclose(np.asarray(model.logits(hidden)), theirs, rtol=2e-3, atol=2e-3)
    if name != "no scaling" and rope is not None:  # the comparison would show another scaling
        assert np.abs(their_logits(state, None) - theirs).max() > 0.02


@pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic", "su", "", 3])
def test_other_scalings_are_named_with_their_field(file, kind):
    metadata = {"scaling.type": kind, "scaling.factor": 4.0}
    with pytest.raises(UserError, match=r"a\.gguf: llama\.rope\.scaling\.type is ") as error:
        with_rope(file[0], metadata).hf_config()
    assert repr(kind) in str(error.value) and "\n" not in str(error.value)


def test_a_scaling_that_llama_3_does_not_have_is_named(file):
    freqs = divisors(llama3(8.0, 8192, low=2.0, high=5.0))
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's"):
        with_rope(file[0], {}, freqs).hf_config()
