"""python -m minigpt4_jax.chat: answers on stdout, errors as one line on stderr."""

import contextlib
import io
import json
import sys

import pytest
from helpers.chat_command import arguments, ask
from PIL import Image

import minigpt4_jax
from minigpt4_jax.cli import chat, common
from minigpt4_jax.cli.chat_session import COMMANDS, DEFAULTS, Session, generation_options
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.transcript import embedded_image


def test_an_answer_is_one_line_and_greedy_decoding_is_repeatable(chat_home, chat_command):
    code, out, err = chat_command(*ask(chat_home))
    assert (code, err) == (0, "")
    assert out.strip() and out.count("\n") == 1
    assert chat_command(*ask(chat_home, "--seed=5"))[1] == out


def test_sampling_follows_the_seed(chat_home, chat_command):
    question = arguments(chat_home, "--prompt=what is it", "--temperature=2", "--top_k=20")
    first, second, again = (chat_command(*question, f"--seed={seed}")[1] for seed in (1, 2, 1))
    assert first == again != second


def test_a_pipe_is_one_conversation(chat_home, chat_piped):
    """Empty lines are skipped; the image comes with the first question."""
    code, out, err = chat_piped("what is it\n\n  \nhow many?  \n")
    assert (code, err) == (0, "")
    conversation = minigpt4_jax.load(chat_home / "model", "float32").conversation()
    options = DEFAULTS | {"temperature": 0.0, "max_new_tokens": 6}
    first = conversation.ask("what is it", [chat_home / "a.png"], **options)
    assert out == f"{first}\n{conversation.ask('how many?', **options)}\n"


def test_commands(chat_home, chat_piped, tmp_path):
    """The effect of each, as the saved conversation shows it."""
    picture, saved = tmp_path / "my b.png", tmp_path / "conversation.json"
    Image.open(chat_home / "a.png").rotate(90).save(picture)
    lines = f"""one
    two
    /undo
    three
    /image "{picture}" {chat_home}/a.png
    //four
    /save {saved}
    /save {saved}
    /reset
    /image {picture}
    five
    /retry
    /save {tmp_path}/last.json
    /quit
    never
    """
    code, out, err = chat_piped(lines)
    assert code == 0, err
    assert len(out.splitlines()) == 6, out
    turns = json.loads(saved.read_text())["turns"]
    a, b = str(chat_home / "a.png"), str(picture)
    questions = [(t["question"], t["images"]) for t in turns]
    assert questions == [("one", [a]), ("three", []), ("/four", [b, a])]
    assert [t["answer"] for t in turns] == [out.splitlines()[i] for i in (0, 2, 3)]
    (last,) = json.loads((tmp_path / "last.json").read_text())["turns"]
    assert (last["question"], last["images"]) == ("five", [b])
    names = ["conversation.json", "last.json", "my b.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_set_changes_the_next_answers(chat_piped):
    lines = "one\n/set temperature=2 top_k=0 seed=3\n/retry\n/retry\n/set temperature=0\n/retry\n"
    code, out, err = chat_piped(lines)
    answers = out.splitlines()
    assert code == 0 and answers[0] == answers[3] and len(set(answers)) == 3, out
    assert "temperature=2.0" in err and "top_k=0" in err


def test_set_takes_several_spellings(chat_piped):
    lines = (
        "/set temperature 0.5\n/set top_k = 7 min_p= 0.1 stop=it\n/set stop_ids=3,4 compat=true\n"
    )
    lines += "/set temperature=0 top_p=1 top_k=0 min_p=0 num_beams 2\none\n/retry\n"
    code, out, err = chat_piped(lines)
    assert code == 0, err
    for text in ("temperature=0.5", "top_k=7", "min_p=0.1", "('it',)", "(3, 4)", "compat=True"):
        assert text in err
    first, again = out.splitlines()
    assert first == again  # a search draws nothing


def test_set_num_beams_needs_no_other_option(chat_home, chat_command, monkeypatch):
    """Those that the chat samples with by default are off in a search, and back after it."""
    lines = "/set num_beams=2\n/set num_beams=1\n/set temperature=0.7 num_beams=3\n/set seed=4\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines + "/set temperature=0\n/set\n"))
    code, _, err = chat_command(*arguments(chat_home))
    search, sampling, refused, *others = err.splitlines()
    assert "num_beams=2" in search and "temperature=0.0" in search and "top_k=0" in search
    assert "num_beams=1" in sampling and "temperature=1.0" in sampling and "top_k=50" in sampling
    assert "num_beams 3 with temperature 0.7" in refused and code == 2
    assert "temperature=1.0" in others[0] and "seed=4" in others[0]
    assert others[1].startswith("note: seed has no effect at temperature 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=-1"], "temperature -1"),
        (["--top_p=2"], "top_p 2"),
        (["--num_beams=3", "--temperature=1"], "num_beams 3 with temperature 1"),
        (["--num_beams=0"], "num_beams 0"),
        (["--stop="], "stop 0 is ''"),
        (["--max_new_tokens=0"], "max_new_tokens 0"),
        (["--context=0"], "context 0"),
        (["--temperature=inf"], "temperature inf: expected 0 (greedy) or more"),
        (["--max-new-tokns=5"], "--max-new-tokns=5; did you mean --max_new_tokens? (see"),
        (["--temprature=1"], "did you mean --temperature?"),
        (["--colour=red"], "unrecognized arguments: --colour=red (see"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(
    chat_home, chat_command, monkeypatch, options, message
):
    monkeypatch.setattr(common, "begin_loading", None)
    code, out, err = chat_command(*arguments(chat_home, "--prompt=x", *options))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--max_new_tokens=5000", "the language model's context has 2048 tokens"),
        ("--template=moon", "template 'moon' is not known"),
        ("--min_new_tokens=400", "min_new_tokens 400: is more than max_new_tokens 300"),
        ("--context=300", "context 300: has no room for a prompt beside max_new_tokens 300"),
        ("--context=5000", "context 5000: the language model's has 2048 tokens"),
        ("--stop_ids=785", "stop_ids 785: expected a token id of this model, 0 to 784"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused_before_its_weights_are_read(
    chat_home, monkeypatch, option, message
):
    monkeypatch.setattr("minigpt4_jax.inference.loading.load_model", None)
    with pytest.raises(UserError, match=message):
        chat.main([f"--model={chat_home / 'model'}", option])


def test_options_without_effect_are_told_before_the_weights_are_read(
    chat_home, monkeypatch, capsys
):
    monkeypatch.setattr("minigpt4_jax.inference.loading.load_model", None)
    options = ["--temperature=0", "--top_p=0.5", "--length_penalty=2", "--early_stopping"]

    def begin(*options):
        args = chat.parse([f"--model={chat_home / 'model'}", *options])
        common.begin_loading(args, lambda variant: generation_options(variant, args))
        return capsys.readouterr().err.splitlines()

    assert begin(*options) == [
        "note: length_penalty has no effect without beam search: set num_beams above 1",
        "note: early_stopping has no effect without beam search: set num_beams above 1",
        "note: top_p has no effect at temperature 0, which is greedy: set temperature above 0",
    ]
    assert begin("--temperature=0") == []


@pytest.mark.parametrize(
    ("model", "message"),
    [("a.png", "a.png is not a model directory"), ("", "the model directory is an empty name")],
)
def test_what_is_no_model_directory(chat_home, chat_command, model, message):
    code, out, err = chat_command(f"--model={model and chat_home / model}", "--prompt=x")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_pasted_lines_are_commands_and_one_question():
    """A paste reaches the session as one line with line breaks."""
    session = Session.__new__(Session)
    session.images, session.options, asked = [], {}, []
    session._ask = asked.append
    done = {name: [] for name in ("image", "set")}
    with pytest.MonkeyPatch.context() as patch:
        for name, texts in done.items():
            patch.setitem(COMMANDS, name, lambda _, text, texts=texts: texts.append(text))
        assert session.handle("/image my a.png\n/set top_k=3 \nWhat is\n/image b.png\nhere?")
        assert not session.handle("/quit\nnot asked")
        with pytest.raises(
            UserError, match=r"^/usr/bin is not a command.* starts with / is //usr/bin$"
        ):
            session.handle("/usr/bin\nnot asked")
        assert session.handle("//usr\nis it?") and session.handle("/set a=1\n\n")
    assert done == {"image": ["my a.png"], "set": ["top_k=3", "a=1"]}
    assert asked == ["What is\n/image b.png\nhere?", "/usr\nis it?"]


def test_errors_in_a_pipe_are_reported_and_skipped(chat_piped, tmp_path):
    (tmp_path / "taken.json").write_text("mine")
    lines = [
        "one", "/image", "/image none.png", "/image 'a", "/set temperature", "/set temperature=-1",
        "/set top_k=1.5", "/set colour=1", "/save", f"/save {tmp_path}/taken.json",
        "/set num_beams=2 num_return_sequences=2",
        f"/save {tmp_path}/no/where.json", "/dance", "two <ImageHere>", "/undo", "/undo", "/retry",
        "one",
    ]  # fmt: skip
    code, out, err = chat_piped("\n".join(lines))
    assert code == 2
    first, last = out.splitlines()
    assert first == last  # /undo returned the image to the next question
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 15 and "Traceback" not in err, err
    assert (tmp_path / "taken.json").read_text() == "mine"


def test_ctrl_c_stops_an_answer_and_not_the_program(chat_home, monkeypatch, capsys):
    session_args = chat.parse(arguments(chat_home, "--temperature=0"))
    session = Session(minigpt4_jax.load(chat_home / "model", "float32"), session_args)
    uncut = Session(session.conversation.model, session_args).answer("one")
    stream = session.conversation.model.stream_request

    def interrupted(*args):
        yield next(stream(*args))
        raise KeyboardInterrupt

    def lines():
        with monkeypatch.context() as patch:
            patch.setattr(session.conversation.model, "stream_request", interrupted)
            yield "one"
        assert len(session.conversation.turns) == 1
        yield "two"
        yield KeyboardInterrupt()
        raise EOFError

    typed = lines()

    def read(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "line_editing", lambda *_: contextlib.nullcontext())
    assert chat.terminal(session) == 0
    out = capsys.readouterr().out.splitlines()
    assert [t.answer for t in session.conversation.turns] == [line.strip() for line in out]
    assert len(out) == 2 and uncut.startswith(out[0]) and len(out[0]) < len(uncut)


def test_two_images_and_none(chat_home, chat_command):
    model = f"--model={chat_home / 'model'}"
    rest = ["--prompt=what is it", "--temperature=0", "--max_new_tokens=6", "--dtype=float32"]
    results = [
        chat_command(model, *[f"--image={chat_home / 'a.png'}"] * n, *rest) for n in range(3)
    ]
    assert all(code == 0 and out.strip() for code, out, _ in results)
    assert len({out for _, out, _ in results}) == 3


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--image={home}/none.png"], "none.png: there is no such file"),
        (["--image={home}"], "is a directory"),
        (["--image={home}/web.png"], "web.png: is a web page"),
        (["--image={home}/half.png"], "half.png"),
        (["--image={home}/huge.png"], "huge.png"),
        (["--model={home}"], "is not a model directory"),
        (["--model={home}/none"], "is not a model directory"),
        (["--prompt="], "--prompt is empty"),
        (["--prompt=  "], "--prompt is empty"),
        (["--prompt=a <ImageHere> b <ImageHere>"], "2 <ImageHere> and 1 images"),
        (["--temperature=-1"], "temperature -1"),
        (["--temperature=hot"], "hot"),
        (["--top_p=2"], "top_p 2"),
        (["--max_new_tokens=0"], "max_new_tokens 0"),
        (["--max_new_tokens=5000"], "max_new_tokens 5000"),
        (["--dtype=int3"], "int3"),
        (["--temprature=1"], "--temprature"),
        (["--template=moon"], "template 'moon' is not known"),
        (["--quantize=int2"], "int2"),
    ],
)
def test_errors_are_one_line(chat_home, chat_command, changed, message):
    (chat_home / "web.png").write_text("<html>no</html>")
    (chat_home / "half.png").write_bytes((chat_home / "a.png").read_bytes()[:200])
    header = b"P6 60000 60000 255\n"  # claims 3.6 billion pixels
    (chat_home / "huge.png").write_bytes(header + bytes(100))
    code, out, err = chat_command(
        *ask(chat_home), *(text.format(home=chat_home) for text in changed)
    )
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err


@pytest.mark.parametrize("template", ["moon", "tokenizer"])
def test_an_unknown_template_is_told_before_the_weights_are_read(
    chat_home, chat_command, monkeypatch, template
):
    monkeypatch.setattr("minigpt4_jax.inference.loading.load_model", None)
    code, out, err = chat_command(*ask(chat_home, f"--template={template}"))
    assert (code, out) == (2, "") and err.startswith(f"error: template {template!r}")


def test_a_missing_model_is_reported(chat_command):
    code, out, err = chat_command("--prompt=x")
    assert (code, out) == (2, "") and "--model" in err


# --- boxes ------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on(chat_home, chat_piped, tmp_path):
    """--load: as if it had not been interrupted; a picture may be inside the file."""
    saved = tmp_path / "conversation.json"
    _, whole, _ = chat_piped(f"one\n/save {saved}\n/image {chat_home}/a.png\ntwo\n")
    document = json.loads(saved.read_text())
    document["turns"][0]["images"] = [embedded_image((chat_home / "a.png").read_bytes())]
    saved.write_text(json.dumps(document))
    code, out, err = chat_piped(f"two\n/save {tmp_path}/again.json\n", f"--load={saved}")
    assert (code, out) == (0, whole.splitlines(keepends=True)[1]), err
    first, _ = json.loads((tmp_path / "again.json").read_text())["turns"]
    assert first == document["turns"][0]
