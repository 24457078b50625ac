"""batch --shard=I/N and batch merge: the parts together are the answers of one run, or gaps are named."""

import json

import pytest

from minigpt4_jax import errors
from minigpt4_jax.cli import batch, common

COUNT, SHARDS = 7, 3


@pytest.fixture(scope="module")
def rows(chat_home, tmp_path_factory):
    path = tmp_path_factory.mktemp("shards") / "rows.jsonl"
    lines = [
        {"id": n, "image": str(chat_home / "a.png"), "prompt": f"what {n}"} for n in range(COUNT)
    ]
    lines[5]["image"] = "none.png"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def command(capsys, monkeypatch, chat_home, rows, loaded_models):
    """command(output, *options) -> (exit code, stdout, stderr) of batch, or of batch merge."""
    load_model = common.load_model

    def load_once(args):
        if "batch" not in loaded_models:
            loaded_models["batch"] = load_model(args)
        return loaded_models["batch"]

    monkeypatch.setattr(common, "load_model", load_once)

    def run(out, *options, merge=False):
        options = (f"--input={rows}", f"--output={out}", *options)
        model = (
            f"--model={chat_home / 'model'}",
            "--max_new_tokens=4",
            "--temperature=2",
            "--seed=3",
        )
        argv = ["merge", *options] if merge else [*model, *options]
        with pytest.raises(SystemExit) as stop:
            errors.run(lambda: batch.main(argv))
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_the_merged_shards_are_the_answers_of_one_run(command, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert command(whole)[0] == 1  # the row without its image has an error
    for index in (3, 1):
        command(out, f"--shard={index}/{SHARDS}")
    code, _, err = command(out, merge=True)
    assert code == 2 and "2 rows are not answered: rows 3 to 4 (--shard=2/3)" in err
    assert not out.exists()
    command(out, f"--shard=2/{SHARDS}")
    part = tmp_path / "out-00003-of-00003.jsonl"
    complete = part.read_bytes()
    part.write_bytes(complete[:-5])
    code, _, err = command(out, merge=True)
    assert code == 2 and "1 rows are not answered: row 7 (--shard=3/3)" in err
    part.write_bytes(complete)
    code, said, _ = command(out, merge=True)
    assert code == 1 and said.startswith("7 rows, 1 of them with an error")
    assert out.read_bytes() == whole.read_bytes()
    assert command(out)[1].startswith("all 7 rows are answered already")  # as one run continues


def test_more_shards_than_rows(command, tmp_path):
    out = tmp_path / "out.jsonl"
    for index in range(1, 2 * COUNT + 1):
        assert command(out, f"--shard={index}/{2 * COUNT}")[0] in (0, 1)
    assert command(out, merge=True)[1].startswith("7 rows")


def test_what_cannot_be_merged(command, rows, tmp_path):
    out = tmp_path / "out.jsonl"
    code, _, err = command(out, merge=True)
    assert code == 2 and "there are no parts beside it" in err
    command(out, "--shard=1/2")
    command(out, "--shard=2/2", "--top_k=5")
    code, _, err = command(out, merge=True)
    assert code == 2 and "was answered with top_k 5" in err
    command(out, "--shard=1/1")
    code, _, err = command(out, merge=True)
    assert code == 2 and "of runs with 1, 2 shards" in err
    for path in tmp_path.glob("out-*-of-00002*"):
        path.unlink()
    out.write_text("something else\n")
    code, _, err = command(out, merge=True)
    assert code == 2 and "was not written by this command" in err
    assert out.read_text() == "something else\n"


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_wrong_shards(command, tmp_path, shard):
    code, _, err = command(tmp_path / "out", f"--shard={shard}")
    assert code == 2 and "expected I/N with I from 1 to N" in err
    assert not any(tmp_path.iterdir())
