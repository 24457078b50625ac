"""Models built from the reference checkpoints of MiniGPT-4, and the dumps that the original made of them."""

import json
from functools import cache

import numpy as np
import pytest

from helpers.paths import REFERENCE, process_folder
from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.inference import engine
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.loading import load
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.sequences import build_conversation_row, build_row, prompt_tokens

NEEDS_DUMPS = pytest.mark.skipif(
    not (REFERENCE / "dumps").is_dir(), reason="../shared/reference is not here"
)
CASES = {
    "a": ("minigpt4-vicuna", "a_minigpt4_vicuna.pth", 56, 20, ["qformer.heads=4"]),
    "b": ("minigpt4-llama2", "b_minigpt4_llama2.pth", 56, 20, []),
    "c": ("minigpt-v2", "c_minigptv2.pth", 112, 40, ["lora.alpha=16"]),
}


@cache
def build_model(name):
    """The directory of a model, converted once in a process. Tests do not change it."""
    from convert.build import build
    from convert.build_plan import BuildRequest

    variant, checkpoint, size, text, extra = CASES[name]
    files = REFERENCE / "checkpoints"
    out = process_folder() / "minigpt4" / name
    settings = [
        f"image_size={size}", f"max_text_length={text}", "vision.depth=3", "vision.heads=4",
        "end_symbol=" + ("###" if name == "a" else "</s>"), *extra,
    ]  # fmt: skip
    build(
        BuildRequest(
            variant, files / "llama", out, vision=files / "eva_vit_g.pth",
            qformer=files / "blip2_pretrained_flant5xxl.pth" if name == "a" else None,
            checkpoint=files / checkpoint, settings=settings,
        )
    )  # fmt: skip
    return out


class Case:
    """One converted reference model with its dumps."""

    def __init__(self, name):
        self.name = name
        out = build_model(name)
        self.model = load(out, dtype="float32")
        self.config, self.tokenizer = self.model.config, self.model.tokenizer
        self.tensors = model_directory.Tensors(out)
        self.module, _ = load_model(out)
        self.pixels = self.arrays("pixels")
        self.images = [self.pixels["image_uint8_0"], self.pixels["image_uint8_1"]]

    def arrays(self, kind):
        return np.load(REFERENCE / "dumps" / f"{self.name}_{kind}.npz")

    def document(self, kind):
        return json.loads((REFERENCE / "dumps" / f"{self.name}_{kind}.json").read_text())

    def forwards(self):
        """(dump, row of each sample, images) of every training forward pass."""
        for path in sorted((REFERENCE / "dumps").glob(f"{self.name}_forward_*.npz")):
            kind = path.stem[2:]
            document = self.document(kind)
            samples = document["samples"]
            images = 1 if "image" in samples else 0
            yield kind, np.load(path), self._rows(samples, document["extra"], images), images

    def _rows(self, samples, extra, images):
        if "conv_q" in samples:
            conversations = zip(samples["conv_q"], samples["conv_a"], strict=True)
            sign = samples["connect_sym"][0]
            return [
                build_conversation_row(
                    self.tokenizer, self.config, q.split(sign), a.split(sign), images=images
                )
                for q, a in conversations
            ]
        answers = samples["answer"]
        prompts = samples.get("instruction_input") or [extra["prompt"]] * len(answers)
        if self.name == "c":
            prompts = [self.config.prompt_template.replace("{}", p) for p in prompts]
        return [
            build_row(self.tokenizer, self.config, p, a, images=images)
            for p, a in zip(prompts, answers, strict=True)
        ]

    def batch(self, rows, images):
        """The rows in the original's padding: to its longest prompt and its longest answer."""
        tokens = np.zeros((len(rows), max(len(r.tokens) for r in rows)), np.int32)
        answers = np.full((len(rows), max(len(r.label_positions) for r in rows)), -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            answers[i, : len(row.label_positions)] = row.label_positions
        pixels = self.pixels["pixel_values"].transpose(0, 2, 3, 1)[:, None]
        lengths = np.array([len(r.tokens) for r in rows], np.int32)
        return Batch(pixels if images else pixels[:, :0], tokens, lengths, answers)


def generation(case, run, document, visual):
    """The requests of one run, and its end ids. The original's ids begin with a BOS, which its
    min_length counts; a hypothesis's length in beam search counts it too, here as there."""
    kwargs = run["kwargs"]
    options = SamplingParams(
        repetition_penalty=kwargs.get("repetition_penalty", 1.0),
        min_new_tokens=max(0, kwargs.get("min_length", 0) - 1),
    )
    beams = BeamSearchConfig(kwargs["num_beams"], kwargs.get("length_penalty", 1.0))
    ends = run["eos"] if isinstance(run["eos"], list) else [run["eos"]]
    requests = [
        engine.Request(
            prompt_tokens(case.tokenizer, case.config, text, images=1), visual[i],
            kwargs["max_new_tokens"], options,
            stop_sequences=[[e] for e in ends], beam_search=beams,
        )
        for i, text in enumerate(document["texts"])
    ]  # fmt: skip
    return requests, ends


def relative(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
