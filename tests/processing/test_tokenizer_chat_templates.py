"""Prompts and training rows by a tokenizer's own chat template: the text and ids of transformers."""

import dataclasses
import warnings

import pytest
from helpers import chat_families
from helpers.chat_families import DIALOGUES, FAMILIES, UNUSUAL
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import IMAGE, ModelConfig, QFormerConfig, TokenizerConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import (
    IMAGE_TAG,
    RenderedPrompt,
    TokenizerChatTemplate,
    chat_format,
)
from minigpt4_jax.processing.sequences import (
    build_conversation_row,
    build_row,
    prompt_tokens,
    training_prompt,
)
from minigpt4_jax.processing.tokenizer import HfTokenizer

WITH_SENTENCEPIECE = ("llama2", "mistral v1", "zephyr", "qwen2")
CONFIG = ModelConfig(
    qformer=QFormerConfig(queries=3),
    tokenizer=TokenizerConfig("hf", chat_template=True),
    max_text_length=1000,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> (our tokenizer, transformers' own, configuration, family)."""
    from transformers import AutoTokenizer

    found = {}
    for kind, write in (
        ("", chat_families.write_tokenizer),
        (" sentencepiece", chat_families.write_sentencepiece_tokenizer),
    ):
        for name, family in (FAMILIES | UNUSUAL).items():
            if kind and name not in WITH_SENTENCEPIECE:
                continue
            folder = write(tmp_path_factory.mktemp("tokenizer"), family)
            ours = HfTokenizer(folder)
            template = chat_format(CONFIG, ours)
            assert isinstance(template, TokenizerChatTemplate)
            config = dataclasses.replace(CONFIG, end_symbol=template.end_symbol)
            found[name + kind] = ours, AutoTokenizer.from_pretrained(str(folder)), config, family
    return found


NAMES = [*FAMILIES, *UNUSUAL, *(f"{name} sentencepiece" for name in WITH_SENTENCEPIECE)]


def expected_ids(theirs, text):
    """transformers' ids of a rendered text, with P ids IMAGE for each image."""
    ids = []
    for n, segment in enumerate(text.split(IMAGE_TAG)):
        ids += [IMAGE] * CONFIG.visual_tokens if n else []
        ids += theirs.encode(segment, add_special_tokens=False) if segment else []
    return ids


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", NAMES)
def test_prompts_have_the_text_and_ids_of_transformers(models, name, dialogue):
    ours, theirs, config, family = models[name]
    system, turns = DIALOGUES[dialogue]
    template = chat_format(config, ours)
    if system and not family.takes_system:
        with pytest.raises(UserError, match="System role not supported"):
            template.render(turns, system=system)
        return
    messages = chat_families.messages(system, turns)
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(turns, system=system) == text
    images = text.count(IMAGE_TAG)
    ids = prompt_tokens(ours, config, RenderedPrompt(text), images=images)
    assert ids == expected_ids(theirs, text)
    if not images:
        encoded = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        assert ids == encoded["input_ids"]


@pytest.mark.parametrize("name", NAMES)
def test_end_symbols(models, name):
    _, _, config, family = models[name]
    assert config.end_symbol == family.end_symbol


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", NAMES)
def test_training_rows_are_rendered_dialogues_whose_answers_are_labelled(models, name, dialogue):
    ours, theirs, config, family = models[name]
    system, turns = DIALOGUES[dialogue]
    complete = [*turns[:-1], (turns[-1][0], "A dog, là.")]
    questions, answers = zip(*complete, strict=True)
    images = sum(q.count(IMAGE_TAG) for q in questions)
    if system and not family.takes_system:
        with pytest.raises(UserError, match="system message, for which the model's chat template"):
            build_conversation_row(ours, config, questions, answers, images=0, system=system)
        return
    row = build_conversation_row(
        ours, config, questions, answers, images=images, system=system or ""
    )
    prompt = theirs.apply_chat_template(
        chat_families.messages(system, turns), tokenize=False, add_generation_prompt=True
    )
    whole = theirs.apply_chat_template(chat_families.messages(system, complete), tokenize=False)
    if whole.startswith(prompt) and config.end_symbol in whole[len(prompt) :]:
        assert row.tokens == expected_ids(theirs, whole)[: len(row.tokens)]
    else:  # the template prompts for an answer by more than it writes before it, or does not close it
        answered = whole.rstrip() if whole.startswith(prompt) else prompt + answers[-1]
        assert row.tokens == expected_ids(theirs, answered + config.end_symbol)
    # The labelled text: every answer with its end symbol, and nothing of the questions.
    runs = []
    for before, at in zip([-2, *row.label_positions], row.label_positions, strict=False):
        runs += [[]] if at != before + 1 else []
        runs[-1].append(row.tokens[at])
    labelled = [ours.decode(run, skip_special=False).strip() for run in runs]
    earlier = config.end_symbol if family.history_end is None else family.history_end
    ends = [*(earlier for _ in answers[1:]), config.end_symbol]
    expected = [answer.strip() + end for answer, end in zip(answers, ends, strict=True)]
    assert [text.replace(" ", "") for text in labelled] == [
        text.replace(" ", "") for text in expected if text
    ]
    assert row.label_positions[-1] == len(row.tokens) - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_single_question_is_trained_by_the_prompt_that_it_is_asked_by(models, name):
    ours, theirs, config, _ = models[name]
    prompt = training_prompt(ours, config, f"{IMAGE_TAG} What is it?")
    ids = prompt_tokens(ours, config, RenderedPrompt(prompt), images=1)
    row = build_conversation_row(ours, config, [f"{IMAGE_TAG} What is it?"], ["A cat"], images=1)
    assert row.tokens[: len(ids)] == ids == expected_ids(theirs, prompt)
    assert row.label_positions[0] == len(ids)
    # Text that no template wrote gets what the tokenizer adds.
    bare = theirs.encode("hello")
    assert prompt_tokens(ours, config, "hello", images=0) == bare
    stage1 = build_row(ours, config, None, "a cat", images=1)
    assert stage1.tokens[0] == (bare[0] if ours.adds_bos else IMAGE)


def test_a_question_whose_words_are_in_the_system_message(models):
    """DeepSeek R1's template prompts for an answer by more than it writes before earlier answers."""
    ours, _, config, _ = models["deepseek r1"]
    row = build_conversation_row(
        ours, config, ["red", "now"], ["A cat", "A dog"], images=0, system="Say red, or red."
    )
    text = ours.decode([row.tokens[at] for at in row.label_positions], skip_special=False)
    assert text.replace(" ", "") == f"Acat{config.end_symbol}Adog{config.end_symbol}"
    assert "Say red, or red." in training_prompt(ours, config, "red", system="Say red, or red.")


def test_a_template_that_drops_system_messages_refuses_them(models, tmp_path):
    family = FAMILIES["qwen2"]._replace(
        template="{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    )
    ours = HfTokenizer(chat_families.write_tokenizer(tmp_path / "t", family))
    template = chat_format(CONFIG, ours)
    assert template.render([("Hi", None)]) == "Hi<|im_end|>"
    with pytest.raises(UserError, match="has no place for a system message"):
        template.render([("Hi", None)], system="Be brief.")


def test_a_template_that_reads_lists_of_parts_gets_them(tmp_path):
    from transformers import AutoTokenizer

    family = FAMILIES["qwen2"]._replace(
        template="{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    )
    folder = chat_families.write_tokenizer(tmp_path / "t", family)
    template = chat_format(CONFIG, HfTokenizer(folder))
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("system", "Be brief."), ("user", "Hi"))
    ]
    theirs = AutoTokenizer.from_pretrained(str(folder))
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert template.render([("Hi", None)], system="Be brief.") == expected


messages_text = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12)


@pytest.mark.parametrize("name", ["qwen2", "llama3", "mistral nemo", "zephyr sentencepiece"])
def test_any_dialogue(models, name):
    ours, theirs, config, _ = models[name]

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.lists(st.tuples(messages_text, messages_text), min_size=1, max_size=3))
    def check(turns):
        questions, answers = zip(*turns, strict=True)
        row = build_conversation_row(ours, config, questions, answers, images=0)
        whole = theirs.apply_chat_template(chat_families.messages(None, turns), tokenize=False)
        assert row.tokens == expected_ids(theirs, whole)[: len(row.tokens)]
        assert row.label_positions and row.label_positions[-1] == len(row.tokens) - 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
