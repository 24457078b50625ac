"""The Python interface: load a model directory, encode images, score answers, generate text."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import read_config, tokenizer_dir
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference import detokenize as written
from minigpt4_jax.inference.conversation import Conversation
from minigpt4_jax.inference.engine import BATCH_SIZE, Engine
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.preprocess import Images, identity, make_requests, naming, paired
from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.inference.scoring import answer_rows, summed_nll
from minigpt4_jax.models.lora import lora_layers
from minigpt4_jax.models.minigpt import Batch, MiniGpt
from minigpt4_jax.parallel.sharding import (
    BATCH_AXES,
    constrain,
    inference_mesh,
    mesh_of,
    with_mesh,
)
from minigpt4_jax.processing import chat_templates as texts
from minigpt4_jax.processing import sequences
from minigpt4_jax.processing.images import ImageSource, is_image, load_pixels
from minigpt4_jax.processing.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.utils.rounding import next_power_of_two

ENCODE_BATCH = 8  # images through the vision encoder at a time
STREAM_CHUNK = 4  # tokens between two pieces of a streamed answer


def load(
    model_dir: str | Path,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    merge_lora: bool = False,
    kv_cache: str | None = None,
    mesh: str | Mesh | None = None,
) -> "Model":
    """Read a model directory (made by `python -m convert build` or by training).

    dtype: "float32" or "bfloat16" for the large matrices; by default bfloat16, except on a CPU
    whose memory has room for the model in float32. quantize: "int8" or "int4" rounds the language
    model's and the vision encoder's matrices to it (the embedding to int8) while they are read; a
    directory that `convert build --quantize` made needs no such word. kv_cache: "int8" keeps the keys
    and values of what is read and written in 8 bits, half the bytes of bfloat16. merge_lora: add LoRA to the
    weights it is on, which then cost what they do without; exact up to rounding in dtype, where
    bfloat16 may lose a small adapter. mesh: over which devices the model is laid, for instance
    "data:2,model:4" (rows of a batch on two groups of devices, every matrix over the four of a
    group; see minigpt4_jax/parallel/sharding.py) or "auto", all of them; by default the first.
    UserError: not a model directory, damaged, an unknown or different scheme, LoRA to be merged
    into quantized weights, or a mesh that is not one of the devices there are.
    """
    if kv_cache not in (None, "int8"):
        raise UserError(f"kv_cache {kv_cache!r}: expected 'int8', or None for the model's floats")
    config = read_config(model_dir)
    if isinstance(mesh, str):
        mesh = inference_mesh(mesh, config)
    if dtype is None:
        dtype = _default_dtype(config)
    module, config = load_model(model_dir, dtype, stacked=False, quantize=quantize, mesh=mesh)
    if merge_lora:
        for layer in lora_layers(module):
            layer.merge()
    module.llm.int8_cache = kv_cache == "int8"
    return Model(module, config, load_tokenizer(tokenizer_dir(model_dir), config.tokenizer.kind))


class Model:
    """A model with its tokenizer.

    Images are paths, PIL images or uint8 arrays [H, W, 3]. `images` beside prompts is a list with
    an entry for each prompt: an image, a list of them (several images in that prompt) or None (text
    only); images=None means text only throughout.
    """

    def __init__(self, module: MiniGpt, config: ModelConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self._engine = Engine(module)
        self._graphdef = nnx.graphdef(module)
        self._state = nnx.state(module)
        mesh = mesh_of(self._state)
        self._encode = jax.jit(with_mesh(self._encode_program, mesh))
        self._nll = jax.jit(with_mesh(self._nll_program, mesh))

    def set_module(self, module: MiniGpt) -> None:
        """Use other parameters of the same shapes and layout; nothing is compiled again."""
        self._engine.set_parameters(module)
        self._state = nnx.state(module)

    # --- the three calls --------------------------------------------------------------------

    def encode_images(self, images: Iterable[ImageSource] | ImageSource) -> np.ndarray:
        """Projected visual tokens, float32 [B, P, D], of B images. UserError names a bad image."""
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        return self._encode_all(flat, [f"image {i}" for i in range(len(flat))])

    def score(
        self,
        images: Images | None,
        prompts: Sequence[str | None],
        answers: Sequence[str],
        *,
        template: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How likely answers are: nll [B] float32 and tokens [B] int32.

        nll is the summed negative log-likelihood of an answer's tokens, its end symbol included,
        and tokens their number, in rows built as for training: one BOS; a prompt of None is the
        image alone; an answer beyond config.max_text_length is cut. UserError: lengths that differ,
        `<ImageHere>` and images that do not agree, empty prompt, unreadable image.
        """
        rows, nll = self._score_rows(images, prompts, answers, template)
        return nll, np.array([len(row.label_positions) for row in rows], np.int32)

    def generate(
        self,
        images: Images | None,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        num_return_sequences: int = 1,
        stop: Sequence[str] | Sequence[Sequence[str]] = (),
        stop_ids: Sequence[int] | Sequence[Sequence[int]] = (),
        seed: int | Sequence[int] = 0,
        template: bool = False,
        extra_bos: bool = True,
        compat: bool = False,
        context: int | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[str]:
        """The answers to prompts, in order.

        prompts: whole templated strings with `<ImageHere>`, to which a BOS is added; or, with
        template=True, plain questions, put into the template the model was trained with.
        temperature: 0 is greedy. top_k, top_p and min_p: 0, 1 and 0 keep every token.
        repetition_penalty: on generated tokens. An answer ends at the model's end symbol, at EOS,
        at a text in `stop` (which is cut off), behind a token in stop_ids or after max_new_tokens; a
        list of lists says what ends each prompt's answer. A search knows a stop text by its usual
        tokens only.
        num_beams: more than 1 searches, by transformers' rules: finished answers are compared by
        their log-probability / length ** length_penalty, early_stopping ends the search at the
        first num_beams of them, and num_return_sequences answers of each prompt follow each other,
        the best first. Lengths count a BOS before the answer, as the original's do.
        seed: a row's text depends on its own prompt and seed alone, so rows with equal prompts
        answer alike under one seed; give a list for one seed a row.
        extra_bos: released Llama-2 and MiniGPT-v2 weights were used with a BOS in addition to the
        `<s>` that their prompts begin with; False leaves one. compat: the original's answers begin with
        a BOS; True counts it, so that repetition_penalty falls on it and min_new_tokens is the
        original's min_length. context: cut prompts on the left so
        that prompt and answer fit (the original's chat: 2000); by default a long one is an error.
        UserError: an option out of its range, beams beside random choice, `<ImageHere>` and images
        that do not agree, empty or too long prompt, empty stop, unreadable image.
        """
        details = self.generate_details(
            images, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
            min_new_tokens=min_new_tokens, num_beams=num_beams, length_penalty=length_penalty,
            early_stopping=early_stopping, num_return_sequences=num_return_sequences, stop=stop,
            stop_ids=stop_ids, seed=seed, template=template, extra_bos=extra_bos, compat=compat,
            context=context, batch_size=batch_size,
        )  # fmt: skip
        return [generation.text for found in details for generation in found]

    def generate_details(
        self,
        images: Images | None,
        prompts: Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
        **options: Any,
    ) -> list[list[GenerationOutput]]:
        """As `generate`, with its options: for each prompt its num_return_sequences answers, with
        their ids, log-probabilities, and why they ended."""
        generation_config = GenerationConfig.of(options)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: expected at least 1")
        requests = self._requests(images, prompts, generation_config)
        found = self._engine.answer(requests, batch_size)
        return [
            [self._generation(answer, stop) for answer in some]
            for some, stop in zip(found, generation_config.stop_texts(len(found)), strict=True)
        ]

    def stream(
        self, image: ImageSource | Sequence[ImageSource] | None, prompt: str, **options: Any
    ) -> Iterator[str]:
        """Pieces of the answer to one prompt, as they are decoded; joined, they are its text,
        save that a role's name in its midst, which takes back all before it, is shown as it comes.

        image: one, a list of them for a prompt with several, or None. options: those of `generate`
        except batch_size and beams, which decide on the first word at the end. A piece never
        ends within a character, and no part of a stop text is shown. UserError: as `generate`.
        """
        generation_config = GenerationConfig.of(options)
        if generation_config.num_beams != 1:
            raise UserError(
                f"num_beams {generation_config.num_beams}: a stream cannot search; set it to 1"
            )
        requests = self._requests([image], [prompt], generation_config)
        return self._pieces(requests, generation_config.stop_texts(1)[0])

    def conversation(
        self, system: str | None = None, template: str | texts.ChatTemplate | None = None
    ) -> Conversation:
        """Begin a dialogue: `ask(text, images=[...])` and its answers, history kept.

        system: replaces the template's system message. template: one of one's own, or a name of
        `prompts.CHAT_TEMPLATES`; by default the model's. UserError: unknown or without `{}`.
        """
        return Conversation(self, system, template)

    def _pieces(
        self, requests: list[Request], stop: Sequence[str], kept: PrefixCache | None = None
    ) -> Iterator[str]:
        progress = self._engine.run(requests, chunk=STREAM_CHUNK, progress=True, kept=kept)
        return written.pieces(self.tokenizer, self.config, progress, stop)

    def _requests(
        self,
        images: Images | None,
        prompts: Sequence[str],
        generation_config: GenerationConfig,
        visual: list[np.ndarray | None] | None = None,
    ) -> list[Request]:
        """visual: the visual tokens [I * P, D] of each prompt, where they are known already."""
        encode = self._visual if visual is None else lambda _: visual
        return make_requests(
            self.tokenizer, self.config, images, prompts, generation_config, encode
        )

    def _generation(self, answer: Completion, stop: Sequence[str]) -> GenerationOutput:
        return written.generation(self.tokenizer, self.config, answer, stop)

    # --- candidate ranking ------------------------------------------------------------------

    def candidate_loss(
        self, images: Images | None, prompts: Sequence[str | None], answers: Sequence[str]
    ) -> np.ndarray:
        """The original's loss with reduction="none": [B] summed nll / (padded length - 1)."""
        rows, nll = self._score_rows(images, prompts, answers, False)
        # the original pads the prompts and the answers of a batch each to their longest
        longest = max((len(row.tokens) - len(row.label_positions) for row in rows), default=2)
        return nll / (longest + max((len(row.label_positions) for row in rows), default=0) - 1)

    def multi_select(
        self,
        images: Images | None,
        prompts: Sequence[str | None],
        candidates: Sequence[Sequence[str]],
        counts: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Rank candidate answers, the likeliest first, as the original does: [B] lists of indices.

        candidates[k] holds the k-th candidate of every row; counts: how many of them a row has.
        """
        losses = np.stack([self.candidate_loss(images, prompts, some) for some in candidates], 1)
        if counts is not None:
            losses[np.arange(losses.shape[1]) >= np.asarray(counts)[:, None]] = 9999
        return np.argsort(losses, axis=1, kind="stable").tolist()

    # --- arrays -----------------------------------------------------------------------------

    def _merge(self, state: Any) -> MiniGpt:
        return nnx.merge(self._graphdef, state)

    def _encode_all(self, images: Sequence[ImageSource], names: Sequence[str]) -> np.ndarray:
        config = self.config
        found = np.empty((len(images), config.visual_tokens, config.llm.width), np.float32)
        for at in range(0, len(images), ENCODE_BATCH):
            some, pixels = range(at, min(at + ENCODE_BATCH, len(images))), []
            for i in some:
                with naming(names[i]):
                    pixels.append(load_pixels(images[i], config.vision.image_size))
            found[some[0] : some[-1] + 1] = self._encode_pixels(pixels)
        return found

    def _encode_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Up to ENCODE_BATCH images [S, S, 3] float32 -> [B, P, D] float32."""
        padding = next_power_of_two(len(pixels)) - len(pixels)
        batch = np.stack([*pixels, *[np.zeros_like(pixels[0])] * padding])
        return np.asarray(self._encode(self._state, batch))[: len(pixels)]

    def _visual(self, groups: list[list[ImageSource]]) -> list[np.ndarray | None]:
        """The visual tokens [I * P, D] of every row; an image that occurs again is encoded once."""
        place: dict[Any, int] = {}
        images: list[ImageSource] = []
        names: list[str] = []
        for i, group in enumerate(groups):
            for j, image in enumerate(group):
                if identity(image) not in place:
                    place[identity(image)] = len(images)
                    images.append(image)
                    names.append(f"image {i}" if len(group) == 1 else f"image {j} of prompt {i}")
        encoded = self._encode_all(images, names)
        rows = [[encoded[place[identity(image)]] for image in group] for group in groups]
        return [np.concatenate(parts) if parts else None for parts in rows]

    def _score_rows(
        self,
        images: Images | None,
        prompts: Sequence[str | None],
        answers: Sequence[str],
        template: bool,
    ) -> tuple[list[sequences.TokenSequence], np.ndarray]:
        filled, groups = paired(self.config, images, prompts, template=template, none_allowed=True)
        counts = [len(group) for group in groups]
        rows = answer_rows(self.tokenizer, self.config, filled, counts, answers)
        nll = lambda batch, visual: self._nll(self._state, batch, visual)  # noqa: E731
        return rows, summed_nll(rows, self._visual(groups), self.config.llm.width, nll)

    def _encode_program(self, state: Any, pixels: jax.Array) -> jax.Array:
        return constrain(self._merge(state).encode(constrain(pixels, BATCH_AXES)[:, None]))

    def _nll_program(self, state: Any, batch: Batch, visual: jax.Array) -> jax.Array:
        model = self._merge(state)
        embeds = model.merge(jnp.asarray(batch.tokens), visual)
        hidden = model.llm(embeds, jnp.asarray(batch.lengths))
        return constrain(model.label_nll(hidden, batch).sum(1))


def _default_dtype(config: ModelConfig) -> str:
    if jax.default_backend() != "cpu":
        return "bfloat16"
    size = 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "float32" if size < memory / 2 else "bfloat16"
