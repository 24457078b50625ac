"""python -m minigpt4_jax.chat: answers on stdout, and one line on stderr for what cannot be answered."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from training import tiny

from minigpt4_jax import chat, errors


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


def test_an_answer_is_one_line_and_greedy_is_repeatable(home, command):
    code, out, err = command(*ask(home))
    assert (code, err) == (0, "")
    assert out.strip() and out.count("\n") == 1
    assert command(*ask(home, "--seed=5"))[1] == out


def test_sampling_follows_the_seed(home, command):
    question = arguments(home, "--prompt=what is it", "--temperature=2", "--top_k=20")
    first, second, again = (command(*question, f"--seed={seed}")[1] for seed in (1, 2, 1))
    assert first == again != second


def test_questions_from_standard_input(home, command, monkeypatch):
    """Each line is a question of its own; empty lines are passed over."""
    lines = "what is it\n\n  \nhow many?  \nwhat is it\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = command(*arguments(home, "--temperature=0"))
    assert (code, err) == (0, "")
    first, second = (command(*ask(home, f"--prompt={q}"))[1] for q in ("what is it", "how many?"))
    assert first != second
    assert out == first + second + first


def test_two_images_and_none(home, command):
    model = f"--model={home / 'model'}"
    rest = ["--prompt=what is it", "--temperature=0", "--max_new_tokens=6", "--dtype=float32"]
    found = [command(model, *[f"--image={home / 'a.png'}"] * n, *rest) for n in range(3)]
    assert all(code == 0 and out.strip() for code, out, _ in found)
    assert len({out for _, out, _ in found}) == 3


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
    ],
)
def test_refused_in_one_line(home, command, changed, message):
    (home / "web.png").write_text("<html>no</html>")
    (home / "half.png").write_bytes((home / "a.png").read_bytes()[:200])
    header = b"P6 60000 60000 255\n"  # says it holds 3.6 billion pixels
    (home / "huge.png").write_bytes(header + bytes(100))
    code, out, err = command(*ask(home), *(text.format(home=home) for text in changed))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err


def test_no_model_is_named(command):
    code, out, err = command("--prompt=x")
    assert (code, out) == (2, "") and "--model" in err


def test_as_a_program(home):
    """What a shell sees: the answer alone on stdout; no traceback where there is none."""
    program = [sys.executable, "-m", "minigpt4_jax.chat"]
    done = subprocess.run([*program, *ask(home)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.count("\n") == 1
    wrong = subprocess.run(
        [*program, *ask(home), "--image=/no/such.png"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: image /no/such.png: there is no such file\n"
