"""A converted BLIP-2 or InstructBLIP begins and ends an answer where transformers' generate does."""

import copy
import json

import pytest
from helpers import blip2_reference as reference
from helpers.blip2_directories import KINDS, REMOVED, changed, config_of, with_config, write_tensors
from helpers.blip2_reference import NEEDS_BLIP2

from convert.blip2_plan import make_blip2_plan
from convert.build_plan import BuildRequest
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.preprocess import prepare_prompts
from minigpt4_jax.processing.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")
FAR = 10**6  # no token of any of the tokenizers
GOES_ON = "transformers goes on there"


@pytest.fixture(scope="module", params=["opt", "flant5", "instruct"])
def case(request, tmp_path_factory):
    """(kind, its config.json, a directory with everything else, the id of the variant's own end)."""
    kind, folder = request.param, tmp_path_factory.mktemp("blip2")
    config = config_of(kind)
    write_tensors(kind, config, folder)
    tokenizer = load_tokenizer(folder, "sentencepiece" if kind == "instruct" else "hf")
    (own,) = tokenizer.encode("\n") if kind == "opt" else [tokenizer.eos_id]
    return kind, config, folder, own


def plan_of(kind, folder):
    return make_blip2_plan(BuildRequest(KINDS[kind][0], None, folder / "m", checkpoint=folder))


def stops(folder, config):
    """The tokens at which an answer of our model ends."""
    tokenizer = load_tokenizer(folder, config.tokenizer.kind)
    (prepared,) = prepare_prompts(
        tokenizer, config, None, ["a"], GenerationConfig(max_new_tokens=4)
    )
    return {ids[0] for ids in prepared.request.stop_sequences if len(ids) == 1}


def their_stops(generation):
    """Those of transformers' generation configuration."""
    ids = generation.eos_token_id
    return set(ids if isinstance(ids, list) else [] if ids is None else [ids])


def their_language_model(kind, config):
    config = transformers.AutoConfig.for_model(**copy.deepcopy(config))
    return getattr(transformers, KINDS[kind][1])(config).language_model


@pytest.mark.parametrize(
    "value",
    ["own", REMOVED, ["own", 7, 0, 7], [7, 1, 2], 7, None, ["own", FAR]],
    ids=lambda value: "removed" if value is REMOVED else str(value),
)
def test_an_answer_ends_where_transformers_ends_it(case, tmp_path, value):
    """value: of text_config.eos_token_id; "own": the token with which answers end in training."""
    kind, config, source, own = case
    if value == "own" or isinstance(value, list):
        value = [own if i == "own" else i for i in value] if value != "own" else own
    config = changed(config, "text_config.eos_token_id", value)
    folder = with_config(source, tmp_path / "hf", config)
    plan = plan_of(kind, folder)
    theirs = their_stops(their_language_model(kind, config).generation_config)
    found = stops(folder, plan.config)
    assert found >= theirs - {FAR} and own in found
    assert found - theirs <= stops(
        folder, plan_of(kind, with_own(source, tmp_path, config, own)).config
    )
    assert any(GOES_ON in note for note in plan.notes) == (own not in theirs)
    assert any("also ends at" in note for note in plan.notes) == bool(theirs - {own, FAR})
    assert any(f"end tokens {FAR}" in note for note in plan.notes) == (FAR in theirs)


def with_own(source, tmp_path, config, own):
    return with_config(source, tmp_path / "own", changed(config, "text_config.eos_token_id", own))


@pytest.mark.parametrize("value", ["</s>", True, 2.5, [1, "a"], {"a": 1}])
def test_an_end_that_is_no_token_is_named(case, tmp_path, value):
    kind, config, source, _ = case
    config = changed(config, "text_config.eos_token_id", value)
    folder = with_config(source, tmp_path / "hf", config)
    with pytest.raises(UserError, match=r"config\.json.*eos_token_id") as error:
        plan_of(kind, folder)
    assert "\n" not in str(error.value)


def test_generation_config_json_is_not_used_by_transformers_and_said(case, tmp_path):
    """`generate` of these models asks the language model within, which has text_config alone."""
    kind, config, source, own = case
    folder = with_config(source, tmp_path / "hf", changed(config, "text_config.eos_token_id", own))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [own, 7]}))
    model = getattr(transformers, KINDS[kind][1]).from_pretrained(folder)
    assert their_stops(model.language_model.generation_config) == {own}
    plan = plan_of(kind, folder)
    assert plan.config.tokenizer.end_ids == ()
    assert any("eos_token_id 7: not used, as in transformers" in note for note in plan.notes)


def their_start(model):
    """What transformers' generate begins an answer with."""
    generation = copy.deepcopy(model.generation_config)
    model._prepare_special_tokens(generation, device="cpu")
    return generation._decoder_start_token_tensor.item()


@pytest.mark.parametrize("case", ["flant5"], indirect=True)
@pytest.mark.parametrize(
    "changes", [{"decoder_start_token_id": 5}, {"decoder_start_token_id": REMOVED, "bos_token_id": 6},
                {"decoder_start_token_id": None, "bos_token_id": 6, "pad_token_id": 3},
                {"decoder_start_token_id": 0, "bos_token_id": 6, "pad_token_id": 3}],
)  # fmt: skip
def test_an_answer_of_flant5_begins_as_in_transformers(case, tmp_path, changes):
    kind, config, source, _ = case
    for name, value in changes.items():
        config = changed(config, f"text_config.{name}", value)
    plan = plan_of(kind, with_config(source, tmp_path / "hf", config))
    assert plan.config.llm.start_id == their_start(their_language_model(kind, config))


@NEEDS_BLIP2
@pytest.mark.parametrize(
    "generation",
    [{"eos_token_id": [1, 7], "decoder_start_token_id": 5}, {"eos_token_id": 7, "bos_token_id": 6}, None],
)  # fmt: skip
def test_the_files_of_flant5_itself_beside_a_file_of_lavis(tmp_path, generation):
    """generation: of generation_config.json, which transformers takes before config.json."""
    source = reference.CHECKPOINTS / "flan-t5"
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [1, 9]}
    folder = with_config(source, tmp_path / "t5", config)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    request = {"llm": folder, "checkpoint": reference.CHECKPOINTS / "blip2_caption_flant5.pth"}
    plan = make_blip2_plan(
        BuildRequest("blip2-flant5", out=tmp_path / "m", settings=reference.HEADS, **request)
    )
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    expected = their_stops(theirs.generation_config)
    assert {1, *plan.config.tokenizer.end_ids} == {1, *expected}
    assert any(GOES_ON in note for note in plan.notes) == (1 not in expected)
    assert plan.config.llm.start_id == their_start(theirs)
