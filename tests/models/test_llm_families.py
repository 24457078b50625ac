"""Every supported family, logit by logit, against `transformers` on small random models."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from helpers.llm_weights import with_weights  # noqa: E402

from convert.hf_config import llm_config_from_hf  # noqa: E402
from convert.llm_keys import llm_table  # noqa: E402
from minigpt4_jax.errors import UserError  # noqa: E402
from minigpt4_jax.models.llm import unstack  # noqa: E402

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "attention_dropout": 0.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama 2": ("Llama", {"rms_norm_eps": 1e-6, "max_position_embeddings": 64}),
    "llama, grouped queries": ("Llama", {"num_key_value_heads": 2}),
    "llama 3": ("Llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama, linear scaling": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, heads of another width": ("Llama", {"head_dim": 12}),
    "vicuna": ("Llama", {"vocab_size": 32001}),
    "smollm2": (
        "Llama",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral, no window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}),
    "opt": ("OPT", {"ffn_dim": 56, "word_embed_proj_dim": 32}),
}  # fmt: skip


@jax.jit  # one program: a small one for each operation takes longer to compile
def logits_of(model, embeds, lengths, encoded=None):
    return model.logits(model(embeds, lengths, encoded=encoded))


@jax.jit
def decode_logits(model, embeds, positions, cache):
    hidden, cache = model.decode(embeds, positions, cache)
    return model.logits(hidden[:, 0]), cache


def build(family):
    """(model of transformers, ours with its weights) of one family; all parameters random, norms too."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, name + "Config")(**(SIZES | changes))
    torch.manual_seed(0)
    theirs = getattr(transformers, name + "ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, p in theirs.named_parameters():
            p.normal_(0, 0.3).add_(1.0 if "norm" in path else 0.0)
    values = config.to_dict()
    c = llm_config_from_hf(values)
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    if c.tie:
        tensors.pop("lm_head.weight", None)
    return theirs, with_weights(c, tensors, llm_table(c.model_type))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    theirs, ours = build(family)
    ids = np.random.default_rng(1).integers(0, 90, (2, 40))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    embeds = np.asarray(jax.jit(type(ours).embed_tokens)(ours, ids))
    scale = np.abs(wanted).max()
    found = logits_of(ours, embeds, np.array([40, 40]))
    np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-4)

    # the same through a cache: 25 positions at once, the others one by one
    @jax.jit
    def prefill(model, embeds, lengths):
        hidden, cache = model.prefill(embeds, lengths, 64)
        return model.logits(hidden), cache

    found, cache = prefill(ours, embeds[:, :25], np.array([25, 25]))
    np.testing.assert_allclose(found / scale, wanted[:, :25] / scale, atol=1e-4)
    for t in range(25, 40):
        one, cache = decode_logits(ours, embeds[:, t : t + 1], np.full((2, 1), t), cache)
        np.testing.assert_allclose(one / scale, wanted[:, t] / scale, atol=1e-4)


T5_SIZES = {
    "vocab_size": 90, "d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_t5_logits(activation):
    config = transformers.T5Config(**T5_SIZES)
    config.dense_act_fn = activation
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.lm_head = torch.nn.Linear(32, 90, bias=False)  # transformers 5 ties it at first
    with torch.no_grad():
        for path, p in theirs.named_parameters():
            p.normal_(0, 0.3).add_(1.0 if "norm" in path else 0.0)
    c = llm_config_from_hf(config.to_dict() | {"dense_act_fn": activation})
    ours = with_weights(c, {k: v.numpy() for k, v in theirs.state_dict().items()}, llm_table("t5"))

    rng = np.random.default_rng(1)
    prompts, answers = rng.integers(1, 90, (2, 170)), rng.integers(1, 90, (2, 20))
    answers[:, 0] = c.start_id
    lengths = np.array([170, 45])
    mask = np.arange(170) < lengths[:, None]
    with torch.no_grad():
        wanted = theirs(
            input_ids=torch.tensor(prompts), attention_mask=torch.tensor(mask).long(),
            decoder_input_ids=torch.tensor(answers),
        ).logits.numpy()  # fmt: skip
    scale = np.abs(wanted).max()
    embed = jax.jit(type(ours).embed_tokens)
    embeds, written = np.asarray(embed(ours, prompts)), np.asarray(embed(ours, answers))
    encoded = jax.jit(type(ours).encode)(ours, embeds, lengths)
    found = logits_of(ours, written, np.array([20, 20]), encoded)
    np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-4)

    # the same through caches, token by token; the activation makes no difference there
    for model in (ours, unstack(ours)) if activation == "gelu_new" else ():
        hidden, cache = jax.jit(lambda m, *args: m.start(*args, 32, 192))(model, embeds, lengths)
        np.testing.assert_allclose(ours.logits(hidden) / scale, wanted[:, 0] / scale, atol=1e-4)
        for t in range(1, 6):
            one, cache = decode_logits(model, written[:, t : t + 1], np.full((2, 1), t), cache)
            np.testing.assert_allclose(one / scale, wanted[:, t] / scale, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OPT 6.7B", "FlanT5 XXL"])
def test_a_layer_of_full_size(kind):
    """One layer of BLIP-2's large language models (of T5 one of the encoder, and one of the decoder)."""
    torch.manual_seed(0)
    if kind.startswith("OPT"):
        config = transformers.OPTConfig(
            vocab_size=90, hidden_size=4096, num_hidden_layers=1, num_attention_heads=32,
            ffn_dim=16384, word_embed_proj_dim=4096, max_position_embeddings=64,
        )  # fmt: skip
        make = transformers.OPTForCausalLM
    else:
        sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64}
        layers = {"num_layers": 1, "num_decoder_layers": 1}
        config = transformers.T5Config(**(T5_SIZES | sizes | layers))
        make = transformers.T5ForConditionalGeneration
    with transformers.initialization.no_init_weights():  # takes long
        theirs = make(config).eval()
        theirs.tie_weights()
        if kind.startswith("FlanT5"):
            theirs.lm_head = torch.nn.Linear(4096, 90, bias=False)
    # Matrices of as many inputs lie in one array, a few numbers apart: drawing all of them takes long.
    numbers, scaled = torch.randn(max(p.numel() for p in theirs.parameters()) + 640), {}
    for n, (path, p) in enumerate(theirs.named_parameters()):
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
        if scale not in scaled:
            scaled[scale] = numbers * scale
        p.data = scaled[scale][16 * n :][: p.numel()].view_as(p)
        if "norm" in path:
            p.data = p.data + 1
    c = llm_config_from_hf(config.to_dict())
    tensors = {k: v.numpy() for k, v in theirs.state_dict().items()}
    if c.tie:
        tensors.pop("lm_head.weight")
    ours = with_weights(c, tensors, llm_table(c.model_type))
    ids = np.random.default_rng(1).integers(3, 90, (1, 12))
    tokens, lengths = jnp.asarray(ids, jnp.int32), jnp.asarray([12])
    decoder = {"decoder_input_ids": torch.tensor(ids)} if c.encoder_layers else {}
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor(ids), **decoder).logits.numpy()

    @jax.jit
    def run(model):
        embeds = model.embed_tokens(tokens)
        encoded = model.encode(embeds, lengths) if c.encoder_layers else None
        return model.logits(model(embeds, lengths, encoded=encoded))

    logits = np.asarray(run(ours))
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())


def test_right_padding_changes_nothing():
    _, ours = build("mistral")
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 90, (2, 30)), jnp.int32)
    hidden = jax.jit(lambda model, lengths: model(model.embed_tokens(ids), lengths))
    whole = np.asarray(hidden(ours, np.array([30, 30])))
    padded = np.asarray(hidden(ours, np.array([30, 11])))
    np.testing.assert_allclose(padded[1, :11], whole[1, :11], atol=1e-5)
    np.testing.assert_allclose(padded[0], whole[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi3", None])
def test_the_error_for_an_unsupported_architecture_lists_the_supported_ones(kind):
    with pytest.raises(UserError, match="llama, mistral, qwen2, qwen3, opt, t5"):
        llm_config_from_hf(SIZES | {"model_type": kind})


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8,
         "max_window_layers": 1},
        {"model_type": "opt", "ffn_dim": 56, "do_layer_norm_before": False},
        {"model_type": "opt", "ffn_dim": 56, "word_embed_proj_dim": 16},
        {"model_type": "t5", **T5_SIZES, "feed_forward_proj": "relu"},
        {"model_type": "t5", **T5_SIZES, "tie_word_embeddings": True},
    ],
)  # fmt: skip
def test_unsupported_options_are_errors(changes):
    with pytest.raises(UserError):
        llm_config_from_hf(SIZES | {"model_type": "llama"} | changes)
