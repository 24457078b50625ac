"""The Python interface of a model: generate text, score answers, encode images."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.conversation import Conversation
from minigpt4_jax.inference.encode_ahead import ImageFailure
from minigpt4_jax.inference.engine import BATCH_SIZE
from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
from minigpt4_jax.inference.preprocess import ImageGroups, Images, match_images
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.scoring import Scorer, answer_rows, candidates_by_prompt, padded_mean
from minigpt4_jax.inference.text_generator import TextGenerator, raise_failure
from minigpt4_jax.inference.visual_tokens import VisualTokens
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.processing.chat_templates import ChatTemplate
from minigpt4_jax.processing.images import ImageSource
from minigpt4_jax.processing.sequences import TokenSequence
from minigpt4_jax.processing.tokenizer import Tokenizer

SCORE_BLOCK = 32  # prompts whose images are encoded before their answers are scored


class Model(TextGenerator):
    """A model with its tokenizer.

    Images are paths, PIL images or uint8 arrays [H, W, 3]. `images` beside prompts is a list with
    an entry for each prompt: an image, a list of images, or None (text only). images=None means text
    only for all prompts.

    Attributes:
        config: the model's configuration.
        tokenizer: the language model's tokenizer.
        engine: the generation engine, for token ids instead of text.
        mesh: the mesh that the parameters lie on; None for one device.
        kv_cache: "int8" or "float8" if keys and values are stored in 8 bits, else None.
        int8_cache: whether it is "int8".
        exif: whether images are rotated as their EXIF orientation says.
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
        super().__init__(module, config, tokenizer, mesh, exif=exif)
        self._scorer = Scorer(nnx.graphdef(module), config, mesh)

    # --- generation -------------------------------------------------------------------------

    def generate(
        self,
        images: Images | None,
        prompts: Sequence[str],
        config: GenerationConfig | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        on_error: str = "raise",
        **overrides: Any,
    ) -> list[str]:
        """The answers to prompts, in order.

        Args:
            images: an entry for each prompt; see `Model`.
            prompts: complete prompts with `<ImageHere>` where an image goes, to which a BOS is added;
                with template=True plain questions.
            config: how to generate, by default `GenerationConfig()`.
            batch_size: rows decoded together.
            on_error: "return": a prompt that cannot be used (an unreadable image, too long, empty), or
                whose logits are NaN or infinite, gets the answer "" with a warning, and the others
                are answered. By default the first such prompt is an error.
            overrides: single options of `GenerationConfig` by name, which replace those of `config`:
                `model.generate(images, prompts, max_new_tokens=20, temperature=0.7)`.

        UserError: an option out of range, beam search with sampling, `<ImageHere>` and images that do
        not agree, an empty or too long prompt, an unreadable image, logits that are NaN or infinite.
        """
        details = self.generate_details(
            images, prompts, config, batch_size=batch_size, on_error=on_error, **overrides
        )
        failed = {i: answers[0].error for i, answers in enumerate(details) if answers[0].error}
        for i, error in failed.items():
            if on_error == "raise":
                raise UserError(f"prompt {i}: {error}; generate_details has the others")
            warnings.warn(
                f"{len(failed)} of {len(details)} prompts have no answer (generate_details says why); "
                f"prompt {i}: {error}",
                stacklevel=2,
            )
            break
        return [output.text for outputs in details for output in outputs]

    def generate_details(
        self,
        images: Images | None,
        prompts: Sequence[str],
        config: GenerationConfig | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        on_error: str = "raise",
        **overrides: Any,
    ) -> list[list[GenerationOutput]]:
        """As `generate`: for each prompt its num_return_sequences answers, with their ids,
        log-probabilities, and why they ended.

        An answer that ended because logits were NaN or infinite has finish_reason "error"; the others
        are complete. With on_error="return" this holds for prompts that cannot be used, too.
        """
        config = GenerationConfig.merge(config, overrides)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: expected at least 1")
        prepared = self.prepare_prompts(images, prompts, config)
        details = self.answer_all(prepared, batch_size, on_error=on_error)
        # a prompt that cannot be used has one answer
        return [outputs * (config.num_return_sequences // len(outputs)) for outputs in details]

    def stream(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        prompt: str,
        config: GenerationConfig | None = None,
        **overrides: Any,
    ) -> Iterator[str]:
        """Pieces of the answer to one prompt as it is generated; joined, they are its text. (One
        exception: a role name of the original's formats after other text, see `TextStream`.)

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

    def top_logprobs(self, request: Request, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The most likely tokens at each place of an answer `ids` [N] to a request, by the model itself:
        (ids [N, 20], log-probabilities [N, 20]), most likely first."""
        return self._scorer.top_logprobs(
            self._state, [*request.tokens, *ids], request.visual, len(ids)
        )

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
            self.tokenizer, self.config, images, prompts, template=template
        )
        groups = self.with_prompts(groups, complete)
        by_prompt = candidates_by_prompt(candidates, len(complete), counts, layout)
        # the rows of the k-th candidates, and the prompts that have one
        subsets: list[list[int]] = []
        rows: list[list[TokenSequence]] = []
        for k in range(max(map(len, by_prompt), default=0)):
            subset = [i for i, answers in enumerate(by_prompt) if len(answers) > k]
            subsets.append(subset)
            rows.append(answer_rows(
                self.tokenizer, self.config, [complete[i] for i in subset],
                [len(groups[i]) for i in subset], [by_prompt[i][k] for i in subset], subset,
            ))  # fmt: skip
        losses = np.full((len(complete), len(rows)), 9999, np.float32)
        for block, visual in self._encoded_blocks(groups):
            for k, subset in enumerate(subsets):
                of_block = [n for n, i in enumerate(subset) if i in block]
                losses[[subset[n] for n in of_block], k] = self._scorer.nll(
                    self._state, [rows[k][n] for n in of_block],
                    [visual[subset[n] - block.start] for n in of_block],
                )  # fmt: skip
        for k, subset in enumerate(subsets):
            losses[subset, k] = padded_mean(rows[k], losses[subset, k])
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
            self.tokenizer, self.config, images, prompts, template=template
        )
        groups = self.with_prompts(groups, complete)
        num_images = [len(group) for group in groups]
        rows = answer_rows(self.tokenizer, self.config, complete, num_images, answers)
        nll = np.zeros(len(rows), np.float32)
        for block, visual in self._encoded_blocks(groups):
            of_block = slice(block.start, block.stop)
            nll[of_block] = self._scorer.nll(self._state, rows[of_block], visual)
        return rows, nll

    def _encoded_blocks(
        self, groups: ImageGroups
    ) -> Iterator[tuple[range, list[VisualTokens | None]]]:
        """Prompts in blocks, with their visual tokens: memory does not depend on how many there are."""
        if len(groups) > SCORE_BLOCK:
            self._check_images(groups, raise_failure)
        encoded = self.encode_ahead(groups)
        for start in range(0, len(groups), SCORE_BLOCK):
            block = range(start, min(start + SCORE_BLOCK, len(groups)))
            visual: list[VisualTokens | None] = []
            for i in block:
                tokens = next(encoded)
                if isinstance(tokens, ImageFailure):
                    tokens.raise_for(i)
                visual.append(tokens)
            yield block, visual
