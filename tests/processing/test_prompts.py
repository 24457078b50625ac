"""Rows and chat prompts, against what the original built (fixtures/rows.json, from its dumps)."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.paths import FIXTURES, REFERENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import IMAGE, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates, sequences
from minigpt4_jax.processing.tokenizer import load_tokenizer

pytestmark = pytest.mark.smoke

CASES = json.loads((FIXTURES / "rows.json").read_text(encoding="utf-8"))
TOKENIZER = load_tokenizer(FIXTURES / "llama_tokenizer")

CONFIGS = {
    "a": ModelConfig(
        vision=VisionConfig(image_size=56, patch_size=14, width=64, depth=3, heads=4, mlp=100),
        qformer=QFormerConfig(queries=8, hidden=48, layers=4, heads=4, vision_width=64),
        max_text_length=20,
    ),
    "b": ModelConfig(
        variant="minigpt4-llama2", vision=VisionConfig(image_size=56), qformer=None,
        merge_patches=4,
        prompt_template="[INST] {} [/INST] ", chat_template="llama2", end_symbol="</s>",
        max_text_length=20,
    ),
    "c": ModelConfig(
        variant="minigpt-v2", vision=VisionConfig(image_size=112), qformer=None,
        merge_patches=4,
        prompt_template="[INST] {} [/INST]", chat_template="minigptv2", end_symbol="</s>",
        max_text_length=40,
    ),
}  # fmt: skip


def build(case):
    config = CONFIGS[case["variant"]]
    if "questions" in case:
        return sequences.build_conversation_row(
            TOKENIZER, config, case["questions"], case["answers"], images=case["images"]
        )
    prompt = case["prompt"]
    if (
        case["variant"] == "c"
    ):  # the model of MiniGPT-v2 puts its instructions into the template itself
        prompt = chat_templates.fill_template(config.prompt_template, prompt)
    return sequences.build_row(TOKENIZER, config, prompt, case["answer"], images=case["images"])


@pytest.mark.parametrize("case", CASES["rows"], ids=lambda c: c["from"])
def test_rows_equal_the_original(case):
    row = build(case)
    assert len(row.tokens) == case["length"]
    assert row.label_positions == case["positions"]
    assert [row.tokens[t] for t in row.label_positions] == case["labels"]
    assert row.tokens[0] == TOKENIZER.bos_id
    config = CONFIGS[case["variant"]]
    assert row.tokens.count(IMAGE) == case["images"] * config.visual_tokens


@pytest.mark.parametrize("case", CASES["rows"], ids=lambda c: c["from"])
def test_row_ids_are_the_embeddings_the_original_fed(case):
    """Every id but the visual ones, read off the original's input embeddings."""
    path = REFERENCE / "dumps" / f"{case['from']}.npz"
    if not path.exists():
        pytest.skip("the reference dumps are not here")
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = safetensors.load_file(REFERENCE / "checkpoints" / "llama" / "model.safetensors")
    table = weights["model.embed_tokens.weight"].astype(np.float32)
    row = build(case)
    number = [c for c in CASES["rows"] if c["from"] == case["from"]].index(case)
    embeds = np.load(path)["inputs_embeds"][number]
    text = [t for t, token in enumerate(row.tokens) if token != IMAGE]
    np.testing.assert_array_equal(embeds[text], table[[row.tokens[t] for t in text]])


@pytest.mark.parametrize("variant", "abc")
def test_chat_equals_the_original(variant):
    config = CONFIGS[variant]
    template = chat_templates.chat_format(config, TOKENIZER)
    turns = []
    for n, turn in enumerate(CASES["chats"][variant]):
        question = chat_templates.with_images(turn["question"], 1) if n == 0 else turn["question"]
        prompt = template.render([*turns, (question, None)])
        assert prompt == turn["prompt"]
        first, second = turn["segment_ids"]
        ids = sequences.prompt_tokens(TOKENIZER, config, prompt, images=1)
        assert ids == first + [IMAGE] * config.visual_tokens + second
        assert chat_templates.clean_answer(config, TOKENIZER.decode(turn["ids"])) == turn["answer"]
        turns.append((question, turn["answer"]))


@pytest.mark.parametrize("variant", "abc")
def test_generation_prompts_equal_the_original(variant):
    for case in CASES["prompts"][variant]:
        ids = sequences.prompt_tokens(TOKENIZER, CONFIGS[variant], case["prompt"], images=1)
        assert len(ids) == case["length"]
        answer = chat_templates.clean_answer(CONFIGS[variant], TOKENIZER.decode(case["ids"]))
        assert answer == case["answer"]


def test_extra_bos_has_a_switch():
    config = CONFIGS["c"]
    text = f"<s>[INST] {chat_templates.IMAGE_SLOT} what [/INST]"
    faithful = sequences.prompt_tokens(TOKENIZER, config, text, images=1)
    assert faithful[:2] == [1, 1]
    assert (
        sequences.prompt_tokens(TOKENIZER, config, text, images=1, extra_bos=False) == faithful[1:]
    )
    turns = [("a", "b"), ("c", None)]
    assert (
        chat_templates.CHAT_TEMPLATES["minigptv2"].render(turns, extra_bos=False)
        == "[INST] a [/INST]b<s>[INST] c [/INST]"
    )


def test_stage_1_row_is_bos_visual_tokens_caption():
    config = dataclasses.replace(CONFIGS["a"], end_symbol="\n")
    row = sequences.build_row(TOKENIZER, config, None, "a dog", images=1)
    assert row.tokens == [1] + [IMAGE] * 8 + TOKENIZER.encode("a dog\n")
    assert row.label_positions == list(range(9, len(row.tokens)))


class Letters:
    """A tokenizer of another family: one id a letter, BOS is `^`, which templates spell."""

    kind, bos_id, eos_id, pad_id, bos, vocab_size = "hf", ord("^"), 0, 0, "^", 128

    def encode(self, text, bos=False):
        return [ord(c) for c in ("^" if bos and text[:1] != "^" else "") + text]


def test_other_families_have_one_bos():
    config = dataclasses.replace(CONFIGS["a"], prompt_template="{}:", end_symbol="$")
    for prompt in ("^ab", "ab"):
        row = sequences.build_row(Letters(), config, prompt, "c", images=0)
        assert row.tokens == Letters().encode("^abc$")
        assert row.label_positions == [3, 4]
        assert sequences.prompt_tokens(Letters(), config, prompt, images=0) == row.tokens[:3]
    row = sequences.build_conversation_row(Letters(), config, ["a", "^b"], ["c", "d"], images=0)
    assert row.tokens == Letters().encode("^a:c$^b:d$")
    assert row.label_positions == [3, 4, 8, 9]
    without = Letters()
    without.bos_id, without.bos = None, ""
    row = sequences.build_row(without, config, None, "c", images=1)
    assert row.tokens == [IMAGE] * 8 + Letters().encode("c$")
    row = sequences.build_conversation_row(without, config, ["a", "b"], ["c", "d"], images=0)
    assert row.tokens == Letters().encode("a:c$b:d$")


def test_several_images():
    config = CONFIGS["a"]
    text = f"###Human: {chat_templates.IMAGE_SLOT}{chat_templates.IMAGE_SLOT} which? ###Assistant: "
    row = sequences.build_row(TOKENIZER, config, text, "a", images=2)
    middle = TOKENIZER.encode("</Img><Img>")
    start = row.tokens.index(IMAGE)
    assert row.tokens[start : start + 16 + len(middle)] == [IMAGE] * 8 + middle + [IMAGE] * 8
    assert (
        chat_templates.with_images("which?", 2)
        == f"{chat_templates.IMAGE_SLOT}{chat_templates.IMAGE_SLOT} which?"
    )
    assert (
        chat_templates.with_images(f"in {chat_templates.IMAGE_SLOT}", 1)
        == f"in {chat_templates.IMAGE_SLOT}"
    )


def test_prompt_is_cut_to_the_context_in_training_alone():
    config = dataclasses.replace(CONFIGS["a"], max_context=5)
    row = sequences.build_row(TOKENIZER, config, "a a a a a a a a", "a", images=0)
    assert row.tokens[:6] == [1, *TOKENIZER.encode("a a a a a")]
    assert row.label_positions[0] == 6
    assert len(sequences.prompt_tokens(TOKENIZER, config, "a a a a a a a a", images=0)) == 9


def test_cut_left_counts_lost_visual_tokens():
    tokens = [1, 5, IMAGE, IMAGE, IMAGE, 6, 7]
    assert sequences.cut_left(tokens, 3, context=10) == (tokens, 0)
    assert sequences.cut_left(tokens, 6, context=10) == ([IMAGE, IMAGE, 6, 7], 1)
    with pytest.raises(UserError, match="max_new_tokens"):
        sequences.cut_left(tokens, 10, context=10)


def test_stop_sequences():
    assert sequences.stop_sequences(TOKENIZER, "###") == [[2], [379], [377]]
    assert sequences.stop_sequences(TOKENIZER, "</s>") == [[2]]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("hello", 1, "has 0 <ImageHere> and 1 images"),
        (chat_templates.IMAGE_SLOT, 0, "has 1 <ImageHere> and 0 images"),
        (chat_templates.IMAGE_SLOT, 2, "has 1 <ImageHere> and 2 images"),
        ("", 0, "prompt is empty"),
        (" \n", 1, "prompt is empty"),
        (None, 0, "needs a prompt"),
    ],
)
def test_prompt_errors(prompt, images, message):
    with pytest.raises(UserError, match=message):
        sequences.build_row(TOKENIZER, CONFIGS["a"], prompt, "a", images=images)


def test_conversation_errors():
    config = CONFIGS["c"]
    with pytest.raises(UserError, match="2 questions and 1 answers"):
        sequences.build_conversation_row(TOKENIZER, config, ["a", "b"], ["c"], images=0)
    with pytest.raises(UserError, match="has 1 <ImageHere> and 2 images"):
        sequences.build_conversation_row(
            TOKENIZER, config, ["a", chat_templates.IMAGE_SLOT], ["c", "d"], images=2
        )


def test_an_image_of_a_later_question_stands_where_its_mark_is():
    config = dataclasses.replace(CONFIGS["c"], max_text_length=500)
    text = sequences.build_conversation_row(TOKENIZER, config, ["a", "b"], ["c", "d"], images=0)
    question = f"{chat_templates.IMAGE_SLOT}b"
    row = sequences.build_conversation_row(TOKENIZER, config, ["a", question], ["c", "d"], images=1)
    start = row.tokens.index(IMAGE)
    assert row.tokens[start : start + config.visual_tokens] == [IMAGE] * config.visual_tokens
    assert IMAGE not in row.tokens[start + config.visual_tokens :]
    labels = [[r.tokens[i] for i in r.label_positions] for r in (row, text)]
    assert labels[0] == labels[1]
    assert row.label_positions[0] == text.label_positions[0] < start < row.label_positions[-1]


def test_unknown_chat_template_lists_the_known():
    with pytest.raises(UserError, match=r"'alpaca'.*vicuna0.*chatml"):
        chat_templates.chat_format(CONFIGS["a"], TOKENIZER, "alpaca")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
                   "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n"
                   "<|im_start|>assistant\n"),
        ("mistral", "[INST] S\n\nq [/INST] a</s>[INST] r [/INST] "),
        ("training", "###Human: q ###Assistant: a######Human: r ###Assistant: "),
    ],
)  # fmt: skip
def test_templates_of_other_models(name, expected):
    config = dataclasses.replace(CONFIGS["a"], chat_template=name)
    template = chat_templates.chat_format(config, TOKENIZER)
    system = "" if name == "training" else "S"
    assert template.render([("q", "a"), ("r", None)], system=system) == expected


def test_messages_may_hold_braces():
    text = chat_templates.CHAT_TEMPLATES["minigptv2"].render([("{<1>} {}", "{}"), ("{}", None)])
    assert text == "<s>[INST] {<1>} {} [/INST]{}<s>[INST] {} [/INST]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" a dog ###Human: x", "a dog"),
        ("x ###", "x"),
        ("[INST] q [/INST] a dog</s> tail", "a dog"),
        ("Human: q Assistant: one Assistant: two", "two"),
        ("<s>a", "a"),
        ("", ""),
    ],
)
def test_clean_answer(text, shown):
    assert all(chat_templates.clean_answer(config, text) == shown for config in CONFIGS.values())


@pytest.mark.parametrize(
    "text", ["# Cake ### Steps", "write </s> to close", "Robot Assistant: ready", "[/INST] x <s>"]
)
def test_answers_of_other_formats_keep_what_looks_like_marks(text):
    for name, tokenizer in (
        ("chatml", CONFIGS["a"].tokenizer),
        ("tokenizer", dataclasses.replace(CONFIGS["a"].tokenizer, chat_template=True)),
        ("vicuna0", dataclasses.replace(CONFIGS["a"].tokenizer, chat_template=True)),
    ):
        config = dataclasses.replace(
            CONFIGS["a"], chat_template=name, end_symbol="<|im_end|>", tokenizer=tokenizer
        )
        assert chat_templates.clean_answer(config, f" {text} ") == text
        assert chat_templates.answer_ends(config) == ()


texts = st.text(alphabet="abc {}#<s>/.\n$", max_size=40)


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), texts, st.sampled_from("abc"), st.integers(1, 50))
def test_row_properties(segments, answer, variant, limit):
    """P slots an image; the answer is the contiguous end of the row, within its limit."""
    config = dataclasses.replace(CONFIGS[variant], max_text_length=limit)
    prompt = "q" + chat_templates.IMAGE_TAG.join(segments)
    images = len(segments) - 1
    row = sequences.build_row(TOKENIZER, config, prompt, answer, images=images)
    wanted = TOKENIZER.encode(answer + config.end_symbol)
    assert row.tokens.count(IMAGE) == images * config.visual_tokens
    assert row.label_positions == list(
        range(len(row.tokens) - len(row.label_positions), len(row.tokens))
    )
    assert [row.tokens[t] for t in row.label_positions] == wanted[:limit]
    assert row.cut == (len(wanted) > limit)
    assert row.label_positions[0] >= 1
    shown = sequences.prompt_tokens(TOKENIZER, config, prompt, images=images)
    assert (
        row.tokens[: row.label_positions[0]] == shown
    )  # what is asked at inference is what was trained


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(1, 60))
def test_conversation_properties(turns, limit):
    config = dataclasses.replace(CONFIGS["c"], max_text_length=limit)
    questions, answers = zip(*turns, strict=True)
    row = sequences.build_conversation_row(TOKENIZER, config, questions, answers, images=0)
    first = sequences.build_row(
        TOKENIZER,
        config,
        chat_templates.fill_template(config.prompt_template, questions[0]),
        answers[0],
        images=0,
    )
    assert row.tokens[: len(first.tokens)] == first.tokens
    assert row.label_positions[: len(first.label_positions)] == first.label_positions
    assert row.label_positions == sorted(set(row.label_positions))
    assert row.label_positions[-1] < len(row.tokens)
    whole = [i for a in answers for i in TOKENIZER.encode(a + config.end_symbol)]
    assert [row.tokens[t] for t in row.label_positions] == whole[: len(row.label_positions)]
