"""Fixtures for tests of `python -m convert`."""

import pytest


@pytest.fixture
def files(tmp_path):
    from helpers.released_files import make_files

    return make_files(tmp_path)


@pytest.fixture
def command(capsys):
    """command(*arguments) -> (exit code, stdout, stderr) of `python -m convert`."""
    from convert.cli import main
    from minigpt4_jax import errors

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: main([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(command):
    """refused(*arguments) -> the one line that `python -m convert` ends with."""

    def run(*arguments):
        code, _, err = command(*arguments)
        lines = err.strip().splitlines()
        assert code == 2, err
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return run
