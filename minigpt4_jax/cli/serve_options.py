"""The options of `minigpt4 serve`, and what the server and its replicas on a cluster make of them."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4_jax.cli import common, ray_cluster
from minigpt4_jax.cli.chat_session import generation_options
from minigpt4_jax.errors import UserError

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.serving.limits import Limits
    from minigpt4_jax.serving.service import Service

KEY_VARIABLE = "MINIGPT4_JAX_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NOT_FOR_A_SERVER = [
    "num_beams",
    "length_penalty",
    "early_stopping",
    "num_return_sequences",
    "seed",
    "context",
]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.make_parser(
        "serve", "Answer requests of OpenAI's API. Needs pip install 'minigpt4_jax[serve]'."
    )
    network = p.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1",
                         help="address to listen on; 0.0.0.0 is every network of this machine")  # fmt: skip
    network.add_argument("--port", type=int, default=8000, help="0 chooses a free one")
    network.add_argument("--api-key-file", type=Path, metavar="FILE",
                         help="keys, one on a line, of which every request must have one; also "
                         f"from the environment variable {KEY_VARIABLE}")  # fmt: skip
    network.add_argument("--allowed-host", action="append", default=[], metavar="NAME",
                         help="a name of this server beside localhost, for instance its proxy's; may be "
                         "repeated. A server without keys and --host refuses other names")  # fmt: skip
    network.add_argument("--served-name", metavar="NAME",
                         help="the model's name in the API, by default the directory's")  # fmt: skip
    network.add_argument("--allow-image-urls", action="store_true",
                         help="download images from http(s) addresses of public hosts")  # fmt: skip
    network.add_argument("--log-prompts", action="store_true", help="log questions and answers")
    network.add_argument("--shutdown-timeout", type=float, default=30.0, metavar="SECONDS",
                         help="for answering what runs, after SIGTERM")  # fmt: skip
    limits = p.add_argument_group("limits")
    limits.add_argument("--max-batch", type=int, default=32, help="answers generated together")
    limits.add_argument("--max-queue", type=int, default=128,
                        help="requests that wait; more get status 429")  # fmt: skip
    limits.add_argument("--max-context", type=int, metavar="TOKENS",
                        help="of a prompt and its answer; by default the model's, at most 4096")  # fmt: skip
    limits.add_argument("--max-answer", type=int, default=1024, metavar="TOKENS",
                        help="of an answer")  # fmt: skip
    limits.add_argument("--cache-tokens", type=int,
                        help="of all running answers; by default as memory allows")  # fmt: skip
    limits.add_argument("--prefill-tokens", type=int, metavar="TOKENS",
                        help="of new prompts, processed between two steps of the running answers; fewer "
                        "make their tokens come more evenly")  # fmt: skip
    limits.add_argument("--request-timeout", type=float, default=300.0, metavar="SECONDS",
                        help="until an answer must be complete")  # fmt: skip
    limits.add_argument("--max-body-mb", type=float, default=32.0, help="of a request")
    limits.add_argument("--max-image-mb", type=float, default=10.0, help="of an image file")
    limits.add_argument("--max-image-pixels", type=int, default=40_000_000, help="of an image")
    limits.add_argument("--max-images", type=int, default=16, help="of a request")
    limits.add_argument("--max-choices", type=int, default=16, help="answers to one request (n)")
    page = p.add_argument_group("web page (Needs pip install 'minigpt4_jax[demo]')")
    page.add_argument("--ui", action="store_true", help="a page to talk with the model, at /ui")
    page.add_argument("--examples", type=Path, metavar="FILE",
                      help='of the page: JSONL rows {"image", "question"}; by default those of the '
                      "demonstration that made the model")  # fmt: skip
    p.add_argument("--no-warm-up", dest="warm_up", action="store_false",
                   help="be ready at once, and compile programs when they are first needed")  # fmt: skip
    ray_cluster.add_options(
        p.add_argument_group("on a Ray cluster (needs pip install 'minigpt4_jax[ray]')")
    )
    common.add_generation_options(
        p, "defaults of requests: the original's chat", excluded=NOT_FOR_A_SERVER
    )
    args = p.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    """UserError: a number out of range, or options that exclude each other."""
    for name in (
        "max_batch", "max_queue", "max_context", "max_answer", "cache_tokens", "prefill_tokens",
        "request_timeout", "max_body_mb", "max_image_mb", "max_image_pixels", "max_images", "max_choices",
        "shutdown_timeout",
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}={value}: expected more than 0")
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port={args.port}: expected 0 to 65535")
    ray_cluster.check_options(args)
    if args.ray is not None and args.ui:
        raise UserError(
            "--ui is of a server without --ray; start a server with --ui on one machine, or use the "
            "cluster's /v1 with another page for OpenAI's API"
        )
    generation_options("", args)


def read_keys(file: Path | None) -> list[str]:
    """The API keys of a file and of the environment. UserError: no such file, or no key in it."""
    keys = [key for key in os.environ.get(KEY_VARIABLE, "").split() if key]
    if file is None:
        return keys
    try:
        found = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--api-key-file={file}: cannot be read ({e})") from None
    if not found:
        raise UserError(
            f"--api-key-file={file}: has no key; write one, for instance of `openssl rand -hex 32`"
        )
    return found + keys


def allowed_hosts(args: argparse.Namespace, keys: Sequence[str]) -> list[str] | None:
    """The names that requests may give the server; None: any."""
    return list(args.allowed_host) if args.host in LOOPBACK and not keys else None


def limits_of(args: argparse.Namespace) -> "Limits":
    """The limits of one request, of the command line."""
    from minigpt4_jax.serving.limits import Limits

    return Limits(
        body_bytes=int(args.max_body_mb * 1e6), image_bytes=int(args.max_image_mb * 1e6),
        pixels=args.max_image_pixels, images=args.max_images, choices=args.max_choices,
        seconds=args.request_timeout, open_requests=2 * (args.max_batch + args.max_queue),
    )  # fmt: skip


def make_service(model: "Model", args: argparse.Namespace) -> "Service":
    """The model and its scheduler, with the limits of the command line. UserError: they do not fit."""
    from minigpt4_jax.serving.config import scheduler_config
    from minigpt4_jax.serving.scheduler import Scheduler
    from minigpt4_jax.serving.service import Service

    config = scheduler_config(
        model, max_batch=args.max_batch, max_queue=args.max_queue, context=args.max_context,
        max_tokens=args.max_answer, cache_tokens=args.cache_tokens,
        prefill_tokens=args.prefill_tokens,
    )  # fmt: skip
    options = generation_options(model.config.variant, args)
    defaults = {name: v for name, v in options.items() if name not in NOT_FOR_A_SERVER}
    return Service(
        model, Scheduler(model, config), args.served_name or Path(args.model.rstrip("/")).name,
        template=args.template, system=args.system, limits=limits_of(args),
        defaults=defaults | {"extra_bos": args.extra_bos},
    )  # fmt: skip
