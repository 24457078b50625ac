"""The configuration of the model that a run trains: the loaded model's, with the run's overrides."""

import dataclasses
from typing import Any

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.config import LoraConfig, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import LoraChoice, TrainConfig


def read_model_config(c: TrainConfig) -> ModelConfig:
    """The configuration of the model in `config.model`, with the run's overrides. UserError: the run's
    configuration is for another model."""
    config = model_directory.read_config(c.model)
    if c.variant and config.variant != c.variant:
        raise UserError(
            f"{c.model} is a {config.variant} model and this configuration is for {c.variant}: "
            "choose another (for instance --config=stage2:llama2), or set --config.variant="
        )
    if c.llm_width and config.llm.width != c.llm_width:
        raise UserError(
            f"{c.model} has a language model of width {config.llm.width} and this configuration is "
            f"for {c.llm_width}: leave out the :argument, or set --config.llm_width=0"
        )
    if config.reads_instruction:
        raise UserError(f"{c.model} is a {config.variant} model, which cannot be trained")
    if c.data.pack_tokens and not config.reads_in_pieces:
        raise UserError(
            f"config.data.pack_tokens: rows of {config.variant} cannot be packed; expected 0"
        )
    if c.data.image_ids and not config.is_stage1:
        raise UserError(
            f"config.data.image_ids is for blip2-qformer; {c.model} is a {config.variant} model"
        )
    if c.frozen_dtype and config.quantize is not None:
        raise UserError(
            f"config.frozen_dtype is {c.frozen_dtype!r}: the matrices of {c.model} are stored in "
            f"{config.quantize}: leave it out, or start from a model that is not quantized"
        )
    return override_model_config(config, c, c.model)


def frozen_config(c: TrainConfig, config: ModelConfig) -> ModelConfig:
    """The configuration of the model in memory, with config.frozen_dtype. (`config` is what is saved.)"""
    return dataclasses.replace(config, quantize=c.frozen_dtype) if c.frozen_dtype else config


def override_model_config(config: ModelConfig, c: TrainConfig, model: str) -> ModelConfig:
    """A model's configuration with the run's overrides. model: its name in messages."""
    overrides: dict[str, Any] = {
        name: getattr(c, name)
        for name in ("prompt_template", "end_symbol", "max_text_length")
        if getattr(c, name)
    }
    if config.tokenizer.chat_template and {"prompt_template", "end_symbol"} & overrides.keys():
        # The run's own format replaces the tokenizer's chat template.
        tokenizer = dataclasses.replace(config.tokenizer, chat_template=False)
        overrides |= {"tokenizer": tokenizer, "chat_template": "training"}
    lora = _override_lora(config.lora, c.lora, model)
    return dataclasses.replace(config, lora=lora, **overrides).check()


def _override_lora(
    existing: LoraConfig | None, choice: LoraChoice, model: str
) -> LoraConfig | None:
    """The adapters to train: the model's, or new ones. UserError: the choice contradicts the model's."""
    values: dict[str, Any] = {
        name: value for name in ("rank", "alpha", "targets") if (value := getattr(choice, name))
    }
    dropout: dict[str, Any] = {"dropout": choice.dropout} if choice.dropout >= 0 else {}
    if existing is None:
        if choice.rank:
            return LoraConfig(**values, **dropout)
        if values or dropout:
            name = next(iter(values | dropout))
            raise UserError(
                f"config.lora.{name} is given, but {model} has no LoRA: give config.lora.rank "
                "too, to add new adapters"
            )
        return None
    for name, value in values.items():
        model_value = getattr(existing, name)
        equal = sorted(value) == sorted(model_value) if name == "targets" else value == model_value
        if not equal:
            raise UserError(
                f"config.lora.{name} is {value!r}, and the adapters of {model} have "
                f"{model_value!r}: leave it out, or start with a model without LoRA"
            )
    return dataclasses.replace(existing, **dropout)
