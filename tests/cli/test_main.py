"""The console script `minigpt4`: its list of commands, its mistakes, and that it starts each command."""

import signal
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from minigpt4_jax.cli import evaluate_run, main


@pytest.fixture(autouse=True)
def signal_handlers():
    """`convert` sets handlers for its process, which is that of the tests here."""
    handled = [getattr(signal, name) for name in ("SIGTERM", "SIGPIPE") if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in handled]
    yield
    for number, handler in zip(handled, before, strict=True):
        signal.signal(number, handler)


def call(capsys, *argv):
    """(exit code, stdout, stderr) of `minigpt4 ARGV...`."""
    with pytest.raises(SystemExit) as e:
        main.run(argv)
    captured = capsys.readouterr()
    return e.value.code, captured.out, captured.err


@pytest.mark.smoke
def test_help_lists_every_command_on_one_line(capsys):
    code, out, err = call(capsys, "--help")
    assert (code, err) == (0, "") and "usage: minigpt4" in out
    for name, command in main.COMMANDS.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(command.summary) and len(line) <= 80
    assert call(capsys) == (2, out, "")


def test_version(capsys):
    code, out, _ = call(capsys, "--version")
    assert code == 0 and out.startswith("minigpt4_jax ")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("tarin", "did you mean train?"), ("batches", "did you mean batch?"), ("xyz", "known are")],
)
def test_an_unknown_command_names_the_nearest(capsys, typed, hint):
    code, out, err = call(capsys, typed, "--help")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: {typed!r} is not a command") and hint in err


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_help(capsys, name):
    code, out, _ = call(capsys, name, "--help")
    assert code == 0 and "usage: " in out


@pytest.mark.parametrize("name", ["chat", "batch", "serve", "evaluate"])
def test_the_help_of_no_exif_says_the_default_of_the_command(capsys, name):
    """Benchmarks have boxes for the stored pixels."""
    code, out, _ = call(capsys, name, "--help")
    words = " ".join(out.partition("  --no-exif")[2].split("\n  --")[0].split())
    assert code == 0 and words.startswith("use images as they are stored, as the original")
    rotated = name != "evaluate"
    assert ("by default they are rotated" in words) == rotated
    assert ("this is the default of this command" in words) != rotated
    assert evaluate_run.parser().get_default("exif") is False


def test_arguments_reach_the_command(capsys):
    code, out, err = call(capsys, "check-data", "stage9")
    assert (code, out) == (2, "") and "stage9" in err
    code, _, err = call(capsys, "chat", "--model=/no/such/model", "--prompt=x")
    assert code == 2 and err.startswith("error: /no/such/model")


@pytest.mark.smoke
def test_in_a_process():
    """--help does not import JAX."""
    code = (
        "import sys\nfrom minigpt4_jax.cli.main import run\ntry:\n    run(sys.argv[1:])\nfinally:\n"
    )
    code += "    print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
