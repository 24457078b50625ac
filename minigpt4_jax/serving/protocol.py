"""The requests of the HTTP interface: OpenAI's fields, some of vLLM's and some of this project's.

A field that is not known, or that would change the answer in a way that is not implemented, is an
error. The fields of IGNORED have no effect; the response names those that were given.
"""

from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
)  # fmt: skip
# Refused unless they have a value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "function_call": ("none",), "functions": ([],), "logit_bias": ({},),
    "modalities": (["text"],), "prediction": (), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "tool_choice": ("none",), "tools": ([],),
    "verbosity": ("medium",), "web_search_options": (), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "dimensions": (), "moderation": (),
}  # fmt: skip


MAX_VALUES = 10_000  # of a request's JSON


class Body(BaseModel):
    """The base of all requests: JSON types are not converted, and unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None

    _ignored: list[str] = PrivateAttr(default_factory=list)

    @property
    def ignored(self) -> list[str]:
        """The given fields that have no effect."""
        return sorted(self._ignored)

    @model_validator(mode="wrap")
    @classmethod
    def _take_out_foreign(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate without OpenAI's other fields. ValueError: one that would have an effect, or more
        values than MAX_VALUES."""
        if not isinstance(values, dict):
            return handler(values)
        _check_count(values)
        foreign = [n for n in values if n in (*IGNORED, *UNSUPPORTED) and n not in cls.model_fields]
        for name in foreign:
            harmless = (None, *UNSUPPORTED.get(name, (values[name],)))
            if values[name] not in harmless:
                raise ValueError(f"{name} is not supported; leave it out")
        body = handler({name: value for name, value in values.items() if name not in foreign})
        body._ignored = foreign
        return body


def _check_count(body: dict[str, Any]) -> None:
    """ValueError: more values than any request needs. Each of them could be an error of its own, of a
    kilobyte and more."""
    count, waiting = 0, [body]
    while waiting:
        value: Any = waiting.pop()
        if isinstance(value, (dict, list)):
            count += len(value)
            if count > MAX_VALUES:
                raise ValueError(f"the request has more than {MAX_VALUES} values")
            waiting += value.values() if isinstance(value, dict) else value


class StreamOptions(BaseModel):
    """stream_options of a streamed request."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against side channels: never added


class Sampling(Body):
    """How answers are generated. None is the server's default."""

    max_tokens: int | None = None
    temperature: float | None = Field(None, le=100)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def options(self) -> dict[str, Any]:
        """The given options by the names of GenerationConfig."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        options = {
            "max_new_tokens": self.max_tokens, "temperature": self.temperature,
            "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p, "seed": self.seed,
            "stop": None if stop is None else tuple(stop), "stop_ids": self.stop_token_ids,
            "min_new_tokens": self.min_tokens, "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty, "presence_penalty": self.presence_penalty,
            "num_beams": self.num_beams, "length_penalty": self.length_penalty,
        }  # fmt: skip
        return {name: value for name, value in options.items() if value is not None}

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


class ImageUrl(BaseModel):
    """Where an image is: a data URL, or http(s) where the server allows it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    url: str
    # No effect: the model has one input size.
    detail: Literal["auto", "low", "high", "original"] | None = None


class TextPart(BaseModel):
    """A text of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """An image of a message."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["image_url"]
    image_url: ImageUrl | str

    @property
    def url(self) -> str:
        """The address of the image."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class Message(BaseModel):
    """A message of a dialogue."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]
    name: str | None = None  # no effect: chat templates have no names
    refusal: None = None
    # Fields of this server's own answers, so that they can be sent back as they are.
    boxes: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # Whether the answer's boxes are also given in pixels of the last image.
    boxes: bool = False

    @property
    def ignored(self) -> list[str]:
        """As in the base class, also within messages."""
        found = set(super().ignored)
        for message in self.messages:
            if message.name is not None:
                found.add("messages.name")
            parts = message.content if isinstance(message.content, list) else []
            urls = [part.image_url for part in parts if isinstance(part, ImagePart)]
            if any(isinstance(url, ImageUrl) and url.detail not in (None, "auto") for url in urls):
                found.add("messages.image_url.detail")
        return sorted(found)

    def options(self) -> dict[str, Any]:
        """As in the base class; max_completion_tokens is the newer name of max_tokens."""
        options = super().options()
        if self.max_completion_tokens is not None:
            options["max_new_tokens"] = self.max_completion_tokens
        return options

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError(
                "max_tokens and max_completion_tokens are one option; give one of them"
            )
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions: complete prompts, to which a BOS is added."""

    prompt: str | list[str]
    # Data URLs of the images that `<ImageHere>` stands for, in the only prompt.
    images: list[str] = Field(default_factory=list)
    logprobs: int | None = Field(None, ge=0, le=5)


class EmbeddingRequest(Body):
    """POST /v1/embeddings: the projected features of images."""

    input: str | list[str]  # data URLs
    encoding_format: Literal["float", "base64"] = "float"
    # "mean": one vector [D] for an image; "none": all visual tokens, [P, D] in one list
    pooling: Literal["mean", "none"] = "mean"


class RankRequest(Body):
    """POST /v1/rank: how likely candidate answers to a question are."""

    question: str
    candidates: list[str] = Field(min_length=1)
    images: list[str] = Field(default_factory=list)  # data URLs
    # Whether the question is a complete prompt, with `<ImageHere>` where an image goes.
    raw: bool = False
