"""python -m minigpt4_jax.chat: answers on stdout, errors as one line on stderr."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pexpect
import pytest
from helpers import tiny
from PIL import Image

import minigpt4_jax
from minigpt4_jax import errors
from minigpt4_jax.cli import chat, common
from minigpt4_jax.inference.conversation import Conversation
from minigpt4_jax.inference.model import Model
from minigpt4_jax.processing.tasks import caption
from minigpt4_jax.visualization.boxes import draw_boxes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_random_model(folder / "model")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


@pytest.fixture
def command(capsys):
    """command(*arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: chat.main([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def arguments(home, *more):
    short = ["--max_new_tokens=6", "--dtype=float32"]
    return [f"--model={home / 'model'}", f"--image={home / 'a.png'}", *short, *more]


def ask(home, *more):
    return arguments(home, "--prompt=what is it", "--temperature=0", *more)


def test_an_answer_is_one_line_and_greedy_decoding_is_repeatable(home, command):
    code, out, err = command(*ask(home))
    assert (code, err) == (0, "")
    assert out.strip() and out.count("\n") == 1
    assert command(*ask(home, "--seed=5"))[1] == out


def test_sampling_follows_the_seed(home, command):
    question = arguments(home, "--prompt=what is it", "--temperature=2", "--top_k=20")
    first, second, again = (command(*question, f"--seed={seed}")[1] for seed in (1, 2, 1))
    assert first == again != second


def piped(home, command, monkeypatch, text, *more):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return command(*arguments(home, "--temperature=0", *more))


def test_a_pipe_is_one_conversation(home, command, monkeypatch):
    """Empty lines are skipped; the image comes with the first question."""
    code, out, err = piped(home, command, monkeypatch, "what is it\n\n  \nhow many?  \n")
    assert (code, err) == (0, "")
    talk = minigpt4_jax.load(home / "model", "float32").conversation()
    options = chat.DEFAULTS | {"temperature": 0.0, "max_new_tokens": 6}
    first = talk.ask("what is it", [home / "a.png"], **options)
    assert out == f"{first}\n{talk.ask('how many?', **options)}\n"


def test_commands(home, command, monkeypatch, tmp_path):
    """The effect of each, as the saved conversation shows it."""
    picture, saved = tmp_path / "my b.png", tmp_path / "talk.json"
    Image.open(home / "a.png").rotate(90).save(picture)
    lines = f"""one
    two
    /undo
    three
    /image "{picture}" {home}/a.png
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
    code, out, err = piped(home, command, monkeypatch, lines)
    assert code == 0, err
    assert len(out.splitlines()) == 6, out
    turns = json.loads(saved.read_text())["turns"]
    a, b = str(home / "a.png"), str(picture)
    questions = [(t["question"], t["images"]) for t in turns]
    assert questions == [("one", [a]), ("three", []), ("/four", [b, a])]
    assert [t["answer"] for t in turns] == [out.splitlines()[i] for i in (0, 2, 3)]
    (last,) = json.loads((tmp_path / "last.json").read_text())["turns"]
    assert (last["question"], last["images"]) == ("five", [b])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.json", "my b.png", "talk.json"]


def test_set_changes_the_next_answers(home, command, monkeypatch):
    lines = "one\n/set temperature=2 top_k=0 seed=3\n/retry\n/retry\n/set temperature=0\n/retry\n"
    code, out, err = piped(home, command, monkeypatch, lines)
    answers = out.splitlines()
    assert code == 0 and answers[0] == answers[3] and len(set(answers)) == 3, out
    assert "temperature=2.0" in err and "top_k=0" in err


def test_set_takes_several_spellings(home, command, monkeypatch):
    lines = (
        "/set temperature 0.5\n/set top_k = 7 min_p= 0.1 stop=it\n/set stop_ids=3,4 compat=true\n"
    )
    lines += "/set temperature=0 top_p=1 top_k=0 min_p=0 num_beams 2\none\n/retry\n"
    code, out, err = piped(home, command, monkeypatch, lines)
    assert code == 0, err
    for text in ("temperature=0.5", "top_k=7", "min_p=0.1", "('it',)", "(3, 4)", "compat=True"):
        assert text in err
    first, again = out.splitlines()
    assert first == again  # a search draws nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=-1"], "temperature -1"),
        (["--top_p=2"], "top_p 2"),
        (["--num_beams=3", "--temperature=1"], "num_beams 3 with temperature 1"),
        (["--num_beams=0"], "num_beams 0"),
        (["--stop="], "stop 0 is ''"),
        (["--max_new_tokens=0"], "max_new_tokens 0"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(
    home, command, monkeypatch, options, message
):
    monkeypatch.setattr(common, "load_model", None)
    code, out, err = command(*arguments(home, "--prompt=x", *options))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_pasted_lines_are_one_question_and_tab_completes(home, tmp_path):
    """The terminal marks a paste; GNU readline takes it as one line."""
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    command = ["-m", "minigpt4_jax.chat", *arguments(home, "--temperature=0")]
    saved = tmp_path / "talk.json"
    with pexpect.spawn(sys.executable, command, env=environment, timeout=120) as child:
        typed = ["\x1b[200~one\ntwo\nthree\x1b[201~\r", f"/sa\t{saved}\r", "\x04"]
        for text in typed:
            child.expect_exact("> ")
            child.send(text)
        child.expect(pexpect.EOF)
    (turn,) = json.loads(saved.read_text())["turns"]
    assert turn["question"] == "one\ntwo\nthree"


def test_errors_in_a_pipe_are_reported_and_skipped(home, command, monkeypatch, tmp_path):
    (tmp_path / "taken.json").write_text("mine")
    lines = [
        "one", "/image", "/image none.png", "/image 'a", "/set temperature", "/set temperature=-1",
        "/set top_k=1.5", "/set colour=1", "/save", f"/save {tmp_path}/taken.json",
        f"/save {tmp_path}/no/where.json", "/dance", "two <ImageHere>", "/undo", "/undo", "/retry",
        "one",
    ]  # fmt: skip
    code, out, err = piped(home, command, monkeypatch, "\n".join(lines))
    assert code == 2
    first, last = out.splitlines()
    assert first == last  # /undo returned the image to the next question
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 14 and "Traceback" not in err, err
    assert (tmp_path / "taken.json").read_text() == "mine"


def test_ctrl_c_stops_an_answer_and_not_the_program(home, monkeypatch, capsys):
    session = chat.Session(
        minigpt4_jax.load(home / "model", "float32"),
        chat.parse(arguments(home, "--temperature=0")),
    )
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
    monkeypatch.setattr(chat, "_line_editing", contextlib.nullcontext)
    assert chat.terminal(session) == 0
    out = capsys.readouterr().out.splitlines()
    assert [t.answer for t in session.conversation.turns] == [line.strip() for line in out]
    assert len(out) == 2 and len(out[0]) < len(out[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_in_a_terminal(home, tmp_path):
    """Line editing, history in a file, Ctrl-D."""
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    command = ["-m", "minigpt4_jax.chat", *arguments(home, "--temperature=0")]
    with pexpect.spawn(sys.executable, command, env=environment, timeout=120) as child:
        for typed in ("whar\x7ft is it\r", "/set top_k=7\r"):
            child.expect_exact("> ")
            child.send(typed)
        child.expect_exact("top_k=7  ")
        child.expect_exact("> ")
        child.send("\x04")
        child.expect(pexpect.EOF)
        assert b"error" not in child.before
    assert child.exitstatus == 0
    history = (tmp_path / "minigpt4_jax" / "chat_history").read_text().splitlines()
    assert [line for line in history if not line.startswith("_HiStOrY")] == [
        "what is it", "/set top_k=7",
    ]  # fmt: skip


def test_two_images_and_none(home, command):
    model = f"--model={home / 'model'}"
    rest = ["--prompt=what is it", "--temperature=0", "--max_new_tokens=6", "--dtype=float32"]
    results = [command(model, *[f"--image={home / 'a.png'}"] * n, *rest) for n in range(3)]
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
def test_errors_are_one_line(home, command, changed, message):
    (home / "web.png").write_text("<html>no</html>")
    (home / "half.png").write_bytes((home / "a.png").read_bytes()[:200])
    header = b"P6 60000 60000 255\n"  # claims 3.6 billion pixels
    (home / "huge.png").write_bytes(header + bytes(100))
    code, out, err = command(*ask(home), *(text.format(home=home) for text in changed))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err


def test_a_missing_model_is_reported(command):
    code, out, err = command("--prompt=x")
    assert (code, out) == (2, "") and "--model" in err


def test_as_a_program(home):
    """Only the answer on stdout, and no traceback for a user error."""
    program = [sys.executable, "-m", "minigpt4_jax.chat"]
    done = subprocess.run([*program, *ask(home)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.count("\n") == 1
    wrong = subprocess.run(
        [*program, *ask(home), "--image=/no/such.png"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: image /no/such.png: there is no such file\n"


def test_broken_input_and_output_pipes(home):
    """Bytes that are not UTF-8, Ctrl-C during an answer, and a reader that exits."""
    program = [sys.executable, "-m", "minigpt4_jax.chat", f"--model={home / 'model'}"]
    program += ["--dtype=float32", "--temperature=0", "--max_new_tokens=1500"]
    program += ["--min_new_tokens=1500"]
    flags = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(program, **flags) as child:
        # full answers of these weights to these questions have no line break, wherever the first is cut
        child.stdin.write(b"which colour \xff\n")
        child.stdin.flush()
        first = child.stdout.read(1)  # the answer has begun
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(b"/reset\n/set max_new_tokens=3\nwhat is it\n", timeout=120)
    assert child.returncode == 0, err
    assert len((first + out).splitlines()) == 2 and b"max_new_tokens=3" in err
    with subprocess.Popen(program, **flags) as child:
        child.stdout.close()
        child.stdin.write(b"/set max_new_tokens=3\nwhat is it\none\n")
        child.stdin.close()
        err = child.stderr.read()
    assert child.returncode == 141 and b"Traceback" not in err and b"Broken" not in err, err


# --- boxes ------------------------------------------------------------------------------------


@pytest.fixture
def answers_with(monkeypatch):
    """answers_with(text): every answer is this text; returns the questions that were asked."""

    def replace(text):
        questions = []

        def stream(self, request, *rest):
            yield text

        def answer(self, requests, **options):
            return [[SimpleNamespace(text=text, error=None)]]

        prepare = Conversation._prepare
        monkeypatch.setattr(
            Conversation,
            "_prepare",
            lambda s, t, *rest: questions.append(t) or prepare(s, t, *rest),
        )
        monkeypatch.setattr(Model, "stream_request", stream)
        monkeypatch.setattr(Model, "answer_requests", answer)
        return questions

    return replace


BOXES = "<p>a cup</p> {<10><20><50><60>}"


def test_the_boxes_of_an_answer_are_saved(home, command, answers_with, tmp_path):
    questions = answers_with(BOXES)
    out = tmp_path / "boxes.png"
    code, text, err = command(
        *arguments(home, "--task=refer", "--prompt=the cup", f"--save-image={out}")
    )
    assert (code, text, err) == (0, f"{BOXES}\n", f"wrote {out}\n")
    assert questions == ["[refer] give me the location of the cup"]
    drawn = draw_boxes(home / "a.png", BOXES)
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(drawn))


def test_a_task_by_name_needs_no_prompt_where_it_takes_none(home, command, answers_with):
    questions = answers_with("a cup")
    assert command(*arguments(home, "--task=caption"))[:2] == (0, "a cup\n")
    assert command(*arguments(home, "--task=identify", "--prompt=4,6,20,30"))[0] == 0
    # the image is 40 x 30 pixels
    assert questions == [caption(), "[identify] what is this {<10><20><50><100>}"]


def test_a_rotated_photo_is_asked_about_and_drawn_as_it_is_shown(
    home, command, answers_with, tmp_path
):
    questions = answers_with(BOXES)
    image = Image.open(home / "a.png")  # 40 x 30
    exif = Image.Exif()
    exif[0x0112] = 6
    photo, shown = tmp_path / "photo.png", image.transpose(Image.Transpose.ROTATE_270)
    image.save(photo, exif=exif)
    task = ["--task=identify", "--prompt=3,8,15,40", f"--image={photo}"]
    for options, expected in (([], shown), (["--no-exif"], None)):
        out = tmp_path / f"{len(options)}.png"
        code, _, err = command(*arguments(home, *task, f"--save-image={out}", *options))
        if expected is None:  # 40 is beyond the height
            assert code == 2 and "not within the image of 40 x 30" in err
            continue
        assert code == 0, err
        assert np.array_equal(np.asarray(Image.open(out)), np.asarray(draw_boxes(expected, BOXES)))
    assert questions == ["[identify] what is this {<10><20><50><100>}"]


def test_an_answer_without_boxes_is_printed_and_nothing_is_saved(
    home, command, answers_with, tmp_path
):
    answers_with("A cup.")
    out = tmp_path / "boxes.png"
    code, text, err = command(*ask(home, f"--save-image={out}"))
    assert (code, text) == (2, "A cup.\n") and not out.exists()
    assert err == "error: the answer has no boxes to draw: 'A cup.'\n"


def test_boxes_are_saved_in_a_conversation(home, command, monkeypatch, answers_with, tmp_path):
    answers_with(BOXES)
    out, other = tmp_path / "b.png", tmp_path / "other.png"
    other.write_text("mine")
    lines = f"/boxes {out}\n[refer] a cup\n/boxes {out}\nand now?\n/boxes {out}\n/boxes {other}\n/boxes\n"
    code, _, err = piped(home, command, monkeypatch, lines)
    assert code == 2 and Image.open(out).size == (500, 375) and other.read_text() == "mine"
    assert err.splitlines() == [
        "error: no question about an image has been answered yet; ask one first",
        f"wrote {out}",
        f"wrote {out}",  # a file of this session may be overwritten
        f"error: {other} exists already; choose another name",
        "error: /boxes needs one file, for instance /boxes boxes.png",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--task=find", "--prompt=x"], "--task"),
        (["--task=refer"], "--task needs --prompt"),
        (["--task=caption", "--prompt=x"], "takes no text"),
        (["--task=identify", "--prompt=1,2,3,99"], "not within the image of 40 x 30"),
        (["--save-image=a.png"], "--save-image needs --prompt"),
        (["--save-image=a.txt", "--prompt=x"], "a.txt: expected the name of a picture"),
        (["--save-image=no/a.png", "--prompt=x"], "no directory no"),
    ],
)
def test_wrong_options_for_boxes_are_refused_before_the_model_is_loaded(
    home, command, monkeypatch, options, words
):
    monkeypatch.setattr(common, "load_model", None)
    code, out, err = command(*arguments(home, *options))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
