"""Answers to prompts as text: tokenizer, image encoder and engine of one model put together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.detokenize import completion_output, failed_output, stream_text
from minigpt4_jax.inference.encode_ahead import ImageFailure, check_images, encode_ahead
from minigpt4_jax.inference.engine import BATCH_SIZE, Engine
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.image_encoder import ImageEncoder, load_image_batches
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.preprocess import (
    Images,
    PreparedPrompt,
    error_context,
    prepare_prompts,
)
from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.inference.shared_programs import Program
from minigpt4_jax.inference.visual_tokens import VisualTokens
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.processing.images import ImageSource, is_image, load_pixels, open_image
from minigpt4_jax.processing.tokenizer import Tokenizer

STREAM_CHUNK = 4  # decoding steps between two pieces of a streamed answer
ON_ERROR = ("raise", "return")

OnFailure = Callable[[int, ImageFailure], None]  # called with the number of a prompt


class TextGenerator:
    """The steps of `Model.generate` one by one: prompts, requests, answers. Attributes: see `Model`."""

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
        self.exif = exif
        self.kv_cache = module.decoder.cache_kind
        self.engine = Engine(module, mesh)
        self._state = nnx.state(module)
        self._encoder = ImageEncoder(nnx.graphdef(module), config, mesh)

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are stored in int8."""
        return self.kv_cache == "int8"

    def set_module(self, module: MiniGpt) -> None:
        """Use other parameters of the same shapes and sharding; nothing is compiled again."""
        self.engine.set_parameters(module)
        self._state = nnx.state(module)

    def with_programs(self, wrap: Callable[[Program], Program]) -> Self:
        """A copy that generates with `wrap` of each compiled program instead of it."""
        wrapped = copy(self)
        wrapped.engine = self.engine.with_programs(wrap)
        wrapped._encoder = self._encoder.with_programs(wrap)
        return wrapped

    # --- images -----------------------------------------------------------------------------

    def encode_images(self, images: Iterable[ImageSource] | ImageSource) -> np.ndarray:
        """Projected visual tokens of B images: [B, P, D] float32. UserError: an unreadable image."""
        flat: Any = [images] if is_image(images) else list(images)  # type: ignore[arg-type]
        return self._encoder.to_host(self.visual_tokens(flat))

    def encode_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """As `encode_images`, for images [S, S, 3] that `load_pixels` returned."""
        return self.start_encoding(pixels)()

    def start_encoding(self, pixels: Sequence[np.ndarray]) -> Callable[[], np.ndarray]:
        """As `encode_pixels`, but only dispatched to the device: the function waits for the result."""
        visual = self._encode(pixels)
        return lambda: self._encoder.to_host(visual)

    def visual_tokens(self, images: Sequence[ImageSource]) -> list[jax.Array]:
        """As `encode_images`, but on the device: an array [P, D] float32 for each image."""
        batches = load_image_batches(images, self.config, exif=self.exif)
        return [tokens for pixels in batches for tokens in self._encode(pixels)]

    def _encode(self, pixels: Sequence[np.ndarray]) -> list[jax.Array]:
        return self._encoder.encode(self._state, pixels)

    def _load_pixels(self, image: ImageSource) -> np.ndarray:
        return load_pixels(image, self.config.vision.image_size, exif=self.exif)

    def with_prompts(
        self, images: Sequence[Sequence[ImageSource]], prompts: Sequence[str | None]
    ) -> list[list[ImageSource]]:
        """The images of each prompt as they are encoded. (InstructBLIP adds the prompt to them.)"""
        return [list(group) for group in images]

    # --- prompts ----------------------------------------------------------------------------

    def prepare_prompts(
        self, images: Images | None, prompts: Sequence[str], config: GenerationConfig
    ) -> list[PreparedPrompt | UserError]:
        """Check and tokenize prompts: each, or what is wrong with it.

        UserError: images or options that do not fit the number of prompts.
        """
        return list(prepare_prompts(self.tokenizer, self.config, images, prompts, config))

    def answer_prompts(
        self,
        prompts: Sequence[PreparedPrompt | UserError],
        batch_size: int = BATCH_SIZE,
        *,
        on_error: str = "raise",
    ) -> Iterator[tuple[int, list[GenerationOutput]]]:
        """(index of a prompt, its answers) as they finish.

        Images are read and encoded shortly before their rows join the batch.

        on_error: for a prompt that cannot be used, or has an unreadable image: "raise" a UserError, before
        the first answer; "return" a single answer with the finish_reason "error".
        """
        if on_error not in ON_ERROR:
            raise UserError(f"on_error {on_error!r}: expected 'raise' or 'return'")
        usable = {i: p for i, p in enumerate(prompts) if isinstance(p, PreparedPrompt)}
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, UserError):
                if on_error == "raise":
                    with error_context(f"prompt {i}"):
                        raise prompt
                yield i, [failed_output(str(prompt))]
        indices, prepared = list(usable), list(usable.values())
        failed: list[tuple[int, list[GenerationOutput]]] = []

        def fail(n: int, failure: ImageFailure) -> None:
            if on_error == "raise":
                failure.raise_for(indices[n])
            failed.append((indices[n], [failed_output(failure.message())]))

        if on_error == "raise" and len(prepared) > batch_size:  # not all are read before an answer
            self._check_images([prompt.images for prompt in prepared], fail)
        for n, completions in self._complete(prepared, batch_size, fail):
            request = prepared[n].request
            yield indices[n], [self.output(request, completion) for completion in completions]
            yield from failed
            failed.clear()
        yield from failed

    def answer_all(
        self,
        prompts: Sequence[PreparedPrompt | UserError],
        batch_size: int = BATCH_SIZE,
        *,
        on_error: str = "raise",
    ) -> list[list[GenerationOutput]]:
        """The answers to each prompt, in order; otherwise as `answer_prompts`."""
        details: list[list[GenerationOutput]] = [[] for _ in prompts]
        for i, outputs in self.answer_prompts(prompts, batch_size, on_error=on_error):
            details[i] = outputs
        return details

    def _complete(
        self, prompts: Sequence[PreparedPrompt], batch_size: int, fail: OnFailure
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(number of a prompt, its completions) as they finish. fail: called for unreadable images."""
        requests = [prompt.request for prompt in prompts]
        if any(request.beam_search.num_beams > 1 for request in requests):
            batches = self.engine.search_batches(requests, batch_size)
            encoded = self._encode_ahead(prompts, [i for batch in batches for i in batch], fail)
            waiting = next(encoded, None)
            for batch in batches:
                found: dict[int, Request] = {}
                while waiting is not None and waiting[0] in batch:
                    found[waiting[0]] = waiting[1]
                    waiting = next(encoded, None)
                yield from zip(
                    found, self.engine.search(list(found.values()), batch_size), strict=True
                )
            return
        admitted: list[int] = []  # the number of each prompt that the engine has taken

        def encoded_requests() -> Iterator[Request]:
            for i, request in self._encode_ahead(prompts, range(len(prompts)), fail):
                admitted.append(i)
                yield request

        for progress in self.engine.run(encoded_requests(), batch_size, sized_for=requests):
            yield admitted[progress.key], [progress.completion]

    def _encode_ahead(
        self, prompts: Sequence[PreparedPrompt], order: Sequence[int], fail: OnFailure
    ) -> Iterator[tuple[int, Request]]:
        """(number, request with visual tokens) of the prompts whose images can be read."""
        encoded = self.encode_ahead([prompts[i].images for i in order])
        for i, visual in zip(order, encoded, strict=True):
            if isinstance(visual, ImageFailure):
                fail(i, visual)
            else:
                yield i, prompts[i].with_visual(visual)

    def encode_ahead(
        self, prompts: Sequence[Sequence[ImageSource]]
    ) -> Iterator[VisualTokens | ImageFailure | None]:
        """Visual tokens [I * P, D] of the images of each prompt, read and encoded shortly before they are
        needed; None without images."""
        return encode_ahead(prompts, self._load_pixels, self._encode)

    def _check_images(self, prompts: Sequence[Sequence[ImageSource]], fail: OnFailure) -> None:
        """Open all images, so that a broken one is known before those before it are used."""
        for i, failure in check_images(prompts, partial(open_image, exif=self.exif)):
            fail(i, failure)

    # --- requests ---------------------------------------------------------------------------

    def prepare_requests(
        self,
        images: Images | None,
        prompts: Sequence[str],
        config: GenerationConfig,
        visual: Sequence[VisualTokens | None] | None = None,
    ) -> list[Request]:
        """The requests for prompts, with visual tokens. UserError: as `Model.generate`.

        visual: visual tokens [I * P, D] of each prompt if they are known, so that no image is read;
        None for those that will be added to the request later.
        """
        prepared: list[PreparedPrompt] = []
        for i, prompt in enumerate(self.prepare_prompts(images, prompts, config)):
            with error_context(f"prompt {i}"):
                if isinstance(prompt, UserError):
                    raise prompt
            prepared.append(prompt)
        if visual is None:
            encoded = self._encode_ahead(prepared, range(len(prepared)), raise_failure)
            return [request for _, request in encoded]
        return [p.with_visual(tokens) for p, tokens in zip(prepared, visual, strict=True)]

    def answer_requests(
        self,
        requests: Sequence[Request],
        batch_size: int = BATCH_SIZE,
        prefix_cache: PrefixCache | None = None,
    ) -> list[list[GenerationOutput]]:
        """The answers to each request, in order. prefix_cache: see `Engine.answer`."""
        completions = self.engine.answer(requests, batch_size, prefix_cache)
        return [
            [self.output(request, completion) for completion in of_request]
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
            yield step.key, self.output(step.request, step.completion)

    def stream_request(
        self, request: Request, prefix_cache: PrefixCache | None = None
    ) -> Iterator[str]:
        """Pieces of the answer to a request, as `Model.stream`. prefix_cache: see `Engine.run`."""
        steps = self.engine.run(
            [request], chunk=STREAM_CHUNK, progress=True, prefix_cache=prefix_cache
        )
        return stream_text(self.tokenizer, self.config, steps)

    def output(self, request: Request, completion: Completion) -> GenerationOutput:
        """The answer that a completion of a request is."""
        return completion_output(self.tokenizer, self.config, completion, request.stop_texts)


def raise_failure(prompt: int, failure: ImageFailure) -> None:
    """UserError that names an image of the prompt with this number."""
    failure.raise_for(prompt)
