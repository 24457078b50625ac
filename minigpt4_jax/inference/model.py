"""The Python interface: load a model directory, encode images, score answers, generate text."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import read_config, tokenizer_dir
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.conversation import Conversation
from minigpt4_jax.inference.detokenize import completion_output, stream_text
from minigpt4_jax.inference.engine import BATCH_SIZE, Engine
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.image_encoder import ImageEncoder
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.preprocess import Images, make_requests, match_images
from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.inference.scoring import Scorer, answer_rows, candidates_by_prompt, padded_mean
from minigpt4_jax.models.lora import lora_layers
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import inference_mesh
from minigpt4_jax.processing.chat_templates import ChatTemplate
from minigpt4_jax.processing.images import ImageSource, is_image
from minigpt4_jax.processing.sequences import TokenSequence
from minigpt4_jax.processing.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.utils.compilation_cache import enable_compilation_cache

STREAM_CHUNK = 4  # decoding steps between two pieces of a streamed answer


def load(
    model_dir: str | Path,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    merge_lora: bool = False,
    kv_cache: str | None = None,
    mesh: str | Mesh | None = None,
    base: str | Path | None = None,
    allow_nonfinite: bool = False,
    exif: bool = False,
) -> "Model":
    """Load a model directory (written by `python -m convert build` or by training).

    Args:
        model_dir: a local path, gs://..., or the id of a model directory on the Hugging Face hub, such
            as "org/name" or "org/name@revision", which is downloaded into huggingface_hub's cache.
        dtype: "float32" or "bfloat16" for the large matrices. By default bfloat16, except on a CPU
            with enough memory for the model in float32.
        quantize: "int8" or "int4" quantizes the matrices of the language model and the vision encoder
            while they are read (the embedding to int8). Not needed for a directory that is
            quantized already.
        merge_lora: merge LoRA into the weights, which makes it free at inference. Exact up to rounding
            in dtype; in bfloat16 a small update may be lost.
        kv_cache: "int8" stores keys and values in 8 bits, half the size of bfloat16.
        mesh: devices to use: sizes such as "data:2,model:4" (two groups of devices with different
            rows of a batch, every matrix split over the four of a group; see
            minigpt4_jax/parallel/sharding.py), "auto" for all devices, or a Mesh. By default the first
            device.
        base: the model that `model_dir` was trained on, if it is no longer where model.json says;
            its fingerprint is compared.
        allow_nonfinite: load weights that are NaN or infinite too. By default they are an error.
        exif: rotate images as their EXIF orientation says, as a viewer shows a phone's photo. The
            original ignores it, and so do the published datasets with boxes.

    Compiled programs are kept on disk, in the folder that the environment variable MINIGPT4_JAX_CACHE
    names, by default ~/.cache/minigpt4_jax; "off" keeps none. A jax_compilation_cache_dir of your own
    is used instead.

    UserError: not a model directory, damaged, a missing or another base, an unknown or another
    quantization, LoRA to be merged into quantized weights, or a mesh that does not fit the devices.
    """
    if kv_cache not in (None, "int8"):
        raise UserError(f"kv_cache {kv_cache!r}: expected 'int8', or None for the model's dtype")
    enable_compilation_cache()
    config = read_config(model_dir)
    if isinstance(mesh, str):
        mesh = inference_mesh(mesh, config)
    if dtype is None:
        dtype = _default_dtype(config)
    module, config = load_model(
        model_dir,
        dtype,
        stacked=False,
        quantize=quantize,
        mesh=mesh,
        base=base,
        allow_nonfinite=allow_nonfinite,
    )
    if merge_lora:
        for layer in lora_layers(module):
            layer.merge()
    tokenizer = load_tokenizer(tokenizer_dir(model_dir, base), config.tokenizer.kind)
    if config.is_stage1:
        from minigpt4_jax.inference.qformer_model import QFormerModel  # a subclass of Model

        if kv_cache is not None:
            raise UserError(f"kv_cache {kv_cache!r}: {model_dir} has no language model")
        return QFormerModel(module, config, tokenizer, mesh, exif=exif)
    module.llm.int8_cache = kv_cache == "int8"
    return Model(module, config, tokenizer, mesh, exif=exif)


class Model:
    """A model with its tokenizer.

    Images are paths, PIL images or uint8 arrays [H, W, 3]. `images` beside prompts is a list with
    an entry for each prompt: an image, a list of images, or None (text only). images=None means text
    only for all prompts.

    Attributes:
        config: the model's configuration.
        tokenizer: the language model's tokenizer.
        engine: the generation engine, for token ids instead of text.
        mesh: the mesh that the parameters lie on; None for one device.
        exif: whether images are rotated as their EXIF orientation says.
        int8_cache: whether keys and values are stored in 8 bits.
    """

    def __init__(
        self,
        module: MiniGpt,
        config: ModelConfig,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        *,
        exif: bool = False,
    ):
        """mesh: the mesh that the module's parameters lie on; None for one device. exif: see `load`."""
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.engine = Engine(module, mesh)
        self._state = nnx.state(module)
        graphdef = nnx.graphdef(module)
        self._encoder = ImageEncoder(graphdef, config, mesh)
        self.exif = exif
        self.int8_cache = module.llm.int8_cache
        self._scorer = Scorer(graphdef, config, mesh)

    def set_module(self, module: MiniGpt) -> None:
        """Use other parameters of the same shapes and sharding; nothing is compiled again."""
        self.engine.set_parameters(module)
        self._state = nnx.state(module)

    # --- images -----------------------------------------------------------------------------

    def encode_images(self, images: Iterable[ImageSource] | ImageSource) -> np.ndarray:
        """Projected visual tokens of B images: [B, P, D] float32. UserError: an unreadable image."""
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        names = [f"image {i}" for i in range(len(flat))]
        return self._encoder.encode(self._state, flat, names, exif=self.exif)

    def encode_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """As `encode_images`, for images [S, S, 3] that `load_pixels` returned."""
        return self._encoder.encode_pixels(self._state, pixels)

    # --- generation -------------------------------------------------------------------------

    def generate(
        self,
        images: Images | None,
        prompts: Sequence[str],
        config: GenerationConfig | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        **overrides: Any,
    ) -> list[str]:
        """The answers to prompts, in order.

        Args:
            images: an entry for each prompt; see `Model`.
            prompts: complete prompts with `<ImageHere>` where an image goes, to which a BOS is added;
                with template=True plain questions.
            config: how to generate, by default `GenerationConfig()`.
            batch_size: rows decoded together.
            overrides: single options of `GenerationConfig` by name, which replace those of `config`:
                `model.generate(images, prompts, max_new_tokens=20, temperature=0.7)`.

        UserError: an option out of range, beam search with sampling, `<ImageHere>` and images that do
        not agree, an empty or too long prompt, an unreadable image, logits that are NaN or infinite.
        """
        details = self.generate_details(images, prompts, config, batch_size=batch_size, **overrides)
        for i, outputs in enumerate(details):
            if outputs[0].error is not None:
                raise UserError(f"prompt {i}: {outputs[0].error}; generate_details has the others")
        return [output.text for outputs in details for output in outputs]

    def generate_details(
        self,
        images: Images | None,
        prompts: Sequence[str],
        config: GenerationConfig | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        **overrides: Any,
    ) -> list[list[GenerationOutput]]:
        """As `generate`: for each prompt its num_return_sequences answers, with their ids,
        log-probabilities, and why they ended. An answer that ended because logits were NaN or
        infinite has finish_reason "error"; the others are complete."""
        config = GenerationConfig.merge(config, overrides)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: expected at least 1")
        requests = self.prepare_requests(images, prompts, config)
        return self.answer_requests(requests, batch_size)

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> Iterator[str]:
        """Pieces of the answer to one prompt as it is generated; joined, they are its text. (One
        exception: text before a role name, which is removed from the answer, has been shown.)

        image: one, a list of them for a prompt with several, or None. config, overrides: as
        `generate`, without beam search, which decides on the first token at the end. A piece never
        ends within a character, and no part of a stop text is shown. UserError: as `generate`.
        """
        config = GenerationConfig.merge(config, overrides)
        config.check_streamable()
        (request,) = self.prepare_requests([image], [prompt], config)
        return self.stream_request(request)

    def conversation(
        self, system: str | None = None, template: str | ChatTemplate | None = None
    ) -> Conversation:
        """Start a conversation: `ask(text, images=[...])`, with all turns as context.

        system: replaces the template's system message. template: a ChatTemplate, or a name in
        `chat_templates.CHAT_TEMPLATES`; by default the model's. UserError: unknown, or without `{}`.
        """
        return Conversation(self, system, template)

    # --- requests: the steps of `generate` one by one -----------------------------------------

    def prepare_requests(
        self,
        images: Images | None,
        prompts: Sequence[str],
        config: GenerationConfig,
        visual: Sequence[np.ndarray | None] | None = None,
    ) -> list[Request]:
        """Check and tokenize prompts, encode their images. UserError: as `generate`.

        visual: visual tokens [I * P, D] of each prompt if they are known, so that no image is read;
        None for those that will be added to the request later.
        """
        return make_requests(
            self.tokenizer, self.config, images, prompts, config,
            lambda groups: self._encode_groups(groups) if visual is None else list(visual),
        )  # fmt: skip

    def answer_requests(
        self,
        requests: Sequence[Request],
        batch_size: int = BATCH_SIZE,
        prefix_cache: PrefixCache | None = None,
    ) -> list[list[GenerationOutput]]:
        """The answers to each request, in order. prefix_cache: see `Engine.answer`."""
        completions = self.engine.answer(requests, batch_size, prefix_cache)
        return [
            [self._output(request, completion) for completion in of_request]
            for request, of_request in zip(requests, completions, strict=True)
        ]

    def run_requests(
        self,
        requests: Iterable[Request],
        batch_size: int = BATCH_SIZE,
        *,
        sized_for: Sequence[Request] | None = None,
    ) -> Iterator[tuple[int, GenerationOutput]]:
        """(index of a request, its answer) as requests finish. sized_for: see `Engine.run`."""
        for step in self.engine.run(requests, batch_size, sized_for=sized_for):
            yield step.key, self._output(step.request, step.completion)

    def stream_request(
        self, request: Request, prefix_cache: PrefixCache | None = None
    ) -> Iterator[str]:
        """Pieces of the answer to a request, as `stream`. prefix_cache: see `Engine.run`."""
        steps = self.engine.run(
            [request], chunk=STREAM_CHUNK, progress=True, prefix_cache=prefix_cache
        )
        return stream_text(self.tokenizer, self.config, steps)

    def _output(self, request: Request, completion: Completion) -> GenerationOutput:
        return completion_output(self.tokenizer, self.config, completion, request.stop_texts)

    def _encode_groups(self, groups: list[list[ImageSource]]) -> list[np.ndarray | None]:
        return self._encoder.encode_groups(self._state, groups, exif=self.exif)

    # --- scores of given answers --------------------------------------------------------------

    def score(
        self,
        images: Images | None,
        prompts: Sequence[str | None],
        answers: Sequence[str],
        *,
        template: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How likely answers are: (nll [B] float32, num_tokens [B] int32).

        nll is the summed negative log-likelihood of an answer's tokens, including its end symbol, and
        num_tokens their number. Rows are built as in training: one BOS; a prompt of None is the image
        alone; an answer longer than config.max_text_length is cut. UserError: different numbers of
        prompts and answers, `<ImageHere>` and images that do not agree, empty prompt, unreadable
        image.
        """
        rows, nll = self._score_rows(images, prompts, answers, template)
        return nll, np.array([len(row.label_positions) for row in rows], np.int32)

    def candidate_loss(
        self, images: Images | None, prompts: Sequence[str | None], answers: Sequence[str]
    ) -> np.ndarray:
        """The original's loss with reduction="none": [B] summed nll / (padded length - 1)."""
        rows, nll = self._score_rows(images, prompts, answers, template=False)
        return padded_mean(rows, nll)

    def multi_select(
        self,
        images: Images | None,
        prompts: Sequence[str | None],
        candidates: Sequence[Sequence[str]],
        counts: Sequence[int] | None = None,
        *,
        template: bool = False,
        layout: str | None = None,
    ) -> list[list[int]]:
        """Rank candidate answers as the original does: for each prompt the indices of its candidates,
        most likely first.

        candidates: a list for each prompt, of any length. The original's layout, the k-th candidates of
        all prompts in candidates[k], is recognized where only it fits, and meant where counts are given:
        how many of the candidates a prompt has; the others come last. layout: "prompt" or "candidate"
        says which it is where both fit. template: prompts are plain questions. UserError: both layouts
        fit or none, otherwise as `score`.
        """
        complete, groups = match_images(
            self.tokenizer, self.config, images, prompts, template=template, allow_none=True
        )
        by_prompt = candidates_by_prompt(candidates, len(complete), counts, layout)
        visual = self._encode_groups(groups)
        losses = np.full((len(complete), max(map(len, by_prompt), default=0)), 9999, np.float32)
        for k in range(losses.shape[1]):
            subset = [i for i, answers in enumerate(by_prompt) if len(answers) > k]
            rows = answer_rows(
                self.tokenizer, self.config, [complete[i] for i in subset],
                [len(groups[i]) for i in subset], [by_prompt[i][k] for i in subset],
            )  # fmt: skip
            nll = self._scorer.nll(self._state, rows, [visual[i] for i in subset])
            losses[subset, k] = padded_mean(rows, nll)
        if counts is not None:
            losses[np.arange(losses.shape[1]) >= np.asarray(counts)[:, None]] = 9999
        return [
            np.argsort(of_prompt[: len(answers)], kind="stable").tolist()
            for of_prompt, answers in zip(losses, by_prompt, strict=True)
        ]

    def _score_rows(
        self,
        images: Images | None,
        prompts: Sequence[str | None],
        answers: Sequence[str],
        template: bool,
    ) -> tuple[list[TokenSequence], np.ndarray]:
        complete, groups = match_images(
            self.tokenizer, self.config, images, prompts, template=template, allow_none=True
        )
        num_images = [len(group) for group in groups]
        rows = answer_rows(self.tokenizer, self.config, complete, num_images, answers)
        return rows, self._scorer.nll(self._state, rows, self._encode_groups(groups))


def _default_dtype(config: ModelConfig) -> str:
    if jax.default_backend() != "cpu":
        return "bfloat16"
    size = 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "float32" if size < memory / 2 else "bfloat16"
