"""The server as the openai package sees it: answers, streams, images, errors, cancellation."""

import base64
import time

import numpy as np
import openai
import pytest
from helpers import tiny
from helpers.serving import NAME, data_url, make_service, noise, running_server, user_message

import minigpt4_jax
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.processing.chat_templates import chat_format, with_images

GREEDY = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_random_model(tmp_path_factory.mktemp("server") / "model", llm_layers=1)
    return minigpt4_jax.load(folder, dtype="float32", exif=True)


@pytest.fixture(scope="module")
def server(model):
    with running_server(make_service(model), keys=["secret"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def answer(model, turns, images=(), system=None, **options):
    """The text and ids that `generate` gives for a dialogue."""
    prompt = chat_format(model.config, model.tokenizer).render(turns, system=system)
    options = {"max_new_tokens": 12} | options
    return model.generate_details([list(images)], [prompt], GenerationConfig(**options))[0][0]


def test_an_answer_is_that_of_generate(model, client):
    response = client.chat.completions.create(
        messages=[
            {"role": "system", "content": "Be brief."},
            user_message("compare them", noise(1), noise(2)),
            {"role": "assistant", "content": "one is redder"},
            user_message("and this?", noise(3)),
        ],
        **GREEDY,
    )
    turns = [(with_images("compare them", 2), "one is redder"), (with_images("and this?", 1), None)]
    expected = answer(model, turns, [noise(1), noise(2), noise(3)], system="Be brief.")
    (choice,) = response.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason == "length"
    assert response.usage.completion_tokens == 12 and response.model == NAME


def test_options_and_choices(model, client):
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
    response = client.chat.completions.create(
        model=NAME, messages=[user_message("tell me")], n=3, max_completion_tokens=9, stop=["zz"],
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 2},
        **options,
    )  # fmt: skip
    more = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "min_new_tokens": 2}
    for n, choice in enumerate(response.choices):
        config = options | more | {"seed": 5 + n, "max_new_tokens": 9, "stop": ("zz",)}
        assert choice.message.content == answer(model, [("tell me", None)], **config).text
    assert response.usage.completion_tokens > response.usage.prompt_tokens / 100


def test_a_stream_adds_up_to_the_answer(model, client):
    for _ in range(5):  # a busy machine may send what several steps have generated as one piece
        stream = client.chat.completions.create(
            messages=[user_message("what is it", noise(4))], stream=True, logprobs=True, max_tokens=40,
            stream_options={"include_usage": True}, **GREEDY,
        )  # fmt: skip
        if len(chunks := list(stream)) > 4:
            break
    expected = answer(model, [(with_images("what is it", 1), None)], [noise(4)], max_new_tokens=40)
    *pieces, usage = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == expected.text
    assert len(pieces) > 3 and pieces[-1].choices[0].finish_reason == expected.finish_reason
    assert usage.choices == [] and usage.usage.completion_tokens == len(expected.ids)
    tokens = [t for c in pieces for t in (c.choices[0].logprobs or _nothing()).content]
    shown = len(tokens)
    np.testing.assert_allclose([t.logprob for t in tokens], expected.logprobs[:shown], atol=1e-4)
    assert len(expected.ids) - 3 <= shown <= len(expected.ids)


class _nothing:
    content = ()


def test_top_logprobs_and_penalties(model, client):
    penalties = {"frequency_penalty": -1.5, "presence_penalty": -0.5}  # repeats become likely
    response = client.chat.completions.create(
        messages=[user_message("what is it", noise(4))], logprobs=True, top_logprobs=5, n=2,
        **penalties, **GREEDY,
    )  # fmt: skip
    expected = answer(model, [(with_images("what is it", 1), None)], [noise(4)], **penalties)
    plain = answer(model, [(with_images("what is it", 1), None)], [noise(4)])
    assert expected.ids != plain.ids
    for choice in response.choices:
        assert choice.message.content == expected.text
        for token, logprob in zip(choice.logprobs.content, expected.logprobs, strict=False):
            best = token.top_logprobs
            np.testing.assert_allclose(token.logprob, logprob, atol=1e-4)
            assert len(best) == 5 and best[0].logprob >= token.logprob - 1e-4
            same = [abs(b.logprob - token.logprob) for b in best if b.token == token.token]
            is_listed = token.logprob > best[-1].logprob - 1e-4  # one of the five most likely
            assert not is_listed or min(same) < 1e-3


def test_completions_take_raw_prompts(model, client):
    prompts = ["a red square", "a green square"]
    response = client.completions.create(prompt=prompts, max_tokens=8, logprobs=1, **GREEDY)
    expected = model.generate_details(None, prompts, max_new_tokens=8)
    for choice, (output,) in zip(response.choices, expected, strict=True):
        assert choice.text == output.text
        shown = len(choice.logprobs.tokens)
        np.testing.assert_allclose(
            choice.logprobs.token_logprobs, output.logprobs[:shown], atol=1e-4
        )
    stream = client.completions.create(prompt=prompts[0], max_tokens=8, stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in stream) == expected[0][0].text
    with_image = client.completions.create(
        prompt="<Img><ImageHere></Img> it is", max_tokens=4,
        extra_body={"images": [data_url(noise(1))]}, **GREEDY,
    )  # fmt: skip
    (text,) = model.generate([noise(1)], ["<Img><ImageHere></Img> it is"], max_new_tokens=4)
    assert with_image.choices[0].text == text


def test_beam_search(model, client):
    response = client.chat.completions.create(
        model=NAME, messages=[user_message("what is it")], n=2, max_tokens=6,
        extra_body={"num_beams": 3},
    )  # fmt: skip
    prompt = chat_format(model.config, model.tokenizer).render([("what is it", None)])
    expected = model.generate(None, [prompt], num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert [choice.message.content for choice in response.choices] == expected


def test_models_embeddings_and_ranking(model, client):
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    features = model.encode_images([noise(1), noise(2)])
    urls = [data_url(noise(1)), data_url(noise(2))]
    response = client.embeddings.create(model=NAME, input=urls)  # as base64, the client's default
    for found, expected in zip(response.data, features, strict=True):
        np.testing.assert_allclose(found.embedding, expected.mean(0), rtol=1e-4, atol=1e-5)
    whole = client.embeddings.create(
        model=NAME, input=urls[0], encoding_format="float", extra_body={"pooling": "none"}
    )
    np.testing.assert_allclose(whole.data[0].embedding, features[0].ravel(), rtol=1e-4, atol=1e-5)
    candidates = ["red", "a green square", "blue"]
    body = {"model": NAME, "question": "which?", "candidates": candidates, "images": urls[:1]}
    ranked = client.post("/rank", body=body, cast_to=dict)["results"]
    nll, tokens = model.score([noise(1)] * 3, ["which?"] * 3, candidates, template=True)
    assert [r["index"] for r in ranked] == np.argsort(nll / tokens, kind="stable").tolist()
    np.testing.assert_allclose(ranked[0]["nll"], nll[ranked[0]["index"]], rtol=1e-4)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_in_pixels_of_the_last_image(server, client, monkeypatch, orientation):
    """As it is shown: a photo whose EXIF orientation is 6 or 8 is stored lying on its side."""
    answer = _output("<p>a cup</p> {<10><20><50><100>}")
    monkeypatch.setattr(server.service.model, "output", lambda *_: answer)
    size = {"width": 50, "height": 200} if orientation > 4 else {"width": 200, "height": 50}
    image = noise(1, **size)
    image.getexif()[0x0112] = orientation
    response = client.chat.completions.create(
        messages=[user_message("[refer] cup", image)], extra_body={"boxes": True}, **GREEDY
    )
    assert response.choices[0].message.boxes == [{"phrase": "a cup", "box": [20, 10, 100, 50]}]


def _output(text):
    return minigpt4_jax.GenerationOutput(text, [], [], "stop", 0.0)


@pytest.mark.parametrize(
    ("options", "error", "param", "words"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "does not exist"),
        ({"temperature": -1}, openai.BadRequestError, "temperature", "expected 0"),
        ({"top_p": 1.5}, openai.BadRequestError, "top_p", "at most 1"),
        ({"max_tokens": 65}, openai.BadRequestError, "max_tokens", "at most 64"),
        ({"n": 99}, openai.BadRequestError, "n", "expected 1 to 16"),
        ({"extra_body": {"topk": 3}}, openai.BadRequestError, "topk", "did you mean top_k?"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, None, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, None, "response_format"),
        ({"logprobs": True, "top_logprobs": 2, "stream": True}, openai.BadRequestError,
         "top_logprobs", "whole answers"),
        ({"logit_bias": {"5": 1}}, openai.BadRequestError, None, "logit_bias"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1 item"),
        ({"messages": [user_message("x " * 300)]}, openai.BadRequestError, "messages", "context"),
    ],
)  # fmt: skip
def test_errors_are_those_of_openai(client, options, error, param, words):
    arguments = {"model": NAME, "messages": [user_message("hello")]} | options
    with pytest.raises(error, match=words) as caught:
        client.chat.completions.create(**arguments)
    assert caught.value.param == param and caught.value.type
    assert caught.value.response.headers["x-request-id"]


def test_keys(server, client):
    for key in ("wrong", "-", "secre"):
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as other,
            pytest.raises(openai.AuthenticationError, match="API key"),
        ):
            other.models.list()
    get = client._client.get
    assert get(f"{server.url}/health").status_code == 200
    assert get(f"{server.url}/ready").status_code == 200
    assert get(f"{server.url}/metrics").status_code == 401


def test_fields_without_effect_are_named(client):
    response = client.chat.completions.with_raw_response.create(
        messages=[user_message("hello")], user="me", store=False, **GREEDY
    )
    assert response.headers["x-ignored-parameters"] == "store, user"


def test_a_client_that_leaves_frees_its_place(server, client):
    scheduler = server.service.scheduler
    stream = client.chat.completions.create(
        messages=[user_message("a long story")], stream=True, max_tokens=64, **GREEDY
    )
    next(stream)
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.02).chat.completions.create(
            messages=[user_message("another")], max_tokens=64, n=8, **GREEDY
        )
    end = time.monotonic() + 10
    while (scheduler.num_running or len(scheduler.queue)) and time.monotonic() < end:
        time.sleep(0.01)
    assert scheduler.num_running == 0 and scheduler.healthy


def test_metrics_count(server, client):
    client.chat.completions.create(messages=[user_message("hello", noise(9))], **GREEDY)
    text = client._client.get(
        f"{server.url}/metrics", headers={"Authorization": "Bearer secret"}
    ).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["minigpt4_generated_tokens_total"]) >= 12
    assert float(values["minigpt4_time_to_first_token_seconds_count"]) >= 1
    assert float(values["minigpt4_encoded_images_total"]) >= 1
    path = 'minigpt4_http_responses_total{path="/v1/chat/completions",status="200"}'
    assert float(values[path]) >= 1


def test_langchain(model, server):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{server.url}/v1", api_key="secret", model=NAME, temperature=0)
    found = chat.invoke([user_message("what is it", noise(4))])
    expected = answer(model, [(with_images("what is it", 1), None)], [noise(4)])
    assert found.content == expected.text
    assert "".join(piece.content for piece in chat.stream("hello")) == chat.invoke("hello").content


def test_base64_of_an_embedding_is_float32(client):
    response = client.post(
        "/embeddings", cast_to=dict,
        body={"model": NAME, "input": data_url(noise(1)), "encoding_format": "base64"},
    )  # fmt: skip
    (entry,) = response["data"]
    assert len(base64.b64decode(entry["embedding"])) == 4 * entry["shape"][0]
