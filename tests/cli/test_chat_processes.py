"""python -m minigpt4_jax.chat in a process of its own: terminals, pipes and signals."""

import json
import os
import signal
import subprocess
import sys

import pexpect
import pytest
from helpers.chat_command import arguments, ask


def test_as_a_program(chat_home):
    """Only the answer on stdout, and no traceback for a user error."""
    program = [sys.executable, "-m", "minigpt4_jax.chat"]
    done = subprocess.run([*program, *ask(chat_home)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.count("\n") == 1
    wrong = subprocess.run(
        [*program, *ask(chat_home), "--image=/no/such.png"], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr == "error: image /no/such.png: there is no such file\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")
def test_in_a_terminal(chat_home, tmp_path):
    """Line editing, completion, a paste as one question, history in a file, Ctrl-D."""
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    command = ["-m", "minigpt4_jax.chat", *arguments(chat_home, "--temperature=0")]
    saved = tmp_path / "conversation.json"
    typed = [
        "whar\x7ft is it\r",
        "/set top_k=7\r",
        "\x1b[200~one\ntwo\nthree\x1b[201~\r",  # as the terminal marks a paste
        f"/sa\t{saved}\r",
        "\x04",
    ]
    output = b""
    with pexpect.spawn(sys.executable, command, env=environment, timeout=120) as child:
        for text in typed:
            child.expect_exact("> ")
            output += child.before
            child.send(text)
        child.expect(pexpect.EOF)
        output += child.before
    assert child.exitstatus == 0
    assert b"top_k=7  " in output and b"error" not in output
    turns = json.loads(saved.read_text())["turns"]
    assert [turn["question"] for turn in turns] == ["what is it", "one\ntwo\nthree"]
    history = (tmp_path / "minigpt4_jax" / "chat_history").read_text().splitlines()
    lines = [line for line in history if not line.startswith("_HiStOrY")]
    assert lines[:2] == ["what is it", "/set top_k=7"]


def test_broken_input_and_output_pipes(chat_home):
    """Bytes that are not UTF-8, Ctrl-C during an answer, and a reader that exits."""
    program = [sys.executable, "-m", "minigpt4_jax.chat", f"--model={chat_home / 'model'}"]
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
