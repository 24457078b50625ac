"""python -m minigpt4_jax.serve --model=DIR: an OpenAI-compatible server.

POST /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/rank; GET /v1/models, /health, /ready,
/metrics; with --ui a web page at /ui. --ray=ADDRESS deploys replicas on a Ray cluster.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.cli import common, serve_ray
from minigpt4_jax.cli.serve_options import LOOPBACK, allowed_hosts, make_service, parse, read_keys
from minigpt4_jax.errors import UserError

if TYPE_CHECKING:
    from minigpt4_jax.serving.ui.examples import PageExample

log = logging.getLogger("minigpt4_jax.serving")


def _require_packages(*, page: bool) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401

        if page:
            import gradio  # noqa: F401
            import gradio_image_annotation  # noqa: F401
    except ImportError as e:
        raise UserError(
            f"the server needs the package {e.name}: "
            f"pip install 'minigpt4_jax[{'demo' if page else 'serve'}]'"
        ) from None


def _read_examples(args: argparse.Namespace) -> "list[PageExample]":
    """The page's examples. UserError: a wrong file, or one without the page."""
    if args.examples is None and not args.ui:
        return []
    if not args.ui:
        raise UserError("--examples are of the web page: add --ui")
    from minigpt4_jax.serving.ui.examples import demonstration_examples, read_examples

    return read_examples(args.examples) if args.examples else demonstration_examples(args.model)


def main(argv: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    args = parse(argv)
    _require_packages(page=args.ui)
    examples = _read_examples(args)
    keys = read_keys(args.api_key_file)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("minigpt4_jax").setLevel(logging.INFO)
    if args.host not in LOOPBACK and not keys:
        log.warning("no --api-key-file: anyone who reaches %s may use this server", args.host)
    common.check_kind(args.model, keeps_images=True)
    if args.ray is not None:
        return serve_ray.main(args, keys)
    from minigpt4_jax.serving.app import create_app
    from minigpt4_jax.serving.server import make_server
    from minigpt4_jax.serving.server import run as run_server
    from minigpt4_jax.serving.warm_up import start_compiling

    loading = common.begin_loading(args)
    service = make_service(loading.model, args)
    app = create_app(
        service, keys=keys, allow_image_urls=args.allow_image_urls, log_prompts=args.log_prompts,
        unguarded=("/ui",) if args.ui else (),
        hosts=allowed_hosts(args, keys),
    )  # fmt: skip
    with contextlib.ExitStack() as exit_stack:
        compiler = None
        if args.warm_up:
            compiler = exit_stack.enter_context(start_compiling(service.scheduler))
        loading.finish()
        log.info("loaded %s in %.1f s", args.model, time.monotonic() - begin)
        if args.ui:
            from minigpt4_jax.serving.ui.page import mount_page

            mount_page(app, service, examples, keys=keys)
        server = make_server(
            app, service, args.host, args.port, shutdown_seconds=args.shutdown_timeout,
            compiled=args.warm_up, compiler=compiler,
        )  # fmt: skip
        run_server(server)
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
