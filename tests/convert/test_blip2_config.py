"""Every field of BLIP-2's config.json: the logits of transformers, or one line that names it."""

import copy
import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import chat_families
from helpers.paths import TOKENIZER

from convert import blip2_config, downloads
from convert.blip2_config import hf_sizes, hf_values
from convert.blip2_plan import make_blip2_plan
from convert.build import build
from convert.build_plan import BuildRequest
from convert.image_processor import PROCESSOR_FILES, check_image_processor
from convert.llm_config import llm_config
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.config import QFormerConfig, VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.minigpt import Instruction

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.numpy").save_file

SIZE, QUERIES, WORDS = 28, 3, 40
TEXTS = {
    "opt": {
        "model_type": "opt", "vocab_size": 420, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 800, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
# kind of model -> variant, transformers' class, language model, whether its Q-Former reads text
KINDS = {
    "opt": ("blip2-opt", "Blip2ForConditionalGeneration", "opt", False),
    "instruct": ("instructblip-vicuna", "InstructBlipForConditionalGeneration", "llama", True),
    "matching": ("blip2-qformer", "Blip2ForImageTextRetrieval", "opt", True),
}
REMOVED = object()
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
WRONG = ["x", "", -1, 0, [], ["a"], {"a": 1}, 2.5, True, float("nan"), None]
DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
TENSOR = re.compile(r"(vision_model|qformer|query_tokens|language_|embeddings|.*projection)\S*")


def config_of(kind):
    """config.json of a small model; all fields of the parts are written."""
    _, architecture, text, reads_text = KINDS[kind]
    model_type = "instructblip" if kind == "instruct" else "blip-2"
    config = transformers.AutoConfig.for_model(
        model_type,
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SIZE,
        },
        qformer_config={
            "vocab_size": WORDS + 1, "hidden_size": 20, "num_hidden_layers": 3,
            "num_attention_heads": 2, "intermediate_size": 28, "max_position_embeddings": 16,
            **({"use_qformer_text_input": reads_text} if kind != "instruct" else {}),
        },
        text_config=TEXTS[text], num_query_tokens=QUERIES,
        **({} if kind == "instruct" else {"image_text_hidden_size": 12}),
    ).to_dict()  # fmt: skip
    return json.loads(json.dumps(config)) | {"architectures": [architecture]}


def changed(config, path, value):
    config = copy.deepcopy(config)
    *parts, name = path.split(".")
    part = config[parts[0]] if parts else config
    if value is REMOVED:
        part.pop(name, None)
    else:
        part[name] = value
    return config


def cases(config):
    """(path, value): other values, and each known field without it and under another name."""
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
    model_class = getattr(transformers, KINDS[kind][1])
    model = model_class(transformers.AutoConfig.for_model(**copy.deepcopy(config)))
    rng = np.random.default_rng(0)
    state = {}
    for name, tensor in model.state_dict().items():
        array = rng.normal(0, 0.3, tensor.shape).astype(np.float32)
        array += "norm" in name.lower() and name.endswith("weight")
        if name.endswith("qkv.bias"):  # keys have none
            array[16:32] = 0
        if not name.endswith(("position_ids", "lm_head.weight")) or kind == "instruct":
            state[name] = array
    save_file(state, folder / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS - 4))]
    vocabulary = folder / {"instruct": "qformer_tokenizer"}.get(kind, "")
    vocabulary.mkdir(exist_ok=True)
    (vocabulary / "vocab.txt").write_text("\n".join(words) + "\n")
    if kind == "instruct":
        shutil.copy(TOKENIZER / "tokenizer.model", folder)
    elif kind == "opt":
        chat_families.write_tokenizer(folder, chat_families.FAMILIES["zephyr"])
    return kind, config, folder


def with_config(folder, out, config):
    """A copy of a directory, by links, with another config.json."""
    out.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (out / path.name).symlink_to(path)
    (out / "config.json").write_text(json.dumps(config))
    return out


RNG = np.random.default_rng(1)
PIXELS = RNG.normal(0, 1, (1, SIZE, SIZE, 3)).astype(np.float32)
TEXT = RNG.integers(5, WORDS, (1, 6))
IDS = RNG.integers(5, 300, (1, 8))


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
            text = {"qformer_input_ids": torch.tensor(TEXT)} if kind == "instruct" else {}
            ids = torch.cat([image, torch.tensor(IDS)], 1)
            return model.eval()(pixel_values=pixels, input_ids=ids, **text).logits.numpy()
    except Exception:  # of several types
        return None


def our_logits(kind, folder, out):
    build(BuildRequest(KINDS[kind][0], None, out, checkpoint=folder))
    module, _ = load_model(out, "float32")
    lengths = np.array([TEXT.shape[1]], np.int32)
    if kind == "matching":
        words = module.qformer.embed_text(TEXT)
        hidden = module.qformer.read_both(module.read_pixels(PIXELS), words, lengths)
        return np.asarray(module.match(hidden))
    instruction = Instruction(TEXT, lengths) if kind == "instruct" else None
    visual = module.encode(PIXELS[:, None], instruction=instruction)
    tokens = np.concatenate([np.full((1, QUERIES), -1), IDS], 1).astype(np.int32)
    embeds = module.merge(tokens, visual)
    return np.asarray(module.llm.logits(module.llm(embeds, jnp.array([tokens.shape[1]]))))


def names(path):
    """What a message may call a field."""
    name = path.split(".")[-1]
    return (name, name.removeprefix("num_").replace("_", " "), *["tokens"] * (name == "vocab_size"))


def merged(cases):
    """Cases -> dictionaries of path and value; each path is in a dictionary once, and not with its part."""

    def clash(path, other):
        return path == other or f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.")

    rounds = []
    for path, value in cases:
        place = next((r for r in rounds if not any(clash(path, o) for o in r)), None)
        if place is None:
            rounds.append(place := {})
        place[path] = value
    return rounds


def differs(kind, config, source, changes, out):
    """What is wrong with the logits of a model with these changes; "" for nothing."""
    for path, value in changes.items():
        config = changed(config, path, value)
    folder = with_config(source, out, config)
    theirs = their_logits(kind, folder)
    if theirs is None:
        return "transformers does not load it"
    ours = our_logits(kind, folder, out.with_name(f"{out.name}.ours"))
    return "" if np.allclose(ours, theirs, rtol=2e-3, atol=2e-3) else "other logits"


def test_every_field_is_used_or_refused(case, tmp_path):
    """All changes that are accepted are compared with transformers in a few models; alone if one fails."""
    kind, config, source = case
    accepted, wrong, refused = [], [], 0
    folder = with_config(source, tmp_path / "changed", config)
    for path, value in cases(config):
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
        if "new_field" in path and not any(path in note for note in plan.notes):
            wrong.append(f"{what}: no note")
        accepted.append((path, value))
    for n, changes in enumerate(merged(accepted)):
        if differs(kind, config, source, changes, tmp_path / f"all{n}"):
            for i, (path, value) in enumerate(changes.items()):
                alone = differs(kind, config, source, {path: value}, tmp_path / f"{n}.{i}")
                wrong += [f"{path} {value}: {alone}"] if alone else []
            wrong.append(f"accepted changes {list(changes)} together")
    assert not wrong, "\n".join(wrong)
    assert len(accepted) > 30 and refused > 20


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
