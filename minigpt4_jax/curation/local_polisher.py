"""Texts polished by a model directory's language model, without a server."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from minigpt4_jax.curation.answers import Answer, AnswerCache
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import IMAGE_TAG, ChatFormat, TokenizerChatTemplate

if TYPE_CHECKING:  # imports JAX, which a polisher on a server does not need
    from minigpt4_jax.inference.generation_config import GenerationConfig
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.inference.requests import Request

BATCH_SIZE = 32


class LocalPolisher:
    """Asks a model about texts, many at a time."""

    def __init__(
        self,
        model: "Model",
        template: ChatFormat,
        instruction: str,
        config: "GenerationConfig",
        cache: AnswerCache,
        batch_size: int = BATCH_SIZE,
    ):
        """config: its seed is added to a number of each text's own."""
        self._model, self._template, self._instruction = model, template, instruction
        self._config, self._cache, self._batch_size = config, cache, batch_size

    def run(self, texts: Mapping[str, str], on_answer: Callable[[Answer], None]) -> list[str]:
        """Ask about texts by their keys; every answer goes into the cache. Returns what failed.

        on_answer: called after each answer.
        """
        failures: list[str] = []
        requests: dict[str, Request] = {}
        for key, text in texts.items():
            try:
                requests[key] = self._request(key, text)
            except UserError as e:
                failures.append(str(e).removeprefix("prompt 0: "))
        # Neighbours of equal length leave less padding.
        keys = sorted(requests, key=lambda key: len(requests[key].tokens))
        ordered = [requests[key] for key in keys]
        for i, output in self._model.run_requests(ordered, self._batch_size):
            if output.error is not None:
                failures.append(output.error)
                continue
            answer = Answer(
                output.text, output.finish_reason, len(ordered[i].tokens), len(output.ids)
            )
            self._cache.put(keys[i], texts[keys[i]], answer)
            on_answer(answer)
        return failures

    def _request(self, key: str, text: str) -> "Request":
        text = text.replace(IMAGE_TAG, "")  # no image belongs to it
        prompt = instructed_prompt(
            self._template, self._instruction, text, extra_bos=self._config.extra_bos
        )
        seed = self._config.seed_of_prompts(1)[0] + int(key[:7], 16)
        config = replace(self._config, seed=seed)
        (request,) = self._model.prepare_requests(None, [prompt], config)
        return request


def instructed_prompt(
    template: ChatFormat, instruction: str, text: str, *, extra_bos: bool = True
) -> str:
    """The prompt of a text with the instruction as system message. Where a template has no place for one,
    the instruction comes before the text."""
    if isinstance(template, TokenizerChatTemplate) and not template.takes_system:
        return template.render([(f"{instruction}\n\n{text}", None)], extra_bos=extra_bos)
    return template.render([(text, None)], system=instruction, extra_bos=extra_bos)
