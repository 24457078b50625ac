"""Options of all commands: spellings, the home directory, and those without effect."""

import pytest

from minigpt4_jax.cli import batch, chat, common
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.training.config_cli import split_config_argument

FILES = ["--model=m", "--input=i", "--output=o"]


def test_words_are_joined_by_either_sign():
    args = batch.parse([*FILES, "--num-beams", "3", "--max-new-tokens=7", "--kv_cache=int8",
                        "--retry_errors", "--batch-size=2"])  # fmt: skip
    assert (args.num_beams, args.max_new_tokens, args.batch_size) == (3, 7, 2)
    assert args.kv_cache == "int8" and args.retry_errors


def test_what_follows_two_dashes_is_left():
    p = Parser()
    p.add_argument("--a_b")
    p.add_argument("rest", nargs="*")
    assert p.parse_args(["--a-b=1", "--", "--a-b"]).rest == ["--a-b"]


def test_an_unknown_option_names_the_nearest():
    for option, near in (("--temprature=1", "--temperature"), ("--imagee=x", "--image")):
        with pytest.raises(UserError, match=f"did you mean {near}?"):
            chat.parse(["--model=m", option])
    with pytest.raises(UserError, match=r"unrecognized arguments: --qqq \(see"):
        chat.parse(["--model=m", "--qqq"])


def test_home_directory_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = chat.parse(["--model=~/m", "--image=~/a.png", "--image=b~/c", "--prompt=~5 cats"])
    assert args.model == "/home/me/m" and args.image == ["/home/me/a.png", "b~/c"]
    assert args.prompt == "~5 cats"
    words = ["--config=finetune", "--workdir=~/w", "--config.model=~/m"]
    assert split_config_argument(words)[1] == ["--workdir=/home/me/w", "--config.model=/home/me/m"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"top_p": 0.5}, ["top_p has no effect at temperature 0"]),
        ({"seed": 3, "top_k": 4}, ["top_k has no", "seed has no"]),
        ({"top_p": 1.0, "top_k": 0, "temperature": 0.0}, []),
        ({"top_p": 0.5, "temperature": 0.7}, []),
        ({"length_penalty": 2.0}, ["length_penalty has no effect without beam search"]),
        ({"early_stopping": True, "temperature": 1.0}, ["early_stopping has no effect"]),
        ({"length_penalty": 2.0, "num_beams": 2}, []),
    ],
)
def test_options_without_effect_are_said(given, words):
    lines = common.unused_options(given, GenerationConfig(**given))
    assert [line[: len(word)] for line, word in zip(lines, words, strict=True)] == words


def test_batch_says_what_has_no_effect(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    with pytest.raises(UserError, match="m is not a model directory"):
        batch.main(["--model=m", f"--input={rows}", f"--output={tmp_path / 'o'}", "--top_p=0.5"])
    assert capsys.readouterr().err == (
        "note: top_p has no effect at temperature 0, which is greedy: set temperature above 0\n"
    )


def test_values_of_set():
    parse = common.parse_options
    assert parse(["stop=a", "stop=b", "num-beams=2"]) == {"stop": ("a", "b"), "num_beams": 2}
    assert parse(["stop="]) == {"stop": ()}
    for words, message in (
        (["top_k=1", "top_k=2"], "top_k is given twice"),
        (["early_stopping"], "early_stopping has no value; expected early_stopping=VALUE"),
        (["temprature=1"], "did you mean temperature"),
    ):
        with pytest.raises(UserError, match=message):
            parse(words)
    with pytest.raises(UserError) as refused:
        parse(["zzz=1"], ("num_return_sequences",))
    assert "num_return_sequences" not in str(refused.value)
