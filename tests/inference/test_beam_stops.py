"""Stop texts in beam search: the same answer from the API, batch and chat, and where a search ends."""

import json

import pytest
from helpers import tiny
from helpers.scripted import own_programs, scripted_beams

import minigpt4_jax
from minigpt4_jax.cli import batch, chat, common
from minigpt4_jax.cli.chat_session import Session

STOP = "\nUser:"
OPTIONS = {"max_new_tokens": 24, "num_beams": 2, "stop": [STOP], "context": 200}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_random_model(tmp_path_factory.mktemp("beams"), llm_layers=1)
    with own_programs():
        return minigpt4_jax.load(folder, "float32")


@pytest.fixture(scope="module")
def scripts(model):
    with scripted_beams(then=model.tokenizer.eos_id) as made:
        yield made


def spell(model, text):
    """Ids of single bytes, unlike those that the tokenizer makes of the text."""
    return [model.tokenizer._model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def answers(model, monkeypatch, capsys, tmp_path):
    """The answer to a question by the API (with its details), batch, conversation and chat."""
    monkeypatch.setattr(common, "load_model", lambda args: model)
    conversation = model.conversation()
    prompt = conversation.template.render([("what is it", None)])
    (details,) = model.generate_details(None, [prompt], **OPTIONS)
    shared = ["--model=m", "--max_new_tokens=24", "--num_beams=2", f"--stop={STOP}"]
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"prompt": "what is it"}) + "\n")
    assert batch.main([*shared, f"--input={rows}", f"--output={out}"]) == 0
    capsys.readouterr()
    Session(model, chat.parse(shared)).handle("what is it")
    printed, _ = capsys.readouterr()
    texts = {
        details[0].text, json.loads(out.read_text())["response"],
        conversation.ask("what is it", **OPTIONS), printed.removesuffix("\n"),
    }  # fmt: skip
    return details[0], texts


def test_a_search_ends_at_a_stop_text_of_several_tokens(
    model, scripts, monkeypatch, capsys, tmp_path
):
    encode, end = model.tokenizer.encode, model.tokenizer.encode("###")
    best = encode("a dog" + STOP)
    assert len(encode(STOP)) > 2
    scripts.set([*best, *encode("never shown")], [*encode("two cats"), *end])
    details, texts = answers(model, monkeypatch, capsys, tmp_path)
    assert texts == {"a dog"}
    assert details.ids == best and details.finish_reason == "stop"


def test_a_stop_text_that_is_spelled_otherwise_is_cut_off(
    model, scripts, monkeypatch, capsys, tmp_path
):
    """The search does not end at it, as docs/guides/prompts.md says."""
    encode, end = model.tokenizer.encode, model.tokenizer.encode("###")
    best = [*encode("a dog"), *spell(model, STOP)]
    scripts.set([*best, *encode("no"), *end], [*encode("two cats are here"), *end])
    details, texts = answers(model, monkeypatch, capsys, tmp_path)
    assert texts == {"a dog"}
    assert details.ids[: len(best)] == best and len(details.ids) > len(best)
