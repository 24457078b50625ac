"""Names that other programs give to configuration keys."""

import pytest

from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config_cli import parse
from minigpt4_jax.training.config_values import SYNONYMS, known_keys, unknown_key


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "init_lr"), ("lr", "init_lr"), ("epochs", "steps"),
        ("num_train_epochs", "steps"), ("max_steps", "steps"), ("data.num_workers", "data.workers"),
        ("data.learning_rate", "init_lr"), ("LR", "init_lr"), ("max_grad_norm", "clip"),
        ("batchsize", "batch_size"), ("data.pth", "data.path"),
        ("data.batch_size", "batch_size"), ("batch", "batch_size"),
    ],
)  # fmt: skip
def test_suggestions(key, meant):
    assert str(unknown_key(key)).endswith(f"did you mean config.{meant}?")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lerning_rate", "did you mean config.init_lr?"), ("warmup_ratio", "config.warmup_steps?"),
        ("output_dir", "--workdir=DIR"), ("resume", "repeated with the same --workdir"),
        ("optimizer", "AdamW"),
    ],
)  # fmt: skip
def test_what_other_programs_call_otherwise(key, words):
    assert words in str(unknown_key(key))


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("learning_rate", "did you mean config.init_lr"), ("steps", "--config.steps")],
)
def test_a_key_without_config_is_explained(flag, meant):
    with pytest.raises(UserError, match=f"--{flag} is not an option: .*{meant}"):
        parse(["--config=finetune", "--workdir=w", f"--{flag}=1"])


def test_synonyms_are_no_keys():
    keys, synonyms = known_keys(), [s for names in SYNONYMS.values() for s in names]
    assert set(SYNONYMS) <= set(keys)
    assert not {key.rsplit(".", 1)[-1] for key in keys} & {*synonyms} - {"scheduler"}
    assert len(synonyms) == len(set(synonyms))
