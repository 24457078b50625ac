"""The page of a model, mounted into the server's application."""

import hmac
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import jax
from fastapi import FastAPI
from fastapi.responses import RedirectResponse, Response

from minigpt4_jax.processing.chat_templates import ChatTemplate, TokenizerChatTemplate
from minigpt4_jax.serving.service import Service
from minigpt4_jax.serving.ui import layout, scripts
from minigpt4_jax.serving.ui.answering import Settings
from minigpt4_jax.serving.ui.conversation import PageConversation
from minigpt4_jax.serving.ui.examples import PageExample
from minigpt4_jax.serving.ui.guard import PageGuard
from minigpt4_jax.serving.ui.handlers import Handlers, View
from minigpt4_jax.serving.ui.layout import Page, PageInfo
from minigpt4_jax.serving.ui.stored_copies import stored_copy
from minigpt4_jax.serving.ui.tasks import shortcuts

PATH = "/ui"
MAX_BEAMS = 10
TITLES = {"minigpt-v2": "MiniGPT-v2", "blip2-opt": "BLIP-2", "blip2-flant5": "BLIP-2"}


def mount_page(
    app: FastAPI,
    service: Service,
    examples: Sequence[PageExample] = (),
    *,
    keys: Sequence[str] = (),
) -> None:
    """Add the page at /ui to an application of `create_app`, with `unguarded=(PATH,)` if it has keys.

    keys: API keys; with any, the page asks for one of them as password.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    folder = Path(tempfile.mkdtemp(prefix="minigpt4_jax-page-"))
    exif = service.model.exif
    if not exif:
        examples = [e._replace(image=stored_copy(e.image, folder)) for e in examples]
    info = page_info(service, examples)
    page = layout.build(info)
    handlers = Handlers(
        service, folder, info.shortcuts, info.examples,
        draws_boxes=info.draws_boxes, has_system=info.system is not None,
    )  # fmt: skip
    connect(page, handlers, exif=exif)
    page.blocks.queue(max_size=service.scheduler.config.max_queue, default_concurrency_limit=None)
    gr.mount_gradio_app(
        app, page.blocks, PATH, theme=layout.theme(), css=layout.STYLE, footer_links=[],
        run_history=False, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
        max_file_size=service.limits.image_bytes * service.limits.images,
        auth=_login(keys) if keys else None,
        auth_message="Any name, and an API key of this server as the password.",
        allowed_paths=[str(folder)],
    )  # fmt: skip
    app.add_middleware(PageGuard, path=PATH)
    app.state.closing.append(_mounted(app).stop_event.set)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return RedirectResponse(f"{PATH}/")


def _mounted(app: FastAPI) -> Any:
    """Gradio's application."""
    return next(route.app for route in app.routes if getattr(route, "path", None) == PATH)  # type: ignore[attr-defined]


def _login(keys: Sequence[str]) -> Callable[[str, str], bool]:
    known = [key.encode() for key in keys]

    def is_known(_: str, password: str) -> bool:
        # every key is compared, so that the time says nothing about them
        matches = [hmac.compare_digest(password.strip().encode(), key) for key in known]
        return any(matches)

    return is_known


def page_info(service: Service, examples: Sequence[PageExample]) -> PageInfo:
    """What the page says about the service's model, and the limits of its settings."""
    variant, scheduler = service.model.config.variant, service.scheduler.config
    defaults = service.generation_config({"seed": 0})
    device = jax.devices()[0]
    count = f"{jax.device_count()} x " if service.model.mesh is not None else ""
    return PageInfo(
        service.name, TITLES.get(variant, "MiniGPT-4"),
        [variant, service.model.engine.precision, f"{count}{device.device_kind}"],
        draws_boxes=variant == "minigpt-v2", system=_system(service),
        defaults=Settings(
            defaults.temperature, defaults.top_p, 1,
            min(defaults.max_new_tokens, scheduler.max_new_tokens), None,
        ),
        max_new_tokens=scheduler.max_new_tokens, max_beams=min(MAX_BEAMS, service.limits.choices),
        shortcuts=shortcuts(variant), examples=examples,
    )  # fmt: skip


def _system(service: Service) -> str | None:
    """The default system message; None where the template has no place for one."""
    template = service.template
    default = template.system if service.system is None else service.system
    if isinstance(template, TokenizerChatTemplate):
        return default if template.takes_system else None
    if isinstance(template, ChatTemplate) and template.system_format == "{}" and not default:
        return None
    return default


def connect(page: Page, handlers: Handlers, *, exif: bool) -> None:
    """Connect the components with the handlers. exif: whether the model rotates pictures, as browsers do."""
    view = View(page.chat, page.box, page.picture, page.status, page.boxes)
    remember = {"fn": None, "js": scripts.REMEMBER_CONVERSATION}
    with page.blocks:
        conversation = gr.State(PageConversation(), time_to_live=12 * 3600)

        def on(
            trigger: Any, fn: Callable[..., Any], inputs: Any, outputs: Any, **options: Any
        ) -> Any:
            return trigger(
                fn, inputs, outputs, show_progress="hidden", api_visibility="private", **options
            )

        asked = [conversation, page.token, page.box, page.picture, page.system, *page.settings]
        again = [conversation, page.token, *page.settings]
        ask = {"preprocess": False, "js": scripts.REMEMBER_QUESTION}
        on(page.box.submit, handlers.ask, asked, view, **ask).success(**remember)
        on(page.box.submit, lambda: "", None, page.hint)
        on(page.chat.retry, handlers.retry, again, view)
        on(page.box.stop, handlers.stop, conversation, None, queue=False)
        for trigger in (page.chat.undo, page.edit.click):
            on(trigger, handlers.undo, conversation, view)
        on(page.new_conversation.click, handlers.new_conversation, conversation, view).then(
            None, js=scripts.FORGET_CONVERSATION
        )
        on(
            page.open_conversation.upload,
            handlers.open_conversation,
            [conversation, page.open_conversation],
            view,
        ).then(**remember)
        for button, save in (
            (page.save_conversation, handlers.save_conversation),
            (page.save_picture, handlers.save_picture),
        ):
            on(button.click, save, conversation, page.download).success(None, js=scripts.DOWNLOAD)
        if not exif:
            add = handlers.picture_added
            on(page.picture.upload, add, page.picture, page.picture, preprocess=False)
        on(page.examples.click, handlers.example, page.examples, [page.picture, page.box])
        for number, button in enumerate(page.shortcuts):
            fn = _with_number(handlers.shortcut, number)
            on(button.click, fn, page.box, [page.box, page.hint])
        for script in (scripts.COPY_AS_SHOWN, scripts.KEEP_QUESTION):
            page.blocks.load(None, js=script)
        opened = [page.token, page.box, conversation]
        shown = [page.token, page.box, page.status]
        on(page.blocks.load, handlers.load, opened, shown, js=scripts.REMEMBERED)


def _with_number(fn: Callable[..., Any], number: int) -> Callable[[Any], Any]:
    return lambda value: fn(number, value)
