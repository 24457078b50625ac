"""Conversations, texts and beam search against what the original PyTorch code generated."""

import jax
import numpy as np
import pytest
from helpers import oracle
from helpers.reference_models import CASES, NEEDS_DUMPS, Case, generation, relative

from minigpt4_jax.inference import engine
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.processing.sequences import prompt_tokens, stop_sequences


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return Case(request.param)


def check_beams(case, runner, names):
    """Compare the runs, answered together: those with equally many beams share a program."""
    document, dump = case.document("generate"), case.arrays("generate")
    visual = case.model.encode_images(case.images)
    runs = [generation(case, document["runs"][name], document, visual) for name in names]
    answers = iter(runner.search([request for requests, _ in runs for request in requests]))
    for name, (requests, ends) in zip(names, runs, strict=True):
        found = [best for _, (best,) in zip(requests, answers, strict=False)]
        for answer, padded in zip(found, dump[f"{name}/ids"], strict=True):
            theirs, ours = padded[1:].tolist(), answer.ids
            if answer.hit_stop:  # the original writes its first end id for whichever came
                assert ours[-1] in ends
                ours = [*ours[:-1], ends[0]]
            assert ours == theirs[: len(ours)], name
            assert not any(theirs[len(ours) :]), name
        scores = [answer.score for answer in found]
        np.testing.assert_allclose(scores, dump[f"{name}/sequences_scores"], rtol=1e-4)


@NEEDS_DUMPS
def test_beam_ids_and_scores(case):
    """Every run with beams, of two prompts each; some end early, some at the limit."""
    runs = case.document("generate")["runs"]
    names = [name for name, run in runs.items() if run["kwargs"]["num_beams"] > 1]
    assert len(names) == 6
    check_beams(case, case.model.engine, names)


@NEEDS_DUMPS
@pytest.mark.parametrize("case", ["c"], indirect=True)
def test_beams_of_stacked_layers_and_a_single_end_token(case):
    check_beams(case, engine.Engine(case.module), ["beam3", "beam5_lp2", "beam4_lpneg"])


@NEEDS_DUMPS
def test_generated_text(case):
    document = case.document("generate")
    texts = case.model.generate(case.images, document["texts"], max_new_tokens=10)
    assert texts == document["runs"]["greedy"]["answers"]
    for name in ("greedy_rp_eos", "beam4_lpneg_eos"):
        run, ids = document["runs"][name], case.arrays("generate")[f"{name}/ids"]
        options = {k: v for k, v in run["kwargs"].items() if k not in ("do_sample", "min_length")}
        options |= {"compat": True, "stop_ids": run["eos"]}
        options |= {"min_new_tokens": run["kwargs"].get("min_length", 0)}
        found = case.model.generate_details(case.images, document["texts"], **options)
        for (answer,), theirs in zip(found, ids[:, 1:].tolist(), strict=True):
            count = len(answer.ids) - (answer.finish_reason == "stop")
            assert answer.ids[:count] == theirs[:count], name
            assert count == len(theirs) or answer.ids[-1] in run["eos"], name


@NEEDS_DUMPS
def test_chat_turns(case):
    """Two turns about one image, the second after the first one's answer."""
    from minigpt4_jax.processing.chat_templates import chat_format, with_images

    dump, turns = case.arrays("chat"), []
    image = case.images[1 if case.name == "b" else 0]
    visual = case.model.encode_images([image])[0]
    on_device = case.model.visual_tokens([image])[0]  # the program of a public conversation
    merge = jax.jit(case.module.merge)
    assert relative(visual, dump["img_emb"][0]) < 1e-4
    for n, turn in enumerate(case.document("chat")):
        question = turn["question"] if n else with_images(turn["question"], 1)
        turns.append((question, None))
        prompt = chat_format(case.config, case.tokenizer).render(turns)
        if case.name != "c":  # its demo overwrites the answers it keeps: a fault not to copy
            assert prompt == turn["prompt"]
        tokens = prompt_tokens(case.tokenizer, case.config, turn["prompt"], images=1)
        flat = [i for segment in turn["segment_ids"] for i in segment]
        assert [t for t in tokens if t >= 0] == flat
        embeds = merge(np.asarray([tokens]), np.asarray(visual[None]))
        assert relative(embeds, dump[f"turn{n}/embs"]) < 1e-4
        theirs = dump[f"turn{n}/ids"][1:].tolist()
        stops = stop_sequences(case.tokenizer, case.config.end_symbol)
        options = SamplingParams(repetition_penalty=1.05)  # the chat's default
        request = engine.Request(tokens, on_device, len(theirs), options, stop_sequences=stops)
        assert case.model.engine.generate([request])[0] == theirs
        turns[-1] = (question, turn["answer"])


@NEEDS_DUMPS
def test_conversation(case):
    """The public Conversation gives the dumps' answers."""
    talk, dump = case.model.conversation(), case.arrays("chat")
    images = [case.images[1 if case.name == "b" else 0]]
    for n, turn in enumerate(case.document("chat")):
        limit = len(dump[f"turn{n}/ids"]) - 1
        options = {"repetition_penalty": 1.05, "max_new_tokens": limit}
        assert talk.ask(turn["question"], [] if n else images, **options) == turn["answer"]


@NEEDS_DUMPS
def test_oracle_agrees_with_the_original(case):
    dump = case.arrays("vision")
    pixels = case.pixels["pixel_values"].transpose(0, 2, 3, 1)
    visual = np.stack([oracle.encode(case.tensors, case.config, p) for p in pixels])
    assert relative(visual, dump["inputs_llama"]) < 1e-5
    _, forward, rows, images = next(case.forwards())
    for i, row in enumerate(rows):
        seen = visual[i] if images else None
        scores = oracle.logits(case.tensors, case.config, row.tokens, seen)
        assert relative(scores, forward["logits"][i, : len(row.tokens)]) < 1e-4
