"""Texts polished by an OpenAI-compatible server.

The `openai` client retries with back-off and honours Retry-After. Every answer is stored before anything else
happens. A request carries its content's hash as Idempotency-Key: a server that knows it charges once for what
was in flight when a process was killed.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from minigpt4_jax.curation.answers import REFUSED, Answer, AnswerCache
from minigpt4_jax.errors import UserError
from minigpt4_jax.utils.text import one_line

if TYPE_CHECKING:
    import openai

RETRIES = 8  # about 40 seconds of back-off
TIMEOUT = 120.0  # seconds for one reply
_CONTINUE = "what was answered is kept, the same command continues"
_MAX_FAILURES = 3  # texts in a row without an answer before the run ends, beyond those in flight


@dataclass(frozen=True)
class EndpointConfig:
    """Where and how to ask. key_variable: the environment variable with the API key."""

    url: str
    model: str
    instruction: str
    temperature: float
    max_tokens: int
    concurrency: int = 8
    retries: int = RETRIES
    timeout: float = TIMEOUT
    key_variable: str = "OPENAI_API_KEY"

    def settings(self) -> dict[str, Any]:
        """What a reply depends on."""
        return {
            "endpoint": self.url, "model": self.model, "instruction": self.instruction,
            "temperature": self.temperature, "max_tokens": self.max_tokens,
        }  # fmt: skip


def base_url(url: str) -> str:
    """The URL that API paths are added to: /v1 if the user gave only a host. UserError: not http(s)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--endpoint={url}: expected a URL such as http://127.0.0.1:8000/v1")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def make_client(url: str, key_variable: str, retries: int, timeout: float) -> "openai.OpenAI":
    """UserError: the package openai is not installed."""
    try:
        import openai
    except ImportError:
        raise UserError(
            "--endpoint needs the package openai: pip install 'minigpt4_jax[curate]'"
        ) from None
    # The client insists on a key; local servers ignore it.
    key = os.environ.get(key_variable) or "none"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=timeout)


def only_model(client: "openai.OpenAI", url: str, key_variable: str) -> str:
    """The model of a server that has one. UserError: it has several, or cannot be reached."""
    import openai

    try:
        names = [model.id for model in client.models.list()]
    except openai.OpenAIError as e:
        raise _fatal(e, url, key_variable) from None
    except (AttributeError, TypeError):  # a web page, for instance
        raise UserError(
            f"--endpoint={url}: its list of models is none of OpenAI's API; is the URL right? It usually "
            "ends in /v1"
        ) from None
    if len(names) != 1:
        shown = ", ".join(sorted(names)[:20]) or "none"
        raise UserError(f"--endpoint={url}: choose one of its models with --served-model: {shown}")
    return names[0]


class _NoCompletion(Exception):
    """A reply that is no chat completion: of another server, or of a gateway in front of it."""


class EndpointPolisher:
    """Asks a server about texts, several at a time."""

    def __init__(self, client: "openai.OpenAI", config: EndpointConfig, cache: AnswerCache):
        self._client, self._config, self._cache = client, config, cache
        self._limit_name = "max_tokens"

    def run(self, texts: Mapping[str, str], on_answer: Callable[[Answer], None]) -> list[str]:
        """Ask about texts by their keys; every answer goes into the cache. Returns what failed.

        on_answer: called after each answer. UserError: the server cannot be reached, or refuses the key, the
        model or the first request.
        """
        failures: list[str] = []
        waiting = iter(texts.items())
        answered = consecutive = 0
        pool = ThreadPoolExecutor(self._config.concurrency)
        try:
            running: set[Future[Answer]] = set()
            while True:
                free = self._config.concurrency - len(running)
                running |= {pool.submit(self._ask, *item) for item in islice(waiting, free)}
                if not running:
                    return failures
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    error = self._failure(future, first=not answered)
                    if error is None:
                        answered, consecutive = answered + 1, 0
                        on_answer(future.result())
                        continue
                    failures.append(error)
                    consecutive += 1
                    if consecutive >= self._config.concurrency + _MAX_FAILURES:
                        raise UserError(
                            f"--endpoint={self._config.url}: {consecutive} texts in a row have no "
                            f"answer; the last: {error}; {_CONTINUE}"
                        )
        finally:
            # What is in flight is paid for: its answers are waited for, also after Ctrl-C.
            pool.shutdown(cancel_futures=True)

    def _failure(self, future: Future[Answer], *, first: bool) -> str | None:
        """Why a text has no answer, None if it has one. UserError: nothing will have one."""
        import openai

        error = future.exception()
        if error is None:
            return None
        lasting = (
            openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError
        )  # fmt: skip
        if isinstance(error, _NoCompletion):
            message = "its answer is no chat completion of OpenAI's API"
            if first:
                raise UserError(
                    f"--endpoint={self._config.url}: {message}; is the URL right? It usually ends in /v1"
                ) from None
            return message
        if isinstance(error, lasting) or getattr(error, "code", None) == "insufficient_quota":
            raise _fatal(error, self._config.url, self._config.key_variable) from None
        if isinstance(error, openai.OpenAIError):
            if first and not isinstance(error, openai.InternalServerError):
                raise _fatal(error, self._config.url, self._config.key_variable) from None
            return one_line(error)
        raise error

    def _ask(self, key: str, text: str) -> Answer:
        """Ask the server and store the answer, in a thread."""
        import openai

        try:
            answer = self._request(key, text)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as e:
            if getattr(e, "code", None) not in ("content_filter", "content_policy_violation"):
                raise
            answer = Answer(one_line(e), REFUSED)
        self._cache.put(key, text, answer)
        return answer

    def _request(self, key: str, text: str) -> Answer:
        import openai

        limit_name = self._limit_name
        try:
            completion = self._client.chat.completions.create(
                model=self._config.model,
                messages=[
                    {"role": "system", "content": self._config.instruction},
                    {"role": "user", "content": text},
                ],
                temperature=self._config.temperature,
                extra_headers={"Idempotency-Key": key},
                extra_body={limit_name: self._config.max_tokens},
            )
        except openai.BadRequestError as e:
            # newer models of OpenAI take only the other name
            if limit_name == "max_tokens" and "max_completion_tokens" in str(e):
                self._limit_name = "max_completion_tokens"
                return self._request(key, text)
            raise
        except ValueError:  # no JSON
            raise _NoCompletion from None
        return _read_completion(completion)


def _read_completion(completion: Any) -> Answer:
    """The client passes on what a server sends, unchecked. _NoCompletion: something else."""
    try:
        choice, usage = completion.choices[0], completion.usage
        return Answer(
            choice.message.content or "", choice.finish_reason or "stop",
            (usage.prompt_tokens or 0) if usage else 0,
            (usage.completion_tokens or 0) if usage else 0,
        )  # fmt: skip
    except (AttributeError, IndexError, TypeError):
        raise _NoCompletion from None


def _fatal(error: BaseException, url: str, key_variable: str) -> UserError:
    import openai

    hint = _CONTINUE
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        hint = f"set the API key in the environment variable {key_variable}"
    elif isinstance(error, openai.APIConnectionError):
        hint = f"is the server running? {hint}"
    return UserError(f"--endpoint={url}: {one_line(error)}; {hint}")
