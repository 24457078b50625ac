"""Every field of OPT's and T5's config.json: the logits of transformers, or one line that names it."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.llm_weights import with_weights
from helpers.released_files import save_hf

from convert.build_plan import BuildRequest, make_plan
from convert.llm_config import llm_config
from convert.llm_keys import llm_table
from minigpt4_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 785  # of the small tokenizer
OPT = {
    "model_type": "opt", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": VOCAB, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False, "decoder_start_token_id": 0, "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
BASES = {"opt": OPT, "t5": T5}
REMOVED = object()
# field -> other values that it may have
CHANGES = {
    "opt": {
        "num_attention_heads": [2, 3, 16], "ffn_dim": [12], "hidden_size": [8],
        "num_hidden_layers": [1, 3], "max_position_embeddings": [32, 128],
        "word_embed_proj_dim": [8, None], "vocab_size": [700],
        "activation_function": ["gelu", "relu"], "do_layer_norm_before": [False],
        "_remove_final_layer_norm": [True], "enable_bias": [False],
        "layer_norm_elementwise_affine": [False], "tie_word_embeddings": [True],
        "layer_norm_eps": [0.5], "rms_norm_eps": [0.5], "hidden_act": ["gelu"], "rope_theta": [5.0],
        "rope_scaling": [{"type": "linear", "factor": 2.0}], "sliding_window": [4],
        "attention_bias": [False], "num_key_value_heads": [2], "logit_scale": [2.0],
        "layer_types": [["sliding_attention"] * 2], "dropout": [0.5], "layerdrop": [0.5],
        "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    },
    "t5": {
        "d_model": [8], "d_kv": [3, 12], "d_ff": [12], "num_layers": [1, 3],
        "num_decoder_layers": [1, 3, None], "num_heads": [2, 8], "vocab_size": [700],
        "feed_forward_proj": ["gated-silu", "relu", "gated-gelu_new", "x-gelu"],
        "dense_act_fn": ["gelu", "gelu_new", "relu"], "is_gated_act": [False, True],
        "tie_word_embeddings": [True], "scale_decoder_outputs": [True, False],
        "relative_attention_num_buckets": [16, 64], "relative_attention_max_distance": [40],
        "layer_norm_epsilon": [0.5], "rms_norm_eps": [0.5], "n_positions": [16, 4096],
        "decoder_start_token_id": [5, None], "pad_token_id": [3], "head_dim": [12],
        "hidden_size": [8], "num_hidden_layers": [1], "rope_theta": [5.0], "logit_scale": [2.0],
        "num_key_value_heads": [2], "dropout_rate": [0.5], "is_decoder": [True],
        "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    },
}  # fmt: skip
WRONG = [None, "x", "", -1, 0, [], ["a"], {"a": 1}, 2.5, True, float("nan")]
# fields whose value may be anything that transformers takes
FREE = {
    "tie_word_embeddings", "scale_decoder_outputs", "is_gated_act", "do_layer_norm_before", "enable_bias",
    "layer_norm_elementwise_affine", "layer_norm_epsilon", "dense_act_fn",
}  # fmt: skip
TENSOR = re.compile(r"(decoder|encoder|model|lm_head|shared)\S*\.\S+")


def values_of(kind, field, value):
    return {k: v for k, v in (BASES[kind] | {field: value}).items() if v is not REMOVED}


@pytest.fixture(scope="module", params=["opt", "t5"])
def family(request):
    """(model type, tensors of transformers): all are random, of norms and biases too."""
    kind = request.param
    config = transformers.AutoConfig.for_model(**BASES[kind])
    model = (
        transformers.T5ForConditionalGeneration if kind == "t5" else transformers.OPTForCausalLM
    )(config)
    rng = np.random.default_rng(0)
    state = {
        name: rng.normal(0, 0.3, array.shape).astype(np.float32) + ("norm" in name)
        for name, array in model.state_dict().items()
        if ".embed_tokens" not in name or kind == "opt"  # T5's is the shared one
    }
    return kind, state


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    return rng.integers(3, 700, (1, 40)), rng.integers(3, 700, (1, 24))


def their_logits(kind, folder, inputs):
    """transformers' logits; None if it does not load this model, or needs weights that are missing."""
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    prompt, answer = map(torch.tensor, inputs)
    try:
        model, info = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if info["missing_keys"]:
            return None
        ids = {"input_ids": prompt, "decoder_input_ids": answer}
        with torch.no_grad():
            return model.eval()(**ids if kind == "t5" else {"input_ids": prompt}).logits.numpy()
    except Exception:  # of several types
        return None


@jax.disable_jit()  # else each configuration compiles its layers anew
def our_logits(config, state, inputs):
    model = with_weights(config, state, llm_table(config.model_type))
    prompt, answer = (model.embed_tokens(jnp.asarray(ids)) for ids in inputs)
    if not config.encoder_layers:
        return np.asarray(model.logits(model(prompt, jnp.array([prompt.shape[1]]))))
    encoded = model.encode(prompt, jnp.array([prompt.shape[1]]))
    return np.asarray(model.logits(model(answer, jnp.array([answer.shape[1]]), encoded=encoded)))


def cases(kind):
    for field, options in CHANGES[kind].items():
        yield from ((field, value) for value in options)
    yield from ((field, REMOVED) for field in BASES[kind] if field != "model_type")
    yield "a_field_that_nobody_knows", 3


def test_every_field_is_used_or_refused(family, inputs, tmp_path):
    kind, state = family
    known = {}
    compared = refused = 0
    for number, (field, value) in enumerate(cases(kind)):
        case = f"{field} {'removed' if value is REMOVED else value}"
        folder = save_hf(tmp_path / f"{number}", values_of(kind, field, value), state)
        try:
            plan = make_plan(BuildRequest("minigpt4-vicuna", folder, tmp_path / "m"))
        except UserError as e:
            line = str(e)
            assert field in line or TENSOR.search(line), (case, line)
            assert "\n" not in line
            refused += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = their_logits(kind, folder, inputs)
        assert theirs is not None, case
        config = plan.config.llm
        if config not in known:
            known[config] = our_logits(config, state, inputs)
        np.testing.assert_allclose(known[config], theirs, rtol=2e-3, atol=2e-3, err_msg=case)
        if "nobody" in field:
            assert any(field in note for note in plan.notes)
        compared += 1
    assert compared > 15 and refused > 15, (compared, refused)


@pytest.mark.parametrize("kind", BASES)
def test_a_value_that_no_model_has_is_refused_by_name(kind):
    plain = llm_config(BASES[kind], "config.json", [])
    known = transformers.AutoConfig.for_model(kind).to_dict()
    for field in sorted({*BASES[kind], *CHANGES[kind], *known} - {"model_type"}):
        for value in WRONG:
            try:
                changed = llm_config(values_of(kind, field, value), "config.json", [])
            except UserError as e:
                assert field in str(e) and "\n" not in str(e), (field, value, str(e))
                continue
            assert changed == plain or value is None or field in FREE, (field, value)


def test_an_answer_of_t5_begins_with_the_configured_token():
    for changes, expected in (
        ({"decoder_start_token_id": 5}, 5),
        ({"decoder_start_token_id": None, "pad_token_id": 3}, 3),
        ({"decoder_start_token_id": None, "pad_token_id": None}, 0),
    ):
        assert llm_config(T5 | changes, "config.json", []).start_id == expected
