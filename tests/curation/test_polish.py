"""`curate polish`: nothing is asked twice, lost or paid for twice; mistakes of the server and of the user."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.chat_families import FAMILIES, write_tokenizer
from helpers.openai_server import MODEL, CountingServer, polite

from minigpt4_jax import errors
from minigpt4_jax.cli import curate
from minigpt4_jax.config import ModelConfig, TokenizerConfig
from minigpt4_jax.curation import answers, endpoint
from minigpt4_jax.curation.answers import Answer, AnswerCache
from minigpt4_jax.curation.local_polisher import instructed_prompt
from minigpt4_jax.processing.chat_templates import chat_format
from minigpt4_jax.processing.tokenizer import HfTokenizer

NUM_TEXTS = 12


@pytest.fixture
def command(capsys, monkeypatch):
    """command(*arguments) -> (exit code, stdout, stderr)"""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: curate.main(["polish", *map(str, arguments)]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def source(tmp_path):
    """Rows of NUM_TEXTS different texts, two of them twice."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [
        f"the image shows a room with {n} chairs and a table of wood" for n in range(NUM_TEXTS)
    ]
    rows = [
        {"id": str(n), "image": f"{n}.png", "caption": text}
        for n, text in enumerate([*texts, *texts[:2]])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.jsonl.settings.json").write_text('{"command": "describe", "model": "stage1"}')
    return folder / "rows.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_text_is_asked_once(source, command, tmp_path):
    out = tmp_path / "out.jsonl"
    with CountingServer(delay=0.02) as server:
        asks = [f"--input={source}", f"--output={out}", f"--endpoint={server.url}"]
        code, said, err = command(*asks, "--concurrency=4", "--price-in=1", "--price-out=2")
        assert code == 0, err
        assert set(server.asked.values()) == {1} and len(server.asked) == NUM_TEXTS
        assert 1 < server.most <= 4
        assert f"{NUM_TEXTS} texts asked, 0 answered before; 120 + 60 tokens, 0.0002 spent" in said
        body = server.bodies[0]
        assert (body["model"], body["temperature"], body["max_tokens"]) == (MODEL, 0.7, 200)
        assert body["messages"][0]["content"].startswith("You edit descriptions")
        before = out.read_bytes()
        code, said, _ = command(*asks)
        assert code == 0 and f"0 texts asked, {NUM_TEXTS} answered before" in said
        assert out.read_bytes() == before and server.asked.total() == NUM_TEXTS
        # other filters, and another file: the answers are the same
        other = [asks[0], f"--output={tmp_path / 'b.jsonl'}", asks[2], "--min-characters=999"]
        code, said, _ = command(*other)
        assert "14 removed: short" in said and server.asked.total() == NUM_TEXTS
        # another instruction is another question
        (tmp_path / "mine.txt").write_text("Shout.")
        assert command(*asks, f"--instruction={tmp_path / 'mine.txt'}")[0] == 0
        assert server.asked.total() == 2 * NUM_TEXTS
        assert server.bodies[-1]["messages"][0]["content"] == "Shout."
    rows = read(out)
    assert len(rows) == NUM_TEXTS + 2
    assert rows[3]["caption"] == polite(rows[3]["original"])
    assert rows[3]["image"] == os.path.join("in", "3.png")  # relative to the output
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert settings["history"] == [{"command": "describe", "model": "stage1"}]
    assert settings["model"] == MODEL and settings["prompt_tokens"] == 120


def test_removed_rows_are_counted_and_kept(source, command, tmp_path):
    out = tmp_path / "out.jsonl"

    def reply(text):
        number = int("".join(filter(str.isdigit, text)))
        return {3: "incomplete", 4: "Sorry, no.", 5: "already correct"}.get(number, polite(text))

    with CountingServer(reply) as server:
        code, said, _ = command(f"--input={source}", f"--output={out}", f"--endpoint={server.url}")
    assert code == 0
    assert "12 of 14 rows kept, 1 of them unchanged" in said
    removed = {row["id"]: row for row in read(tmp_path / "out.removed.jsonl")}
    assert removed["3"]["cause"] == "incomplete" and removed["3"]["reply"] == "incomplete"
    assert removed["4"]["cause"] == "short" and removed["4"]["original"].startswith("the image")
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report == {"kept": 12, "unchanged": 1, "removed": {"incomplete": 1, "short": 1}}


def test_retries_wait_as_the_server_says(source, command, tmp_path):
    with CountingServer() as server:
        server.failures = [(429, {"Retry-After": "1"}, {}), (503, {}, {})]
        code, _, err = command(
            f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={server.url}",
            "--concurrency=1",
        )  # fmt: skip
        assert code == 0, err
        assert server.times[1] - server.times[0] >= 1.0
        assert set(server.asked.values()) == {1}


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ((401, {}, {"error": {"message": "no key"}}), "environment variable OPENAI_API_KEY"),
        ((404, {}, {"error": {"message": "no such model"}}), "no such model"),
        ((400, {}, {"error": {"message": "temperature is too hot"}}), "temperature is too hot"),
        ((429, {}, {"error": {"message": "pay first", "code": "insufficient_quota"}}), "pay first"),
    ],
)
def test_lasting_errors_end_the_run(source, command, tmp_path, failure, message):
    out = tmp_path / "out.jsonl"
    with CountingServer() as server:
        server.failures = [failure] * 2
        asks = [f"--input={source}", f"--output={out}", f"--endpoint={server.url}"]
        code, _, err = command(*asks, "--concurrency=1", "--retries=0")
        assert code == 2 and message in err.splitlines()[-1]
        assert not out.exists()
        server.failures = []
        assert command(*asks)[0] == 0 and out.exists()


def test_a_text_that_fails_does_not_stop_the_others(source, command, tmp_path):
    out = tmp_path / "out.jsonl"
    with CountingServer() as server:
        asks = [f"--input={source}", f"--output={out}", f"--endpoint={server.url}"]
        server.failures = [(500, {}, {"error": {"message": "a bug"}})]
        code, said, _ = command(*asks, "--concurrency=1", "--retries=0")
        assert code == 1 and "1 texts have no answer" in said and "a bug" in said
        assert "2 removed: not answered" in said  # a text that two rows have
        assert command(*asks)[0] == 0 and len(read(out)) == NUM_TEXTS + 2
        assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{"message": None}]}])
def test_a_reply_that_is_no_completion_does_not_stop_the_others(source, command, tmp_path, reply):
    with CountingServer() as server:
        asks = [f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={server.url}"]
        first = server.reply

        def then_fail(text):
            server.failures, server.reply = [(200, {}, reply)], first
            return first(text)

        server.reply = then_fail
        code, said, _ = command(*asks, "--concurrency=1")
        assert code == 1 and "1 texts have no answer" in said and "no chat completion" in said
        assert command(*asks)[0] == 0 and set(server.asked.values()) == {1}


def test_what_the_server_refuses_is_removed_and_asked_again_on_request(source, command, tmp_path):
    refusal = (400, {}, {"error": {"message": "not this", "code": "content_filter"}})
    with CountingServer() as server:
        server.failures = [refusal]
        asks = [f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={server.url}"]
        code, said, _ = command(*asks, "--concurrency=1")
        assert code == 0 and "removed: refused by the server" in said
        assert "0 texts asked" in command(*asks)[1]
        code, said, _ = command(*asks, "--retry-errors")
        assert code == 0 and "1 texts asked" in said and "refused" not in said


def test_a_dead_server_ends_the_run_soon(source, command, tmp_path):
    with CountingServer() as server:
        url = server.url
    code, _, err = command(
        f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={url}",
        "--served-model=m", "--retries=0",
    )  # fmt: skip
    assert code == 2 and "is the server running?" in err


def test_the_key_is_read_from_the_environment(source, command, tmp_path, monkeypatch):
    with CountingServer(key="secret") as server:
        asks = [f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={server.url}"]
        code, _, err = command(*asks, "--retries=0")
        assert code == 2 and "OPENAI_API_KEY" in err
        monkeypatch.setenv("MY_KEY", "secret")
        assert command(*asks, "--key-variable=MY_KEY")[0] == 0
    for path in tmp_path.iterdir():
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_a_server_with_several_models_asks_for_a_choice(source, command, tmp_path):
    with CountingServer() as server:
        server.models = ["b", "a"]
        asks = [f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={server.url}"]
        code, _, err = command(*asks)
        assert code == 2 and "--served-model: a, b" in err
        assert command(*asks, "--served-model=a")[0] == 0
        assert server.bodies[0]["model"] == "a"


def test_a_web_page_is_no_server(source, command, tmp_path):
    with CountingServer() as server:
        server.page = b"<html>hello</html>"
        asks = [f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={server.url}"]
        for more in ([], ["--served-model=m"], ["--served-model=m", "--concurrency=1"]):
            server.kind = "application/json" if "--concurrency=1" in more else "text/html"
            code, _, err = command(*asks, *more)
            assert code == 2 and "OpenAI's API; is the URL right?" in err, err


def test_max_completion_tokens_where_max_tokens_is_refused(source, command, tmp_path):
    message = "'max_tokens' is not supported; use 'max_completion_tokens' instead"
    with CountingServer() as server:
        server.failures = [(400, {}, {"error": {"message": message}})]
        asks = [f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", f"--endpoint={server.url}"]
        assert command(*asks, "--concurrency=1")[0] == 0
        assert {body.get("max_completion_tokens") for body in server.bodies} == {200}


def test_only_the_rules(source, command, tmp_path):
    code, said, _ = command(
        f"--input={source}",
        f"--output={tmp_path / 'o.jsonl'}",
        "--rules-only",
        "--min-characters=57",
    )
    assert code == 0 and "2 of 14 rows kept" in said  # those with two digits
    assert not (tmp_path / "polish_answers.sqlite").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "expected one of --endpoint=URL, --model=DIR and --rules-only"),
        (["--rules-only", "--model=x"], "expected one of"),
        (["--endpoint=localhost"], "expected a URL such as"),
        (["--endpoint=http://127.0.0.1:1", "--concurrency=0"], "--concurrency=0: expected 1 or more"),
        (["--rules-only", "--dtype=float32"], "--dtype is an option of --model"),
        (["--rules-only", "--served-model=m"], "--served-model is an option of --endpoint"),
        (["--model=x", "--system=y"], "pass --instruction=FILE"),
        (["--endpoint=http://x", "--batch_size=3"], "--batch_size is an option of --model"),
        (["--endpoint=http://x", "--no-extra-bos"], "--no-extra-bos is an option of --model"),
        (["--model=x", "--concurrency=3"], "--concurrency is an option of --endpoint"),
        (["--rules-only", "--max-tokens=9"], "--max-tokens has no effect with --rules-only"),
        (["--model=x", "--no-exif"], "unrecognized arguments: --no-exif"),
        (["--rules-only", "--temperature=3"], "--temperature=3: expected 0 to 2"),
        (["--rules-only", "--price-in=3"], "--price-in and --price-out belong together"),
        (["--endpoint=http://127.0.0.1:1", "--instruction=none.txt"], "none.txt: cannot be read"),
    ],
)  # fmt: skip
def test_wrong_options(source, command, tmp_path, more, message):
    code, _, err = command(f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", *more)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_a_file_of_something_else_is_not_replaced(source, command, tmp_path):
    out = tmp_path / "notes.jsonl"
    out.write_text("mine")
    code, _, err = command(f"--input={source}", f"--output={out}", "--rules-only")
    assert code == 2 and "was not written by curate polish" in err and out.read_text() == "mine"


# --- kills ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run where a kill might."""


@pytest.mark.parametrize("moment", range(0, NUM_TEXTS, 3))
@pytest.mark.parametrize("where", ("before", "after"))
def test_a_kill_around_storing_loses_only_what_was_in_flight(
    source, command, tmp_path, monkeypatch, moment, where
):
    out = tmp_path / "out.jsonl"
    put, count = AnswerCache.put, iter(range(999))

    def killed_put(self, *args):
        number = next(count)
        if number > moment or (number == moment and where == "before"):
            raise Killed
        put(self, *args)
        if number == moment:
            raise Killed

    with CountingServer() as server:
        asks = [
            f"--input={source}",
            f"--output={out}",
            f"--endpoint={server.url}",
            "--concurrency=2",
        ]
        monkeypatch.setattr(AnswerCache, "put", killed_put)
        with pytest.raises(Killed):
            curate.main(["polish", *asks])
        monkeypatch.setattr(AnswerCache, "put", put)
        assert not out.exists()
        assert command(*asks)[0] == 0 and len(read(out)) == NUM_TEXTS + 2
        again = {text: n for text, n in server.asked.items() if n > 1}
        assert len(server.asked) == NUM_TEXTS and len(again) <= 2 and set(again.values()) <= {2}
        assert set(server.charged.values()) == {1}


def test_real_kills(source, tmp_path):
    out = tmp_path / "out.jsonl"
    with CountingServer(delay=0.05) as server:
        arguments = [
            sys.executable, "-m", "minigpt4_jax.curate", "polish", f"--input={source}",
            f"--output={out}", f"--endpoint={server.url}", "--concurrency=2",
        ]  # fmt: skip
        for asked in (1, 5):
            process = subprocess.Popen(
                arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            while len(server.asked) < asked and process.poll() is None:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not out.exists()
        subprocess.run(arguments, check=True, capture_output=True)
        assert len(server.asked) == NUM_TEXTS and len(read(out)) == NUM_TEXTS + 2
        assert sum(n - 1 for n in server.asked.values()) <= 4  # two in flight at each kill
        assert set(server.charged.values()) == {1}


def test_answers_are_told_apart_by_what_they_depend_on(tmp_path):
    config = endpoint.EndpointConfig("u", "m", "i", 0.7, 200)
    key = answers.answer_key(config.settings(), "text")
    changes = [
        ("url", "v"),
        ("model", "n"),
        ("instruction", "j"),
        ("temperature", 0.1),
        ("max_tokens", 9),
    ]
    values = {
        f: getattr(config, f) for f in ("url", "model", "instruction", "temperature", "max_tokens")
    }
    keys = {
        answers.answer_key(endpoint.EndpointConfig(**{**values, name: value}).settings(), "text")
        for name, value in changes
    }
    assert len(keys) == len(changes) and key not in keys
    assert key != answers.answer_key(config.settings(), "other")
    with AnswerCache(tmp_path / "a.sqlite") as cache:
        cache.put(key, "text", Answer("first", "stop", 1, 2))
        cache.put(key, "text", Answer("second", "stop"))
        cache.put("half", "\ud800", Answer("\ud800x", "stop"))
        assert cache.get(key) == Answer("first", "stop", 1, 2)
        assert cache.get("half") == Answer("?x", "stop") and cache.get("none") is None
    (tmp_path / "b.sqlite").write_text("no database" * 100)
    with pytest.raises(errors.UserError, match=r"b\.sqlite: file is not a database"):
        AnswerCache(tmp_path / "b.sqlite")


def test_the_instruction_reaches_models_without_system_messages(tmp_path):
    no_system = (
        "{% for m in messages if m.role != 'system' %}{{ m.content + eos_token }}{% endfor %}"
    )
    family = FAMILIES["qwen2"]
    for name, changed in (("with", family), ("without", family._replace(template=no_system))):
        tokenizer = HfTokenizer(write_tokenizer(tmp_path / name, changed))
        template = chat_format(
            ModelConfig(tokenizer=TokenizerConfig("hf", chat_template=True)), tokenizer
        )
        prompt = instructed_prompt(template, "Mend it.", "A cat cat.")
        assert prompt.index("Mend it.") < prompt.index("A cat cat."), name
