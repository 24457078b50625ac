"""An answer is the same text by every way: API, stream, conversation, chat, batch, server."""

import json

import httpx
import pytest
from helpers import chat_families, tiny
from helpers.scripted import own_programs, scripted
from helpers.serving import make_service, running_server

import minigpt4_jax
from minigpt4_jax.cli import batch, chat, common
from minigpt4_jax.cli.chat_session import Session
from minigpt4_jax.config import TokenizerConfig
from minigpt4_jax.processing.chat_templates import TokenizerChatTemplate, chat_format, role_names
from minigpt4_jax.processing.tokenizer import load_tokenizer

QUESTION = "what is it"
OPTIONS = {"max_new_tokens": 40, "stop": ["\nUser:"], "context": 200}
UNKNOWN = chat_families.Family(  # a format that is written with text alone
    chat_families._LOOP + "{{ m.role + '> ' + m.content + ' <<é>>\n' }}" + chat_families._END
    + "{%- if add_generation_prompt %}{{ 'me> ' }}{%- endif %}",
    ("<bos>", "<eos>"), "<bos>", "<eos>", "<<é>>",
)  # fmt: skip
FORMATS = {
    "vicuna": {},
    "llama2": {"chat_template": "llama2", "end_symbol": "</s>"},
    "chatml": chat_families.FAMILIES["qwen2"],
    "unknown": UNKNOWN,
}
# The text that the model writes before its end symbol, and the answer if the original's formats have another.
TEXTS = {
    "": None,
    "a dog 🙂 é": None,
    " \n two\n\nlines \n": None,
    "\nUser: more": "",
    "a cat\nUser: more": "a cat",
    "# Cake\n### Steps": "# Cake",
    "<s>a": "a",
    "Assistant: a dog": "a dog",
    "one Assistant: two": "two",
    "[/INST] x [/INST] y": "y",
}


class Case:
    """A model that answers seed n with the n-th script."""

    def __init__(self, folder, name):
        made = FORMATS[name]
        files, options = tiny.TOKENIZER, made
        if isinstance(made, chat_families.Family):
            files = chat_families.write_tokenizer(folder / "tokenizer", made)
            tokenizer = load_tokenizer(files)
            ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
            end = TokenizerChatTemplate(tokenizer).end_symbol
            options = {"tokenizer": TokenizerConfig("hf", *ids, True), "end_symbol": end}
        path = tiny.write_random_model(
            folder / "model", tokenizer_files=files, **options, llm_layers=1
        )
        self.model = minigpt4_jax.load(path, "float32")
        self.original = not isinstance(made, chat_families.Family)
        self.expected, self.scripts = [], []
        end = self._ids(self.model.config.end_symbol)
        for text, cleaned in TEXTS.items():
            before = text.split("\nUser:")[0].strip()
            self.expected.append(before if cleaned is None or not self.original else cleaned)
            self.scripts.append([*self._ids(text), *end, *self._ids("never shown")])
        # in single characters and bytes
        self.expected.append("a dog 🙂")
        self.scripts.append([*self._spell("a dog 🙂"), *end, *self._ids("never shown")])
        # max_new_tokens within a stop text
        self.expected.append("x" * 36 + "\nUse")
        self.scripts.append(self._spell("x" * 36 + "\nUser:"))
        template = chat_format(self.model.config, self.model.tokenizer)
        self.prompt = template.render([(QUESTION, None)])

    def _ids(self, text):
        return self.model.tokenizer.encode(text)

    def _spell(self, text):
        tokenizer = self.model.tokenizer
        if tokenizer.kind == "hf":
            return [i for character in text for i in tokenizer.encode(character)]
        return [tokenizer._model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.fixture(scope="module", params=FORMATS)
def case(request, tmp_path_factory):
    with own_programs():
        made = Case(tmp_path_factory.mktemp("same"), request.param)
    with scripted(made.scripts, then=made.model.tokenizer.eos_id):
        yield made


def test_python(case):
    model, seeds = case.model, range(len(case.scripts))
    assert (
        model.generate(None, [case.prompt] * len(seeds), seed=list(seeds), **OPTIONS)
        == case.expected
    )
    for seed, expected in enumerate(case.expected):
        options = OPTIONS | {"seed": seed}
        assert model.conversation().ask(QUESTION, **options) == expected
        conversation = model.conversation()
        streamed = "".join(conversation.stream(QUESTION, **options))
        assert "".join(model.stream(None, case.prompt, **options)) == streamed
        assert conversation.turns[0].answer == expected
        assert streamed == expected or any(role in streamed for role in role_names(model.config))


def test_commands(case, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "load_model", lambda args: case.model)
    shared = ["--model=m", "--max_new_tokens=40", "--stop=\nUser:"]
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps({"prompt": QUESTION}) + "\n" for _ in case.scripts))
    assert batch.main([*shared, f"--input={rows}", f"--output={out}", "--seed=0"]) == 0
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["response"] for row in answered] == case.expected
    session = Session(case.model, chat.parse(shared))
    for seed, expected in enumerate(case.expected):
        capsys.readouterr()
        for line in ("/reset", f"/set seed={seed}", QUESTION):
            session.handle(line)
        printed, notes = capsys.readouterr()
        assert printed == expected + "\n" or f"is the answer: {expected}\n" in notes


def test_server(case):
    body = {"max_tokens": 40, "stop": ["\nUser:"], "temperature": 0}
    bodies = {
        "chat/completions": body | {"messages": [{"role": "user", "content": QUESTION}]},
        "completions": body | {"prompt": case.prompt},
    }
    with (
        running_server(make_service(case.model)) as server,
        httpx.Client(base_url=f"{server.url}/v1", timeout=60) as client,
    ):
        for seed, expected in enumerate(case.expected):
            for path in bodies:
                asked = bodies[path] | {"seed": seed}
                (whole,) = client.post(path, json=asked).json()["choices"]
                assert _text(whole, "message") == expected
                lines = client.post(path, json=asked | {"stream": True}).text.splitlines()
                events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
                choices = [event["choices"][0] for event in events]
                streamed = "".join(_text(choice, "delta") for choice in choices)
                assert choices[-1]["finish_reason"] == whole["finish_reason"]
                assert choices[-1].get("generated_text", streamed) == expected
                assert streamed == expected or any(
                    role in streamed for role in role_names(case.model.config)
                )


def _text(choice, name):
    return choice["text"] if "text" in choice else choice[name].get("content", "")
