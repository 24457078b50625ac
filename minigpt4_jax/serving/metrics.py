"""What the server counts and times, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minigpt4_jax.serving.jobs import Generation

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class ServerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "minigpt4_"

        def counter(short: str, text: str, *labels: str) -> Counter:
            return Counter(name + short, text, labels, registry=self.registry)

        def histogram(short: str, text: str) -> Histogram:
            return Histogram(name + short, text, buckets=_SECONDS, registry=self.registry)

        self.responses = counter("http_responses", "responses", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "tokens of the prompts of started answers")
        self.cached_tokens = counter("cached_prompt_tokens", "of these, found in the prefix cache")
        self.generated_tokens = counter("generated_tokens", "generated tokens")
        self.images = counter("encoded_images", "images that went through the vision encoder")
        self.failures = counter("failed_requests", "requests that the device could not compute")
        self.queue_seconds = histogram("queue_seconds", "time in the queue")
        self.first_token = histogram("time_to_first_token_seconds", "from arrival to first token")
        self.token_gap = histogram(
            "token_gap_seconds", "between two deliveries of an answer's tokens"
        )
        self.answer_seconds = histogram("answer_seconds", "from arrival to the end of an answer")
        self.ready_seconds = Gauge(
            name + "startup_seconds", "from start to ready", registry=self.registry
        )

    def add_gauge(self, short: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read whenever the metrics are asked for."""
        gauge = Gauge(f"minigpt4_{short}", text, registry=self.registry)
        gauge.set_function(read)

    def started(self, job: Generation, seconds: float) -> None:
        """A request has left the queue after some seconds."""
        self.queue_seconds.observe(seconds)
        self.prompt_tokens.inc(len(job.request.tokens))

    def generated(self, job: Generation, tokens: int, gap: float | None) -> None:
        """Some new tokens of an answer, some seconds after those before."""
        self.generated_tokens.inc(tokens)
        if tokens and gap is None and job.first_token is not None:
            self.first_token.observe(job.first_token - job.submitted)
        elif tokens and gap is not None:
            self.token_gap.observe(gap)
        if job.finished is not None:
            self.cached_tokens.inc(job.cached_tokens)
            self.answer_seconds.observe(job.finished - job.submitted)

    def text(self) -> bytes:
        """Everything in Prometheus' format."""
        return generate_latest(self.registry)
