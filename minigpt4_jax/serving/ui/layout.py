"""The components of the page and where they stand."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio_image_annotation import image_annotator

from minigpt4_jax.serving.ui.answering import Settings
from minigpt4_jax.serving.ui.examples import PageExample
from minigpt4_jax.serving.ui.tasks import Shortcut

STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
PLACEHOLDER = "### Ask about a picture\nAdd one{}."
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # the reader's own: nothing is loaded
MONO_FONTS = ("ui-monospace", "monospace")


class PageInfo(NamedTuple):
    """What the page says about its model.

    Attributes:
        facts: short texts, such as the precision.
        draws_boxes: whether the model knows boxes.
        system: the default system message; None: the template has none.
    """

    name: str
    title: str
    facts: Sequence[str]
    draws_boxes: bool
    system: str | None
    defaults: Settings
    max_new_tokens: int
    max_beams: int
    shortcuts: Sequence[Shortcut]
    examples: Sequence[PageExample]


class Page(NamedTuple):
    """The components that have handlers."""

    blocks: gr.Blocks
    picture: Any
    examples: Any
    settings: list[Any]  # in the order of Settings
    system: Any
    chat: Any
    shortcuts: list[Any]
    hint: Any
    box: Any
    status: Any
    boxes: Any
    new_conversation: Any
    edit: Any
    save_conversation: Any
    open_conversation: Any
    save_picture: Any
    download: Any
    token: Any


def theme() -> Any:
    """Gradio's theme with fonts of the reader's system."""
    return gr.themes.Soft(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS
    )


def build(info: PageInfo) -> Page:
    """The page, without handlers."""
    with gr.Blocks(
        title=f"{info.title}: {info.name}", analytics_enabled=False, fill_width=True,
        delete_cache=(3600, 24 * 3600),
    ) as blocks:  # fmt: skip
        gr.HTML(_header(info), elem_id="header", padding=False)
        token = gr.Textbox(visible="hidden", elem_id="token")
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(scale=4, min_width=320, elem_id="side"):
                gr.HTML(
                    _picture_caption(info.draws_boxes), elem_id="picture-caption", padding=False
                )
                picture = _picture(info.draws_boxes)
                examples = _examples(info.examples)
                settings, system = _settings(info)
            with gr.Column(scale=7, min_width=340, elem_id="main"):
                chat = gr.Chatbot(
                    elem_id="chat", show_label=False, height="max(320px, min(60vh, 680px))",
                    buttons=["copy"], latex_delimiters=[],
                    placeholder=PLACEHOLDER.format(", or choose an example" if info.examples else ""),
                    feedback_options=None, group_consecutive_messages=False,
                )  # fmt: skip
                status = gr.HTML(elem_id="status", padding=False)
                with gr.Row(elem_id="tasks"):
                    shortcuts = [
                        gr.Button(s.name, size="sm", min_width=60, elem_classes="task")
                        for s in info.shortcuts
                    ]
                box = gr.MultimodalTextbox(
                    elem_id="question", show_label=False, autofocus=True, lines=1, max_lines=8,
                    placeholder="Ask about the picture",
                    file_count="multiple", file_types=["image"], sources=["upload"],
                )  # fmt: skip
                hint = gr.HTML(elem_id="hint", padding=False)
                with gr.Row(elem_id="actions"):
                    new_conversation = _action("New conversation", "new-conversation")
                    edit = _action("Edit question", "edit")
                    save_conversation = _action("Save conversation", "save-conversation")
                    open_conversation = gr.UploadButton(
                        "Open conversation", size="sm", min_width=80, file_types=[".json"],
                        file_count="single", elem_id="open-conversation",
                    )  # fmt: skip
                    save_picture = _action("Save picture", "save-picture", visible=info.draws_boxes)
                boxes = gr.HTML(elem_id="boxes", padding=False, visible=info.draws_boxes)
                download = gr.DownloadButton(visible="hidden", elem_id="download")
    return Page(
        blocks, picture, examples, settings, system, chat, shortcuts, hint, box, status, boxes,
        new_conversation, edit, save_conversation, open_conversation, save_picture, download, token,
    )  # fmt: skip


def _header(info: PageInfo) -> str:
    facts = "".join(f"<span>{html.escape(fact)}</span>" for fact in info.facts)
    name = html.escape(info.name)  # by default that of the model's directory
    return f"<h1>{info.title}</h1><div class='facts'><b>{name}</b>{facts}</div>"


def _picture_caption(draws_boxes: bool) -> str:
    marking = " Drag on it to mark a box." if draws_boxes else ""
    return f"<b>Picture</b> for the next question.{marking}"


def _action(name: str, elem_id: str, **options: Any) -> Any:
    return gr.Button(name, size="sm", min_width=80, elem_id=elem_id, **options)


def _picture(draws_boxes: bool) -> Any:
    sources: Any = ["upload", "clipboard", "webcam"]
    if not draws_boxes:
        return gr.Image(
            label="Picture", show_label=False, sources=sources, type="filepath", image_mode=None, height=300,
            elem_id="picture",
        )  # fmt: skip
    return image_annotator(
        label="Picture", show_label=False, sources=sources, single_box=True, disable_edit_boxes=True,
        boxes_alpha=0.1, box_thickness=3, height=300, elem_id="picture", show_share_button=False,
        show_download_button=False, label_list=["this"], label_colors=[(67, 56, 202)],
        use_default_label=True,
    )  # fmt: skip


def _examples(examples: Sequence[PageExample]) -> Any:
    samples = [[str(example.image), example.question] for example in examples]
    return gr.Dataset(
        label="Examples", components=[gr.Image(render=False, type="filepath"), gr.Textbox(render=False)],
        headers=["picture", "question"], samples=samples, type="index", samples_per_page=4,
        visible=bool(samples), elem_id="examples",
    )  # fmt: skip


def _settings(info: PageInfo) -> tuple[list[Any], Any]:
    values = info.defaults
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        settings = [
            gr.Slider(0, 2, value=values.temperature, step=0.1, label="Temperature",
                      info="0 always takes the most likely token"),
            gr.Slider(0.05, 1, value=values.top_p, step=0.05, label="Top-p",
                      info="samples from the most likely tokens that have this probability together"),
            gr.Slider(1, info.max_beams, value=values.num_beams, step=1, label="Beams",
                      info="more than 1 searches for the most likely answer, without sampling or streaming"),
            gr.Slider(1, info.max_new_tokens, value=values.max_new_tokens, step=1, label="Length",
                      info="tokens of an answer at most"),
            # not a Number, which turns an empty field into 0
            gr.Textbox(label="Seed", placeholder="another each time", max_lines=1,
                       info="a whole number; the same one gives the same answer"),
        ]  # fmt: skip
        system = gr.Textbox(
            label="System message", value=info.system or "", lines=2, visible=info.system is not None,
            info="from the next question on",
        )  # fmt: skip
    return settings, system
