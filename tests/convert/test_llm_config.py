"""No field of config.json or GGUF metadata is lost: the logits of transformers, or one line that names it."""

import re
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gguf_files import gguf, write_gguf
from helpers.released_files import llm_config as hf_values
from helpers.released_files import llm_state, save_hf

from convert.build import build
from convert.build_plan import BuildRequest, make_plan
from convert.formats.gguf import Gguf
from convert.llm_config import llm_config
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.errors import UserError

torch = pytest.importorskip("torch")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BASE = {
    "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "rope_theta": 5000.0, "max_position_embeddings": 64, "hidden_act": "silu",
    "sliding_window": None,
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 700, (1, 24))
# field -> other values that it may have
CHANGES = {
    "rope_theta": [700.0],
    "rope_scaling": [
        {"type": "linear", "factor": 3.0}, {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope"}, {"type": "linear"}, {"rope_type": "linear", "factor": "big"},
        {"rope_type": "llama3", "factor": 4.0}, {}, {"type": None},
    ],
    "rope_parameters": [
        {"rope_type": "default", "rope_theta": 300.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
        {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ],
    "partial_rotary_factor": [0.5],
    "sliding_window": [5, 4096, None],
    "use_sliding_window": [True],
    "max_window_layers": [0, 1],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2],
    "attention_bias": [True],
    "mlp_bias": [True],
    "head_dim": [8, None],
    "num_key_value_heads": [4, None, 3],
    "rms_norm_eps": [0.1],
    "hidden_act": ["gelu", "swish"],
    "tie_word_embeddings": [True],
    "max_position_embeddings": [128],
    "attention_dropout": [0.5],
    "pretraining_tp": [2],
    "logit_scale": [2.0], "logits_scaling": [2.0], "final_logit_softcapping": [1.0],
    "residual_multiplier": [3.0], "attn_logit_softcapping": [1.0], "query_pre_attn_scalar": [8],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "use_cache": [False],
}  # fmt: skip


TENSOR = re.compile(r"(model\.layers\.\d+|lm_head)\.\S+")  # one that the configuration does not fit


def values_of(model_type, **changes):
    values = hf_values(**BASE, model_type=model_type, vocab_size=785)
    return {k: v for k, v in (values | changes).items() if v is not REMOVED}


REMOVED = object()


def state_of(model_type):
    values = values_of(model_type)
    state = llm_state(values, np.float32)
    rng = np.random.default_rng(1)
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        if model_type == "qwen2":
            for name, size in (("q", 16), ("k", 8), ("v", 8)):
                state[f"{attention}.{name}_proj.bias"] = rng.normal(0, 1, size).astype(np.float32)
        if model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                state[f"{attention}.{name}.weight"] = np.ones(4, np.float32)
    return state


def their_logits(folder):
    """transformers' logits; None if it does not load this model, or needs weights that are missing."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if info["missing_keys"]:
            return None
        with torch.no_grad():
            return model.eval()(torch.tensor(IDS)).logits.numpy()
    except Exception:  # of several types
        return None


@pytest.fixture(scope="module")
def our_logits(tmp_path_factory):
    """Folder of a language model -> (our logits, notes of the conversion). Equal configurations are
    computed once: all folders of a family have the same weights."""
    known = {}

    def logits(llm):
        folder = tmp_path_factory.mktemp("model")
        request = BuildRequest("minigpt4-vicuna", llm, folder / "m")
        plan = make_plan(request)
        if plan.config.llm not in known:
            build(request)
            module, _ = load_model(folder / "m")
            length = jnp.array([IDS.shape[1]])
            hidden = module.llm(module.llm.embed_tokens(jnp.asarray(IDS)), length)
            known[plan.config.llm] = np.asarray(module.llm.logits(hidden))
        return known[plan.config.llm], plan.notes

    return logits


def cases():
    for field, options in CHANGES.items():
        yield from ((field, value) for value in options)
    for field in BASE | {"rms_norm_eps": 0, "tie_word_embeddings": 0}:
        if field not in ("hidden_size", "num_attention_heads"):
            yield field, REMOVED
    yield "a_field_that_nobody_knows", 3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_is_used_or_refused(our_logits, model_type, tmp_path):
    state = state_of(model_type)
    compared = refused = 0
    for number, (field, value) in enumerate(cases()):
        changes = {field: value}
        if model_type == "mistral" and field == "layer_types":
            changes["sliding_window"] = 5  # transformers reads it as Ministral, which needs one
        folder = save_hf(tmp_path / f"{number}", values_of(model_type, **changes), state)
        try:
            ours, notes = our_logits(folder)
        except UserError as e:
            line = str(e)
            names = [
                field,
                field.removesuffix("_scaling"),
                *(value if isinstance(value, dict) else ()),
            ]
            names += ["kv_heads"] if field == "num_key_value_heads" else []
            assert any(name in line for name in names) or TENSOR.search(line), (field, value, line)
            assert "\n" not in line
            refused += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = their_logits(folder)
        assert theirs is not None, (field, value)
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3, err_msg=f"{field} {value}")
        if "nobody" in field:
            assert any(field in note for note in notes)
        compared += 1
    assert compared > 25 and refused > 5, (compared, refused)


GGUF_CHANGES = {
    "llama.rope.scale_linear": 4.0, "llama.rope.scaling.type": "yarn",
    "llama.attention.causal": False, "llama.attention.clamp_kqv": 8.0,
    "llama.attention.max_alibi_bias": 8.0, "llama.use_parallel_residual": True,
    "llama.logit_scale": 0.5, "llama.residual_scale": 0.5, "llama.embedding_scale": 12.0,
    "llama.attention.scale": 0.1, "llama.expert_count": 8, "llama.rope.dimension_count": 2,
    "llama.attention.value_length": 8, "llama.final_logit_softcapping": 30.0,
    "llama.attention.layer_norm_epsilon": 1e-5, "llama.attention.sliding_window": 8,
    "llama.something.new": 3, "llama.rope.freq_base": 700.0,
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_CHANGES)
def test_every_field_of_gguf_is_used_refused_or_named(tmp_path, monkeypatch, name):
    config = hf_values(head_dim=4, hidden_size=16)
    value = GGUF_CHANGES[name]
    plain = Gguf(write_gguf(tmp_path / "a.gguf", config, llm_state(config))).hf_config()

    header = gguf.GGUFWriter.write_header_to_file
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_header_to_file", lambda w, *a: (_put(w, name, value), header(w))
    )
    path = write_gguf(tmp_path / "b.gguf", config, llm_state(config))
    source = Gguf(path)
    try:
        changed = source.hf_config()
        resolved = llm_config(changed, str(path), [])
    except UserError as e:
        assert (
            name.removeprefix("llama.") in str(e)
            or name.split(".")[-1] in str(e)
            or (
                name
                in ("llama.rope.dimension_count", "llama.expert_count", "llama.rope.scaling.type")
            )
        ), str(e)
        assert "\n" not in str(e)
        return
    assert resolved != llm_config(plain, "", []) or name in source.unused_fields()


def _put(writer, name, value):
    writer.kv_data[0].pop(name, None)
    kinds = {
        bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32,
        str: writer.add_string,
    }  # fmt: skip
    kinds[type(value)](name, value)
