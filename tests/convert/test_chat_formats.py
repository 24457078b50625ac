"""A converted model's prompts are those of its language model's own chat template, from any file format."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import chat_families
from helpers.chat_families import DIALOGUES, FAMILIES
from helpers.gguf_files import write_gguf
from helpers.paths import TOKENIZER
from helpers.released_files import llm_config, llm_state, save_hf

from convert.build import build
from convert.build_plan import BuildRequest, make_plan
from convert.end_tokens import gguf_end_ids
from convert.formats.gguf import Gguf
from convert.formats.gguf_tokenizer import tokenizer_files
from minigpt4_jax import load
from minigpt4_jax.checkpoint.model_directory import read_config, tokenizer_dir
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import RenderedPrompt, chat_format
from minigpt4_jax.processing.sequences import build_conversation_row, prompt_tokens
from minigpt4_jax.processing.tokenizer import load_tokenizer

SENTENCEPIECE = ("zephyr", "qwen2", "mistral v1")


def language_model(folder, tokenizer, vocab, model_type):
    """A Hugging Face directory and a GGUF file of the same language model."""
    config = llm_config(vocab_size=vocab, model_type=model_type)
    state = llm_state(config)
    save_hf(folder / "hf", config, state, tokenizer)
    return folder / "hf", write_gguf(
        folder / "model.gguf", config, state, arch=model_type, tokenizer=tokenizer
    )


def converted(llm, out, *settings, variant="minigpt4-vicuna"):
    plan = build(BuildRequest(variant, llm, out, settings=list(settings)))
    config = read_config(out)
    return config, load_tokenizer(tokenizer_dir(out), config.tokenizer.kind), plan.notes


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "bpe") for name in FAMILIES), *((name, "sentencepiece") for name in SENTENCEPIECE)],
)
def test_prompts_are_those_of_transformers_from_a_directory_and_from_gguf(tmp_path, name, kind):
    from transformers import AutoTokenizer

    family = FAMILIES[name]
    write = {
        "bpe": chat_families.write_tokenizer,
        "sentencepiece": chat_families.write_sentencepiece_tokenizer,
    }[kind]
    folder = write(tmp_path / "tokenizer", family)
    theirs = AutoTokenizer.from_pretrained(str(folder))
    files = language_model(tmp_path, folder, len(theirs), "llama")
    for llm in files:
        config, ours, notes = converted(llm, tmp_path / f"from {llm.name}")
        assert any("own chat template" in note for note in notes), notes
        assert config.tokenizer.chat_template and config.end_symbol == family.end_symbol
        assert (config.tokenizer.bos_id, config.tokenizer.eos_id) == (
            theirs.bos_token_id, theirs.eos_token_id,
        )  # fmt: skip
        template = chat_format(config, ours)
        for system, turns in DIALOGUES.values():
            if system and not family.takes_system:
                continue
            text = theirs.apply_chat_template(
                chat_families.messages(system, turns), tokenize=False, add_generation_prompt=True
            )
            assert template.render(turns, system=system) == text
            if "<ImageHere>" not in text:
                ids = prompt_tokens(ours, config, RenderedPrompt(text), images=0)
                assert ids == theirs.encode(text, add_special_tokens=False)
        row = build_conversation_row(ours, config, ["Hi"], ["A cat"], images=0)
        text = theirs.apply_chat_template(
            chat_families.messages(None, [("Hi", "A cat")]), tokenize=False
        )
        if name != "deepseek r1":  # whose generation prompt has more than its history
            ids = theirs.encode(text, add_special_tokens=False)
            assert row.tokens == ids[: len(row.tokens)]
        bare = prompt_tokens(ours, config, "A cat", images=0)
        assert bare == theirs.encode("A cat")


def test_released_variants_keep_their_formats(tmp_path):
    """Llama 2's and Vicuna's own templates do not replace the formats that the variants were trained with."""
    llama2 = chat_families.write_sentencepiece_tokenizer(tmp_path / "t", FAMILIES["llama2"])
    llm, _ = language_model(tmp_path, llama2, 785, "llama")
    config, tokenizer, _ = converted(llm, tmp_path / "llama2", variant="minigpt4-llama2")
    assert (config.chat_template, config.prompt_template) == ("llama2", "[INST] {} [/INST] ")
    assert tokenizer.kind == "sentencepiece" and not config.tokenizer.chat_template
    vicuna = FAMILIES["llama2"]._replace(
        template="{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}"
        "{{ m.content + ' ' }}{% endfor %}"
    )
    (tmp_path / "v").mkdir()
    folder = chat_families.write_sentencepiece_tokenizer(tmp_path / "v" / "t", vicuna)
    llm, _ = language_model(tmp_path / "v", folder, 785, "llama")
    config, _, notes = converted(llm, tmp_path / "vicuna")
    assert (config.chat_template, config.end_symbol) == ("vicuna0", "###")
    assert any("--set chat_template=tokenizer uses it" in note for note in notes)
    c = llm_config(
        vocab_size=785, model_type="mistral"
    )  # another model with a template like Vicuna's
    save_hf(tmp_path / "mistral", c, llm_state(c), folder)
    plan = make_plan(BuildRequest("minigpt4-vicuna", tmp_path / "mistral", tmp_path / "m"))
    assert plan.config.tokenizer.chat_template and plan.config.prompt_template == "USER: {} "


@pytest.mark.parametrize("variant", ["minigpt4-llama2", "minigpt-v2"])
def test_other_language_models_bring_their_template_to_every_variant(tmp_path, variant):
    folder = chat_families.write_tokenizer(tmp_path / "t", FAMILIES["qwen3"])
    c = llm_config(vocab_size=401)
    save_hf(tmp_path / "hf", c, llm_state(c), folder)
    plan = make_plan(BuildRequest(variant, tmp_path / "hf", tmp_path / "m"))
    assert plan.config.tokenizer.chat_template and plan.config.end_symbol == "<|im_end|>"


def test_set_chooses_another_format(tmp_path):
    folder = chat_families.write_tokenizer(tmp_path / "t", FAMILIES["smollm2"])
    llm, _ = language_model(tmp_path, folder, 400, "llama")
    config, _, _ = converted(llm, tmp_path / "a", "chat_template=chatml")
    assert not config.tokenizer.chat_template
    assert config.prompt_template == "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert config.end_symbol == "<|im_end|>"
    config, _, _ = converted(llm, tmp_path / "b", "chat_template=vicuna0")
    assert (config.prompt_template, config.end_symbol) == ("###Human: {} ###Assistant: ", "###")
    config, _, _ = converted(llm, tmp_path / "c", "prompt_template=Q: {} A:", "end_symbol=.")
    assert (config.prompt_template, config.end_symbol) == ("Q: {} A:", ".")
    assert not config.tokenizer.chat_template


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "cannot render"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for m in messages %}{{ m.content }}", "cannot render"),
        ("always the same", "does not write the question"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, template, cause):
    family = FAMILIES["qwen2"]._replace(template=template)
    folder = chat_families.write_tokenizer(tmp_path / "t", family)
    llm, _ = language_model(tmp_path, folder, 400, "llama")
    config, _, notes = converted(llm, tmp_path / "m")
    (note,) = [note for note in notes if "template" in note]
    assert "cannot be used" in note and cause in note and "\n" not in note
    assert config.chat_template == "vicuna0" and not config.tokenizer.chat_template


def test_a_model_without_template_says_which_format_it_gets(tmp_path):
    family = FAMILIES["qwen2"]._replace(template="")
    folder = chat_families.write_tokenizer(tmp_path / "t", family)
    for model_type in ("mistral", "llama"):
        (tmp_path / model_type).mkdir()
        llm, _ = language_model(tmp_path / model_type, folder, 400, model_type)
        config, _, notes = converted(llm, tmp_path / model_type / "m")
        assert any("no chat template" in n and "vicuna0" in n for n in notes)
    assert config.prompt_template == "###Human: {} ###Assistant: "


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("default", "tool_use"), "tokenizer"), (("rag", "tool_use"), "vicuna0")],
)
def test_named_templates(tmp_path, names, expected):
    folder = chat_families.write_tokenizer(tmp_path / "t", FAMILIES["qwen2"])
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": template} for name in names]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    save_hf(tmp_path / "hf", c := llm_config(vocab_size=400), llm_state(c), folder)
    plan = make_plan(BuildRequest("minigpt4-vicuna", tmp_path / "hf", tmp_path / "m"))
    assert plan.config.chat_template == expected
    (note,) = [note for note in plan.notes if "template" in note]
    assert expected == "tokenizer" or "named rag, tool_use, but none named default" in note


def test_the_template_of_a_multimodal_models_processor(tmp_path):
    folder = chat_families.write_tokenizer(tmp_path / "t", FAMILIES["zephyr"])
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    llm, _ = language_model(tmp_path, folder, 400, "llama")
    config, tokenizer, _ = converted(llm, tmp_path / "m")
    assert (
        chat_format(config, tokenizer).render([("Hi", None)]) == "<|user|>\nHi</s>\n<|assistant|>\n"
    )


def test_a_sentencepiece_gguf_keeps_its_settings(tmp_path):
    from transformers import AutoTokenizer

    folder = chat_families.write_sentencepiece_tokenizer(tmp_path / "t", FAMILIES["qwen2"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"add_prefix_space": False, "add_bos_token": False}
    settings["added_tokens_decoder"]["786"]["special"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(str(folder))
    _, file = language_model(tmp_path, folder, len(theirs), "llama")
    for name, content in tokenizer_files(Gguf(file)).items():
        (tmp_path / name).write_bytes(content)
    ours = load_tokenizer(tmp_path, "hf")
    for text in (
        "A cat",
        " two  spaces",
        f"a {theirs.convert_ids_to_tokens(786)} b<|im_start|>user",
    ):
        assert ours.encode(text) == theirs.encode(text)
    ids = theirs.encode("A cat<|im_start|><|im_end|>")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("said", [True, False, None])
def test_a_byte_level_gguf_adds_bos_where_its_directory_does(tmp_path, said):
    folder = chat_families.write_tokenizer(tmp_path / "t", FAMILIES["llama3"])
    _, file = language_model(tmp_path, folder, 400, "llama")
    source = Gguf(file)
    for name, value in (("pre", "llama-bpe"), ("add_bos_token", said)):
        del source._values[f"tokenizer.ggml.{name}"]
        if value is not None:
            field = SimpleNamespace(contents=lambda value=value: value)
            source._values[f"tokenizer.ggml.{name}"] = field
    for file_name, content in tokenizer_files(source).items():
        (tmp_path / file_name).write_bytes(content)
    tokenizer = load_tokenizer(tmp_path, "hf")
    assert tokenizer.adds_bos == (said is not False)  # absent: as llama.cpp
    assert tokenizer.bos_id not in tokenizer.encode("a")


@pytest.fixture
def llama3(tmp_path):
    """A Hugging Face directory and a GGUF file whose tokenizer is like Llama 3's."""
    folder = chat_families.write_tokenizer(tmp_path / "t", FAMILIES["llama3"])
    return language_model(tmp_path, folder, 400, "llama")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([1, 2, "eos"], 3, (1, 2)),
        (4, None, (4,)),
        (None, None, ()),
        ("eos", 3, ()),
        ("none", [4, 5], (4, 5)),
    ],
)
def test_end_tokens_of_a_directory_as_transformers_reads_them(
    llama3, tmp_path, generation, config, expected
):
    """generation: eos_token_id of generation_config.json; "none": there is no such file."""
    hf, _ = llama3
    eos = load_tokenizer(hf, "hf").eos_id
    document = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(document | {"eos_token_id": config}))
    if generation != "none":
        values = generation if isinstance(generation, list) else [generation]
        ids = [eos if i == "eos" else i for i in values]
        ids = ids if isinstance(generation, list) else ids[0]
        (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    plan = make_plan(BuildRequest("minigpt4-vicuna", hf, tmp_path / "m"))
    assert plan.config.tokenizer.end_ids == expected
    assert any("an answer also ends at" in note for note in plan.notes) == bool(expected)
    chosen = ["chat_template=vicuna0"]  # another format has stops of its own
    plan = make_plan(BuildRequest("minigpt4-vicuna", hf, tmp_path / "m", settings=chosen))
    assert plan.config.tokenizer.end_ids == ()


def test_end_tokens_that_cannot_be_used_are_named(llama3, tmp_path):
    hf, _ = llama3
    path = hf / "generation_config.json"
    path.write_text('{"eos_token_id": [1, 4000]}')
    plan = make_plan(BuildRequest("minigpt4-vicuna", hf, tmp_path / "m"))
    assert plan.config.tokenizer.end_ids == (1,)
    assert any("end tokens 4000" in note and "not used" in note for note in plan.notes)
    path.write_text('{"eos_token_id": "<|eot_id|>"}')
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id '<\|eot_id\|>'"):
        make_plan(BuildRequest("minigpt4-vicuna", hf, tmp_path / "m"))


def test_end_tokens_of_a_gguf_file(llama3, tmp_path):
    _, file = llama3
    source = Gguf(file)
    ends = {"eot_token_id": 5, "eom_token_id": 6}
    for name, value in ends.items():
        source._values[f"tokenizer.ggml.{name}"] = SimpleNamespace(
            contents=lambda value=value: value
        )
    assert gguf_end_ids(source) == (5, 6)


def test_every_way_to_generate_ends_at_an_end_token(tmp_path):
    folder = chat_families.write_tokenizer(tmp_path / "t", FAMILIES["llama3"])
    llm, _ = language_model(tmp_path, folder, 400, "llama")
    build(BuildRequest("minigpt4-vicuna", llm, tmp_path / "m"))
    model = load(tmp_path / "m", "float32")
    options = {"template": True, "max_new_tokens": 12}
    uncut = model.generate_details(None, ["a"], **options)[0][0].ids
    end = uncut[5]
    cut = uncut[: uncut.index(end) + 1]
    ends = replace(model.config.tokenizer, end_ids=(end,))
    model.config = replace(model.config, tokenizer=ends)
    for beams in (1, 2):
        ((output,),) = model.generate_details(None, ["a"], num_beams=beams, **options)
        assert end not in output.ids[:-1]
        assert end not in output.ids or output.finish_reason == "stop"
        assert beams > 1 or output.ids == cut
    text = model.generate(None, ["a"], **options)[0]
    assert "".join(model.stream(None, "a", **options)) == text
    assert model.conversation().ask("a", max_new_tokens=12) == text


def test_added_tokens_that_only_tokenizer_json_lists_are_not_split(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((TOKENIZER / "tokenizer.model").read_bytes())
    entry = {"id": 785, "content": "<|extra|>", "special": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [entry]}))
    tokenizer = load_tokenizer(tmp_path, "sentencepiece")
    assert 785 in tokenizer.encode("a <|extra|> b") and tokenizer.vocab_size == 786
