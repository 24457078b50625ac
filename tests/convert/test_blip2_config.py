"""Every field of BLIP-2's config.json: the logits of transformers, or one line that names it."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.blip2_directories import (
    KINDS,
    QUERIES,
    REMOVED,
    SIZE,
    TEXTS,
    WORDS,
    changed,
    config_of,
    with_config,
    write_tensors,
)

from convert import blip2_config, blip2_parts, downloads
from convert.blip2_config import hf_sizes, hf_values
from convert.blip2_plan import make_blip2_plan
from convert.build import build
from convert.build_plan import BuildRequest
from convert.image_processor import PROCESSOR_FILES, check_image_processor
from convert.llm_config import llm_config
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import QFormerConfig, TokenizerConfig, VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Instruction

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# Other values of the fields, by their path in config.json.
CHANGES = {
    "num_query_tokens": [4], "image_text_hidden_size": [20], "image_token_index": [7],
    "use_decoder_only_language_model": [False], "initializer_factor": [2.0],
    "initializer_range": [0.5], "tie_word_embeddings": [True, False], "is_encoder_decoder": [True],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "vision_config": [{}, None], "qformer_config": [{}, None], "text_config": [{}, None],
    "vision_config.hidden_size": [8], "vision_config.intermediate_size": [12],
    "vision_config.num_hidden_layers": [1, 3], "vision_config.num_attention_heads": [4, 3],
    "vision_config.image_size": [56, [28, 28]], "vision_config.patch_size": [7],
    "vision_config.hidden_act": ["relu"], "vision_config.layer_norm_eps": [0.5],
    "vision_config.attention_dropout": [0.5], "vision_config.qkv_bias": [False],
    "vision_config.initializer_range": [0.5],
    "qformer_config.vocab_size": [30], "qformer_config.hidden_size": [10],
    "qformer_config.num_hidden_layers": [2, 4], "qformer_config.num_attention_heads": [4, 3],
    "qformer_config.intermediate_size": [12], "qformer_config.hidden_act": ["gelu_new"],
    "qformer_config.hidden_dropout_prob": [0.5],
    "qformer_config.attention_probs_dropout_prob": [0.5],
    "qformer_config.max_position_embeddings": [32], "qformer_config.initializer_range": [0.5],
    "qformer_config.layer_norm_eps": [0.5], "qformer_config.pad_token_id": [None, 3],
    "qformer_config.cross_attention_frequency": [1, 3],
    "qformer_config.encoder_hidden_size": [8, 1408],
    "qformer_config.use_qformer_text_input": [True, False],
    "qformer_config.position_embedding_type": ["absolute", "relative_key"],
    "text_config.model_type": ["gpt2", "bert"], "text_config.tie_word_embeddings": [True, False],
    "text_config.vocab_size": [300], "text_config.num_attention_heads": [4],
    "text_config.hidden_size": [8], "text_config.max_position_embeddings": [32],
    "text_config.do_layer_norm_before": [False], "text_config.rms_norm_eps": [0.5],
}  # fmt: skip
# Other values of the fields of FlanT5's text_config.
T5_CHANGES = {
    "d_model": [8], "d_kv": [3], "d_ff": [12], "num_layers": [2], "num_heads": [4],
    "num_decoder_layers": [2, None], "vocab_size": [300], "tie_word_embeddings": [True, None],
    "scale_decoder_outputs": [True, False], "is_gated_act": [False],
    "feed_forward_proj": ["gated-silu", "relu", "gated-gelu_new", "x-gelu"],
    "dense_act_fn": ["gelu_new", "relu", None], "relative_attention_num_buckets": [8, 32],
    "relative_attention_max_distance": [12, 8, 7], "layer_norm_epsilon": [0.5], "n_positions": [4, 4096],
    "decoder_start_token_id": [5, None, 420], "pad_token_id": [3, None], "eos_token_id": [[1, 5], None],
    "bos_token_id": [6], "dropout_rate": [0.5], "is_decoder": [True], "initializer_factor": [2.0],
    "model_type": ["mt5", "opt"], "use_cache": [False], "classifier_dropout": [0.5],
    "hidden_size": [8], "head_dim": [3], "num_attention_heads": [4], "num_hidden_layers": [2],
    "rms_norm_eps": [0.5], "rope_theta": [5.0], "logit_scale": [2.0], "is_encoder_decoder": [False],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
}  # fmt: skip
WRONG = ["x", "", -1, 0, [], ["a"], {"a": 1}, 2.5, True, float("nan"), None]
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
TENSOR = re.compile(r"(vision_model|qformer|query_tokens|language_|embeddings|.*projection)\S*")


def cases(kind, config):
    """(path, value): other values, and each known field without it and under another name. Of FlanT5 only
    the language model's fields: the others are read as with OPT."""
    if kind == "flant5":
        part = "text_config"
        yield from ((f"{part}.{n}", value) for n, values in T5_CHANGES.items() for value in values)
        yield from ((f"{part}.{n}", REMOVED) for n in config[part])
        yield f"{part}.a_new_field", 3
        return
    known = [
        f"{part}.{name}" for part in ("vision_config", "qformer_config") for name in config[part]
    ]
    known += ["vision_config", "qformer_config", "text_config", "num_query_tokens"]
    known += [f"text_config.{name}" for name in TEXTS[config["text_config"]["model_type"]]]
    yield from ((path, value) for path, values in CHANGES.items() for value in values)
    yield from ((path, REMOVED) for path in known)
    yield from ((f"{part}a_new_field", 3) for part in ("", "vision_config.", "qformer_config."))


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Without transformers' reports of tensors that it does not use."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """(kind, its config.json, a directory with everything else): all tensors are random."""
    kind, folder = request.param, tmp_path_factory.mktemp("blip2")
    config = config_of(kind)
    write_tensors(kind, config, folder)
    return kind, config, folder


RNG = np.random.default_rng(1)
PIXELS = RNG.normal(0, 1, (1, SIZE, SIZE, 3)).astype(np.float32)
TEXT = RNG.integers(5, WORDS, (1, 6))
IDS = RNG.integers(5, 300, (1, 8))
ANSWER = RNG.integers(5, 300, (1, 20))  # that FlanT5's decoder reads


def their_logits(kind, folder):
    """transformers' logits; None if it does not load this model, or needs weights that are missing."""
    try:
        model, info = getattr(transformers, KINDS[kind][1]).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if info["missing_keys"]:
            return None
        marks = model.config.image_token_index
        pixels = torch.tensor(PIXELS.transpose(0, 3, 1, 2))
        image = torch.full((1, QUERIES), 0 if marks is None else marks)
        with torch.no_grad():
            if kind == "matching":
                ids = TEXT if marks is None else np.pad(TEXT, ((0, 0), (QUERIES, 0)))
                found = model.eval()(
                    pixel_values=pixels, input_ids=torch.tensor(ids),
                    attention_mask=torch.ones(ids.shape, dtype=torch.long),
                    use_image_text_matching_head=True,
                )  # fmt: skip
                return found.logits_per_image.numpy()
            if marks is None:
                model.config.image_token_index = 0
            more = {
                "instruct": {"qformer_input_ids": torch.tensor(TEXT)},
                "flant5": {"decoder_input_ids": torch.tensor(ANSWER)},
            }.get(kind, {})  # fmt: skip
            ids = torch.cat([image, torch.tensor(IDS)], 1)
            return model.eval()(pixel_values=pixels, input_ids=ids, **more).logits.numpy()
    except Exception:  # of several types
        return None


def our_logits(kind, folder, out, known):
    """known: those of configurations that were built before, from the same tensors."""
    request = BuildRequest(KINDS[kind][0], None, out, checkpoint=folder)
    config = without_tokenizer(make_blip2_plan(request).config)
    if config not in known:
        build(request)
        known[config] = compute_logits(kind, out)
    return known[config]


def without_tokenizer(config):
    return dataclasses.replace(config, tokenizer=TokenizerConfig())


def compute_logits(kind, folder):
    module, _ = load_model(folder, "float32")
    lengths = np.array([TEXT.shape[1]], np.int32)
    if kind == "matching":
        words = module.qformer.embed_text(TEXT)
        hidden = module.qformer.read_both(module.read_pixels(PIXELS), words, lengths)
        return np.asarray(module.match(hidden))
    instruction = Instruction(TEXT, lengths) if kind == "instruct" else None
    visual = module.encode(PIXELS[:, None], instruction=instruction)
    tokens = np.concatenate([np.full((1, QUERIES), -1), IDS], 1).astype(np.int32)
    embeds, lengths = module.merge(tokens, visual), jnp.array([tokens.shape[1]])
    if kind == "flant5":
        encoded = module.llm.encode(embeds, lengths)
        embeds, lengths = module.llm.embed_tokens(ANSWER), jnp.array([ANSWER.shape[1]])
        return np.asarray(module.llm.logits(module.llm(embeds, lengths, encoded=encoded)))
    return np.asarray(module.llm.logits(module.llm(embeds, lengths)))


def names(path):
    """What a message may call a field."""
    name = path.split(".")[-1]
    return (name, name.removeprefix("num_").replace("_", " "), *["tokens"] * (name == "vocab_size"))


def merged(cases):
    """Cases -> dictionaries of path and value; each path is in a dictionary once, and not with its part. All
    have the changes of the first: where they differ in harmless fields, our logits are computed once."""

    def fits(path, changes):
        return not any(
            path == o or f"{path}.".startswith(f"{o}.") or o.startswith(f"{path}.") for o in changes
        )

    rounds = []
    for path, value in cases:
        place = next((r for r in rounds if fits(path, r)), None)
        if place is None:
            rounds.append(place := {})
        place[path] = value
    return [{p: v for p, v in rounds[0].items() if fits(p, r)} | r for r in rounds]


def differs(kind, config, source, changes, out, known):
    """What is wrong with the logits of a model with these changes; "" for nothing."""
    for path, value in changes.items():
        config = changed(config, path, value)
    folder = with_config(source, out, config)
    theirs = their_logits(kind, folder)
    if theirs is None:
        return "transformers does not load it"
    ours = our_logits(kind, folder, out.with_name(f"{out.name}.ours"), known)
    return "" if np.allclose(ours, theirs, rtol=2e-3, atol=2e-3) else "other logits"


def shapes_of(config):
    """parameter_shapes, which takes long, once for configurations that differ in other values only."""
    plain = {
        "eps": 0.5,
        "dropout": 0.5,
        "start_id": 0,
        "relative_distance": 0,
        "activation": "gelu",
    }
    parts = {
        part: dataclasses.replace(value, **{n: v for n, v in plain.items() if hasattr(value, n)})
        for part in ("vision", "qformer", "llm") if (value := getattr(config, part)) is not None
    }  # fmt: skip
    return parameter_shapes(dataclasses.replace(without_tokenizer(config), **parts))


def test_every_field_is_used_or_refused(case, tmp_path, monkeypatch):
    """All changes that are accepted are compared with transformers in a few models; alone if one fails."""
    monkeypatch.setattr(blip2_parts, "parameter_shapes", shapes_of)
    kind, config, source = case
    accepted, wrong, refused = [], [], 0
    folder = with_config(source, tmp_path / "changed", config)
    for path, value in cases(kind, config):
        what = f"{path} {'removed' if value is REMOVED else value}"
        (folder / "config.json").write_text(json.dumps(changed(config, path, value)))
        try:
            plan = make_blip2_plan(
                BuildRequest(KINDS[kind][0], None, tmp_path / "m", checkpoint=folder)
            )
        except UserError as e:
            named = any(name in str(e) for name in names(path)) or TENSOR.search(str(e))
            if not named or "\n" in str(e):
                wrong.append(f"{what}: {e}")
            refused += 1
            continue
        said = path.removeprefix("text_config.")
        if "new_field" in path and not any(said in note for note in plan.notes):
            wrong.append(f"{what}: no note")
        accepted.append((path, value))
    known = {}
    for n, changes in enumerate(merged(accepted)):
        if differs(kind, config, source, changes, tmp_path / f"all{n}", known):
            for i, (path, value) in enumerate(changes.items()):
                alone = differs(kind, config, source, {path: value}, tmp_path / f"{n}.{i}", known)
                wrong += [f"{path} {value}: {alone}"] if alone else []
            wrong.append(f"accepted changes {list(changes)} together")
    assert not wrong, "\n".join(wrong)
    assert len(accepted) > 30 and refused > 20, (len(accepted), refused)


@pytest.mark.parametrize("reads_text", [False, True])
def test_a_value_that_no_model_has_is_refused_by_name(reads_text):
    config = config_of("instruct" if reads_text else "opt")
    plain = hf_values(config, "config.json", [], reads_text=reads_text)
    paths = ["num_query_tokens", "vision_config", "qformer_config", "text_config"]
    paths += [f"vision_config.{name}" for name in config["vision_config"]]
    paths += [f"qformer_config.{name}" for name in config["qformer_config"]]
    for path in paths:
        part, _, name = path.rpartition(".")
        for value in WRONG:
            try:
                hf_values(
                    changed(config, path, value), "config.json", notes := [], reads_text=reads_text
                )
            except UserError as e:
                assert path in str(e) and "\n" not in str(e), (path, value, str(e))
                continue
            used = part and name in blip2_config._USED and value != plain[part][name]
            assert not used or name in ("layer_norm_eps", *DROPOUT), (path, value)
            assert not part or name in (*blip2_config._USED, *blip2_config._HARMLESS) or notes


def test_parts_hold_what_differs_from_the_defaults_alone():
    """As transformers 4 saves BLIP-2: absent fields are those of transformers' classes."""
    config = {
        "model_type": "blip-2", "num_query_tokens": 32, "vision_config": {"model_type": "x"},
        "qformer_config": {"vocab_size": 30523},
        "text_config": {"model_type": "opt", "hidden_size": 2560, "num_attention_heads": 32,
                        "num_hidden_layers": 32, "ffn_dim": 10240, "word_embed_proj_dim": 2560},
    }  # fmt: skip
    values = hf_values(config, "config.json", [], reads_text=False)
    sizes = hf_sizes(values)
    assert sizes["vision"] == dataclasses.asdict(VisionConfig())
    known = dataclasses.asdict(QFormerConfig())
    assert {**known, **sizes["qformer"]} == known
    llm = llm_config(values["text_config"], "config.json", [])
    assert (llm.vocab, llm.max_length, llm.width) == (50272, 2048, 2560)


IMAGES = {
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, None, 0.5], "size": {"shortest_edge": SIZE},
    "resample": 2, "rescale_factor": 1.0, "do_resize": False, "do_normalize": None,
    "do_rescale": False, "do_center_crop": True, "do_pad": True,
}  # fmt: skip


def test_images_are_prepared_as_the_directory_says_or_it_is_refused(tmp_path):
    processor = transformers.BlipImageProcessor(size={"height": SIZE, "width": SIZE}).to_dict()
    files = PROCESSOR_FILES
    plain = tmp_path / files[0]
    plain.write_text(json.dumps(processor))
    check_image_processor(tmp_path, SIZE, notes := [])
    assert not notes
    changes = [*IMAGES.items(), ("size", {"height": SIZE, "width": 56}), ("size", 56)]
    for name, value in changes:
        plain.write_text(json.dumps(processor | {name: value}))
        with pytest.raises(UserError, match=rf"{files[0]}: {name} is .*; expected "):
            check_image_processor(tmp_path, SIZE, [])
        plain.unlink()
        (tmp_path / files[1]).write_text(json.dumps({"image_processor": {name: value}}))
        with pytest.raises(UserError, match=rf"{files[1]}: {name} is .*; expected "):
            check_image_processor(tmp_path, SIZE, [])
        (tmp_path / files[1]).unlink()
    plain.write_text(json.dumps(processor | {"do_something": True, "crop_size": 3, "size": SIZE}))
    check_image_processor(tmp_path, SIZE, notes)
    assert notes == [f"{plain}: do_something: not used"]


def test_a_build_checks_how_images_are_prepared(case, tmp_path):
    """On the way of a build; a download has these files too."""
    kind, config, source = case
    folder = with_config(source, tmp_path / "hf", config)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": SIZE}}))
    request = BuildRequest(KINDS[kind][0], None, tmp_path / "m", checkpoint=folder)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: size is "):
        make_blip2_plan(request)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(downloads, "fetch_checkpoint", lambda *given: asked.append(given) or folder)
        downloads.download_inputs(request)
    assert {*PROCESSOR_FILES} <= {*asked[0][2]}
