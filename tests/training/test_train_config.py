"""Configurations: the shipped ones, command-line overrides, invalid values."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import STAGE2_PROMPTS
from minigpt4_jax.training import config_cli, config_values
from minigpt4_jax.training.config import TrainConfig

BASE = ["--workdir=w", "--config.model=m", "--config.data.path=d.jsonl"]


def parse(*args, config="stage2"):
    return config_cli.parse([f"--config={config}", *BASE, *args])[0]


# --- the recipe (SPEC 10) ----------------------------------------------------------------------


@pytest.mark.parametrize("arg", ["", ":vicuna7b", ":vicuna13b", ":llama2"])
def test_stage1_is_the_original_recipe(arg):
    c = parse(config="stage1" + arg)
    assert (c.init_lr, c.min_lr, c.warmup_lr, c.warmup_steps) == (1e-4, 8e-5, 1e-6, 5000)
    assert (c.steps, c.batch_size, c.weight_decay, c.clip) == (20_000, 256, 0.05, 0.0)
    assert (c.beta1, c.beta2, c.eps, c.schedule) == (0.9, 0.999, 1e-8, "cosine")
    assert (c.end_symbol, c.max_text_length, c.data.prompts) == ("\n", 32, ())
    assert c.data.clean_captions and c.freeze_vit and c.freeze_qformer


@pytest.mark.parametrize("arg", ["", ":vicuna7b", ":vicuna13b", ":llama2"])
def test_stage2_is_the_original_recipe(arg):
    c = parse(config="stage2" + arg)
    assert (c.init_lr, c.min_lr, c.warmup_lr, c.warmup_steps) == (3e-5, 1e-5, 1e-6, 200)
    assert (c.steps, c.batch_size, c.weight_decay) == (1000, 12, 0.05)
    assert c.end_symbol == ("</s>" if arg == ":llama2" else "###")
    assert (c.max_text_length, c.data.prompts) == (160, STAGE2_PROMPTS)
    assert c.variant == ("minigpt4-llama2" if arg == ":llama2" else "minigpt4-vicuna")
    assert c.llm_width == (5120 if arg == ":vicuna13b" else 0)


def test_finetune_keeps_the_text_format_of_the_model():
    c = parse(config="finetune")
    assert (c.end_symbol, c.max_text_length, c.prompt_template, c.variant) == ("", 0, "", "")


def test_lora_and_packing_on_the_command_line():
    line = ["--config.lora.rank=8", "--config.lora.targets=q,down", "--config.data.pack_tokens=512"]
    c = parse(*line, config="finetune")
    assert (c.lora.rank, c.lora.targets, c.data.pack_tokens) == (8, ("q", "down"), 512)
    for wrong in ("lora.rank=-1", "lora.alpha=-2", "lora.dropout=1.0", "data.pack_tokens=-1"):
        with pytest.raises(UserError, match=f"config.{wrong.partition('=')[0]} is"):
            parse(f"--config.{wrong}")


def test_every_shipped_config_names_only_fields_that_exist():
    for name in config_cli.known_configs():
        config_values.build(TrainConfig, config_cli.read_config_file(name), name)


# --- the command line --------------------------------------------------------------------------


def test_overrides_have_the_type_of_the_field():
    c = parse(
        "--config.steps=7", "--config.init_lr=1", "--config.remat", "--noconfig.freeze_vit",
        "--config.dtype=float32", "--config.data.workers", "3",
    )  # fmt: skip
    assert (c.steps, c.init_lr, c.remat, c.freeze_vit) == (7, 1.0, True, False)
    assert isinstance(c.init_lr, float) and c.data.workers == 3


def test_several_paths_with_commas_or_repeated_flags():
    assert parse().data.path == ("d.jsonl",)
    assert parse("--config.data.path=/a b/c.json").data.path == ("d.jsonl", "/a b/c.json")
    assert parse("--config.data.val_path=x y,z").data.val_path == ("x y", "z")
    assert parse("--config.data.prompts=one, two").data.prompts == ("one, two",)


def test_path_of_a_user_config(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg='x'):\n"
        "    return ConfigDict({'steps': 3, 'end_symbol': arg, 'data': {'path': ['a']}})\n"
    )
    c = parse(config=f"{mine}:!")
    assert (c.steps, c.end_symbol) == (3, "!")
    assert c.batch_size == TrainConfig().batch_size  # fields it does not set have their default
    assert parse("--config.keep=2", config=str(mine)).keep == 2


def test_shipped_configs_are_not_read_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "stage2.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    assert parse().steps == 1000


def invalid_config_files(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return {'steps': 1 / 0}\n")
    other = tmp_path / "other.py"
    other.write_text("def get_config():\n    return {'stepps': 1}\n")
    return broken, other


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.batch_size=0"], "config.batch_size is 0: expected a number above 0"),
        (["--config.steps=-5"], "config.steps is -5"),
        (["--config.batch_size=x"], "config.batch_size is 'x': expected int"),
        (["--config.batch_size=1.5"], "expected int"),
        (["--config.init_lr=high"], "config.init_lr is 'high': expected float"),
        (["--config.init_lr=nan"], "config.init_lr is nan"),
        (["--config.min_lr=inf"], "config.min_lr is inf"),
        (["--config.seed=-1"], "config.seed is -1: expected 0 or more"),
        (["--config.qformer_lr_scale=0.5"], "config.qformer_lr_scale is 0.5: expected 1.0, as"),
        (["--config.remat=maybe"], "config.remat is 'maybe': expected bool"),
        (["--config.batchsize=4"], "did you mean config.batch_size"),
        (["--config.path=x"], "did you mean config.data.path"),
        (["--config.data.pth=x"], "did you mean config.data.path"),
        (["--config.lr=1"], "_lr?"),
        (["--config.data=x"], "config.data is not a configuration key"),
        (["--config.accumulate=5"], "a multiple of accumulate"),
        (["--config.dtype=fp16"], "bfloat16 or float32"),
        (["--config.schedule=linear"], "cosine or step"),
        (["--config.schedule=step", "--config.steps_per_epoch=0"], "steps_per_epoch"),
        (["--config.prompt_template=hello"], "one {} in it"),
        (["--config.beta1=1"], "0 <= beta1 < 1"),
        (["--config.model="], "--config.model=DIR"),
        (["--config.data.threads=0"], "config.data.threads is 0"),
        (["--config.data.workers=-1"], "config.data.workers is -1"),
        (["stage2"], "unexpected argument 'stage2'"),
        (["--batch_size=3"], "batch_size"),
        (["--config.steps"], "config.steps"),
    ],
)  # fmt: skip
def test_invalid_override(args, message):
    with pytest.raises(UserError) as e:
        parse(*args)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("stage3", "did you mean stage2? known are blip2_stage1"),
        ("zzz", "known are blip2_stage1, blip2_stage2, finetune"),
        ("none/such.py", "there is no such file"),
        (
            "stage2:vicuna",
            "unknown argument 'vicuna'; expected vicuna7b, vicuna13b, llama2",
        ),
        ("{broken}", "line 2: ZeroDivisionError"),
        ("{other}", "did you mean config.steps"),
    ],
)
def test_invalid_config_file(config, message, tmp_path):
    broken, other = invalid_config_files(tmp_path)
    with pytest.raises(UserError) as e:
        parse(config=config.format(broken=broken, other=other))
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_missing_flags():
    with pytest.raises(
        UserError, match="--config is missing: one of blip2_stage1, blip2_stage2, finetune"
    ):
        config_cli.parse(BASE)
    with pytest.raises(UserError, match="--workdir is missing"):
        config_cli.parse(["--config=stage2"])
    with pytest.raises(UserError, match=r"data\.path"):
        config_cli.parse(["--config=stage2", "--workdir=w", "--config.model=m"])


# --- values ------------------------------------------------------------------------------------

NUMBERS = st.floats(1e-8, 1.0)


@settings(deadline=None, max_examples=25)
@given(
    steps=st.integers(1, 10**9), rate=NUMBERS, remat=st.booleans(),
    paths=st.lists(st.text("abc /._-'\"(", min_size=1).filter(str.strip), min_size=1, max_size=3),
)  # fmt: skip
def test_override_values_survive_parsing(steps, rate, remat, paths):
    expected = ("d.jsonl", *paths)
    args = [f"--config.steps={steps}", f"--config.init_lr={rate!r}", f"--config.remat={remat}"]
    # a value that starts with a bracket is parsed as Python, as ml_collections does
    args += [f"--config.data.path={p if p[0] != '(' else repr((p,))}" for p in paths]
    c = parse(*args)
    assert (c.steps, c.init_lr, c.remat, c.data.path) == (steps, rate, remat, expected)


@settings(deadline=None)
@given(steps=st.integers(1, 10**6), prompts=st.lists(st.text(min_size=1), max_size=3))
def test_to_dict_and_back(steps, prompts):
    c = TrainConfig(model="m", steps=steps, data=DataConfig(path=("d",), prompts=tuple(prompts)))
    assert config_values.from_mapping(config_values.to_dict(c)) == c


def test_differences_ignore_fields_that_do_not_change_the_result():
    c = TrainConfig(model="m", data=DataConfig(path=("d",)))
    other = dataclasses.replace(
        c, log_every=3, save_every=7, keep=9, data=dataclasses.replace(c.data, workers=4)
    )
    as_dict = config_values.to_dict
    assert config_values.differences(as_dict(c), as_dict(other)) == []
    changed = dataclasses.replace(c, seed=3, data=dataclasses.replace(c.data, path=("e",)))
    found = config_values.differences(as_dict(c), as_dict(changed))
    assert found == ["data.path: ['d'] -> ['e']", "seed: 42 -> 3"]
    assert config_values.allowed_changes(as_dict(c), as_dict(other)) == [
        "data.workers: 0 -> 4", "keep: 3 -> 9", "log_every: 10 -> 3", "save_every: 100 -> 7",
    ]  # fmt: skip


def test_steps_may_only_grow():
    short, long = (config_values.to_dict(TrainConfig(model="m", steps=n)) for n in (4, 9))
    assert config_values.differences(short, long) == []
    assert config_values.allowed_changes(short, long) == []
    assert config_values.differences(long, short) == ["steps: 9 -> 4, which may only grow"]


def test_changeable_keys_are_configuration_keys_with_a_reason():
    assert config_values.CHANGEABLE.keys() <= set(config_values.known_keys())
    assert all(config_values.CHANGEABLE.values())


# --- mixtures ----------------------------------------------------------------------------------


def mixed(tmp_path, *args, **data):
    """Parse a config file with two datasets and the given values of config.data."""
    mine = tmp_path / "mixed.py"
    values = {
        "a": {"reader": "files", "path": "a.jsonl", "ratio": 3, "batch_size": 4},
        "coco_vqa": {"path": "vqav2", "images": "coco", "ratio": 1.5},
    }
    mine.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    return ConfigDict({ {'data': {'mix': values, **data}}!r})\n"
    )
    return config_cli.parse([f"--config={mine}", "--workdir=w", "--config.model=m", *args])[0]


def test_mixture_from_a_file_and_the_command_line(tmp_path):
    c = mixed(tmp_path, "--config.data.mix.coco_vqa.ratio=2", "--config.data.mix.a.path=x,y",
              "--config.data.root=/data", "--config.data.mix_by=step")  # fmt: skip
    a, b = c.data.mix["a"], c.data.mix["coco_vqa"]
    assert (a.path, a.ratio, a.batch_size, a.reader) == (("x", "y"), 3.0, 4, "files")
    assert (b.path, b.ratio, b.images, b.batch_size) == (("vqav2",), 2.0, "coco", 0)
    assert (c.data.root, c.data.max_broken) == ("/data", 0.01)
    assert config_values.from_mapping(config_values.to_dict(c)) == c
    other = mixed(tmp_path, "--config.data.mix.a.ratio=4", "--config.data.max_broken=0.5")
    found = config_values.differences(
        config_values.to_dict(mixed(tmp_path)), config_values.to_dict(other)
    )
    assert found == ["data.mix.a.ratio: 3.0 -> 4.0"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.data.mix.a.ration=2"], "did you mean config.data.mix.a.ratio?"),
        (["--config.data.mix.coco_vq.ratio=2"], "did you mean config.data.mix.coco_vqa.ratio?"),
        (["--config.data.mix.a.ratio=-1"], "config.data.mix.a.ratio is -1.0: expected 0 or more"),
        (["--config.data.mix.a.ratio=x"], "config.data.mix.a.ratio is 'x': expected float"),
        (["--config.data.mix.a.tokens=9"], "config.data.mix.a.tokens is 9"),
        (["--config.data.mix_by=row"], "config.data.mix_by is 'row': expected step or example"),
        (["--config.data.mix_by=example"], "none of its own with mix_by=example"),
        (["--config.data.path=x"], "nothing beside data.mix"),
        (["--config.data.max_broken=2"], "a share from 0 to 1"),
        (["--config.accumulate=3"], "config.data.mix.a.batch_size is 4: expected a multiple"),
        (["--config.data.mix.a.ratio=0", "--config.data.mix.coco_vqa.ratio=0"], "above 0"),
    ],
)  # fmt: skip
def test_invalid_mixture(args, message, tmp_path):
    with pytest.raises(UserError) as e:
        mixed(tmp_path, *args)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_unknown_key_of_a_dataset():
    with pytest.raises(UserError, match=r"data\.mix\.a\.img is not a configuration key; did"):
        config_values.from_mapping({"model": "m", "data": {"mix": {"a": {"img": "x"}}}})
