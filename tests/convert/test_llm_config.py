"""No field of config.json or GGUF metadata is lost: the logits of transformers, or one line that names it."""

import copy
import re
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gguf_files import gguf, write_gguf
from helpers.released_files import llm_config as hf_values
from helpers.released_files import llm_state, save_hf

import convert.formats.gguf as gguf_module
import convert.llm_config as llm_config_module
from convert.build import build
from convert.build_plan import BuildRequest, make_plan
from convert.formats.gguf import Gguf
from convert.formats.gguf_tokenizer import tokenizer_files
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
    "rope_theta": [700.0, None],
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
        {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}},
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
            # Without the program of the layers, which each configuration would compile anew.
            with jax.disable_jit():
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


WRONG = [None, "x", "", -1, 0, [], ["a"], {"a": 1}, 2.5, True, float("nan")]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_value_that_no_model_has_is_refused_by_name(model_type):
    from transformers import AutoConfig

    values = values_of(model_type)
    plain = llm_config(values, "config.json", [])
    fields = {*values, *AutoConfig.for_model(model_type).to_dict(), *BASE, *CHANGES}
    accepted = set()
    for field in sorted(fields - {"model_type"}):
        for value in WRONG:
            try:
                changed = llm_config(values | {field: value}, "config.json", notes := [])
            except UserError as e:
                assert field in str(e) and "\n" not in str(e), (field, value, str(e))
                continue
            if changed != plain and value is not None:
                accepted.add((field, value))
            elif field not in plain_fields() and value is not None:
                assert any(field in note for note in notes), (field, value)
    assert accepted <= {
        ("rms_norm_eps", 2.5), ("rope_theta", 2.5), ("attention_bias", True), ("mlp_bias", True),
        ("tie_word_embeddings", True),
    }  # fmt: skip


def plain_fields():
    """Fields that may have any value without a word: they do not change the logits."""
    return {
        *llm_config_module._UNUSED_BY_MODELS, *llm_config_module._HARMLESS,
        *llm_config_module._SIZES, *llm_config_module._NUMBERS, *llm_config_module._SWITCHES,
        *llm_config_module._OBJECTS, *llm_config_module._OTHERS, "partial_rotary_factor",
    }  # fmt: skip


def test_a_field_that_a_newer_transformers_has_is_named(monkeypatch):
    known = llm_config_module._UNUSED_BY_MODELS
    monkeypatch.setattr(llm_config_module, "_UNUSED_BY_MODELS", known - {"attention_dropout"})
    for value, named in ((0.0, False), (0.5, True)):
        llm_config(values_of("llama", attention_dropout=value), "config.json", notes := [])
        assert any("attention_dropout" in note for note in notes) == named


def test_fields_of_other_families_are_not_taken_from_their_switches():
    """transformers' Qwen has no MLP biases whatever mlp_bias says, and its Mistral no layer types."""
    for model_type in ("qwen2", "qwen3"):
        assert not llm_config(values_of(model_type, mlp_bias=True), "config.json", []).mlp_bias
    mixed = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    with pytest.raises(UserError, match="layer_types has sliding_attention"):
        llm_config(values_of("mistral", use_sliding_window=True, **mixed), "config.json", [])
    nested = {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}}
    with pytest.raises(UserError, match="rope_parameters has its own values for full_attention"):
        llm_config(values_of("llama", rope_parameters=nested), "config.json", [])
    rope = {"rope_type": "linear", "factor": 2.0, "attention_factor": 3.0}
    llm_config(values_of("llama", rope_scaling=rope), "config.json", notes := [])
    assert any("rope_scaling.attention_factor: not used" in note for note in notes)


def test_a_gguf_whose_head_alone_is_there(tmp_path):
    config = hf_values(head_dim=4, hidden_size=16)
    state = llm_state(config)
    del state["model.embed_tokens.weight"]
    plan = make_plan(
        BuildRequest("minigpt4-vicuna", write_gguf(tmp_path / "a.gguf", config, state), tmp_path)
    )
    assert plan.config.llm.tie and any("is the embedding too" in note for note in plan.notes)


# key of GGUF's specification -> (value, change of config.json that says the same)
GGUF_USED = {
    "llama.rope.freq_base": (700.0, {"rope_theta": 700.0}),
    "llama.rope.scale_linear": (4.0, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama.attention.layer_norm_rms_epsilon": (0.5, {"rms_norm_eps": 0.5}),
    "llama.attention.head_count_kv": (1, {"num_key_value_heads": 1}),
    "llama.attention.sliding_window": (8, {"model_type": "mistral", "sliding_window": 8}),
    "llama.context_length": (77, {"max_position_embeddings": 77}),
    "llama.feed_forward_length": (3, {"intermediate_size": 3}),
    "llama.block_count": (3, {"num_hidden_layers": 3}),
}
# What does not change logits, or says what tensors say too.
GGUF_HARMLESS = {
    "llama.vocab_size", "llama.tensor_data_layout", "llama.expert_used_count",
    "llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned",
    "llama.rope.scaling.yarn_log_multiplier", "llama.attention.sliding_window_pattern",
    # without a type and a factor of the scaling there is none
    "llama.rope.scaling.factor",
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory):
    config = hf_values(head_dim=4, hidden_size=16)
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    return Gguf(write_gguf(path, config, llm_state(config)))


def with_field(source, name, value):
    """The same file with another metadata value; None: without it."""
    changed = copy.copy(source)
    changed._values = {k: v for k, v in source._values.items() if k != name}
    if value is not None:
        changed._values[name] = SimpleNamespace(contents=lambda: value)
    return changed


def gguf_keys():
    """All keys of the specification, as the gguf library lists them."""
    for group in ("LLM", "Attention", "Rope", "SSM", "Tokenizer", "Split", "General"):
        for key in vars(getattr(gguf.Keys, group)).values():
            if isinstance(key, str) and "{" not in key.replace("{arch}", ""):
                yield key.format(arch="llama")


@pytest.mark.parametrize("name", GGUF_USED)
def test_fields_of_gguf_say_what_those_of_config_json_say(gguf_model, name):
    value, change = GGUF_USED[name]
    plain = gguf_model.hf_config()
    assert llm_config(with_field(gguf_model, name, value).hf_config(), "", []) == llm_config(
        plain | change, "", []
    )


@pytest.mark.parametrize("value", [3, 0.5, -1, "x", True, [1, 2]])
def test_every_key_of_gguf_is_used_refused_or_named(gguf_model, value):
    plain = llm_config(gguf_model.hf_config(), "", [])
    silent = set()
    for name in gguf_keys():
        source = with_field(gguf_model, name, value)
        try:
            changed = llm_config(source.hf_config(), "a.gguf", [])
        except UserError as e:
            words = {name, *name.split("."), name.rpartition(".")[2].rpartition("_")[0]}
            words |= {"mixture of experts"} if "expert_count" in name else set()
            words |= {"dimensions rotate"} if "dimension_count" in name else set()
            assert "\n" not in str(e) and any(word and word in str(e) for word in words), (name, e)
            continue
        if changed == plain and name not in source.unused_fields():
            silent.add(name)
    architecture = {name for name in silent if name.startswith("llama.")}
    used = set(GGUF_USED) | {f"llama.{name}" for name in gguf_module._FIELDS.values()}
    same = {name for name in used if gguf_model.field(name) == value}
    neutral = {f"llama.{name}" for name, v in gguf_module._UNSUPPORTED.items() if v == value}
    assert architecture <= GGUF_HARMLESS | same | neutral


@pytest.mark.parametrize(
    "name", ["embedding_length", "block_count", "attention.head_count", "feed_forward_length",
             "attention.layer_norm_rms_epsilon"],
)  # fmt: skip
def test_a_required_field_that_is_absent_or_renamed_is_named(gguf_model, name):
    with pytest.raises(UserError, match=f"llama.{name}"):
        with_field(gguf_model, f"llama.{name}", None).hf_config()


def test_fields_under_another_name_are_named(gguf_model):
    for name in ("llama.rope.base", "mistral.rope.freq_base", "rope.freq_base", "tokenizer.ggml.x"):
        assert with_field(gguf_model, name, 3.0).unused_fields() == [name]
    assert with_field(gguf_model, "tokenizer.ggml.add_eos_token", True).unused_fields()
    assert not gguf_model.unused_fields()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("scores", None, "tokenizer.ggml.scores has no list"),
        ("scores", [1.0], "tokenizer.ggml.scores has 1 values for"),
        ("token_type", None, "tokenizer.ggml.token_type has no list"),
        ("bos_token_id", 10**6, "tokenizer.ggml.bos_token_id is 1000000"),
        ("eos_token_id", -1, "tokenizer.ggml.eos_token_id is -1"),
        ("model", "t5", "tokenizer 't5' is not supported"),
        ("model", None, "has no tokenizer"),
        ("tokens", None, "has no tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(gguf_model, name, value, words):
    with pytest.raises(UserError, match=re.escape(words)):
        tokenizer_files(with_field(gguf_model, f"tokenizer.ggml.{name}", value))


def test_byte_level_tokens_need_merges(gguf_model):
    with pytest.raises(UserError, match=r"no tokenizer\.ggml\.merges"):
        tokenizer_files(with_field(gguf_model, "tokenizer.ggml.model", "gpt2"))
