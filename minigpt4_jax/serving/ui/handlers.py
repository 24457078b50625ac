"""What happens on the page: questions, stop, retry, undo, edit, examples, files."""

import asyncio
import html
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.transcript import Transcript, read_transcript
from minigpt4_jax.serving.errors import RequestError, invalid
from minigpt4_jax.serving.service import Service
from minigpt4_jax.serving.ui import rendering
from minigpt4_jax.serving.ui.answering import Settings, answer
from minigpt4_jax.serving.ui.conversation import PageConversation, PageImage, PageTurn
from minigpt4_jax.serving.ui.examples import PageExample
from minigpt4_jax.serving.ui.inputs import drawn_box, picture_file, question_of, settings_of
from minigpt4_jax.serving.ui.stored_copies import stored_copy
from minigpt4_jax.serving.ui.tasks import Box, Shortcut, needs_box, with_box

LOST = (
    "The conversation that was here is gone: the server was restarted, or the page loaded again. "
    "You can go on with a new one; “Save conversation” keeps a copy."
)


class View(NamedTuple):
    """What most handlers change: chat, question box, picture, status and table of boxes."""

    chat: Any
    box: Any
    picture: Any
    status: Any
    boxes: Any


class Handlers:
    """The handlers of one model's page."""

    def __init__(
        self, service: Service, folder: Path, shortcuts: Sequence[Shortcut], examples: Sequence[PageExample],
        *, draws_boxes: bool, has_system: bool,
    ):  # fmt: skip
        """folder: for the files that the page shows."""
        self._service, self._folder, self._draws_boxes = service, folder, draws_boxes
        self._has_system = has_system
        self._shortcuts, self._examples = shortcuts, examples

    # --- questions --------------------------------------------------------------------------------

    async def ask(
        self,
        conversation: PageConversation,
        token: str,
        box: Any,
        picture: Any,
        system: str | None,
        *settings: Any,
    ) -> AsyncIterator[View]:
        """Answer the question in the box.

        box, picture and settings are as the browser sends them (`preprocess=False`): the annotator would
        decode the picture, whatever its size and format, and encode it again."""
        lost = bool(token) and token != conversation.client
        question, files = question_of(box)
        try:
            self._check_free(conversation)
            path, drawn = picture_file(picture), drawn_box(picture)
            values = settings_of(settings)
            images = await self._new_images(conversation, [path, *files])
            turn = await self._turn(question, images, drawn, path)
        except (RequestError, UserError) as e:
            yield self._view(conversation, status=_problem(f"{LOST if lost else ''} {e}"))
            return
        if lost:
            gr.Warning(LOST)
            conversation.client = token
        conversation.system = system if self._has_system else None
        conversation.turns.append(turn)
        shown = gr.skip() if not files else self._picture(images[-1].path)
        async for view in self._answer(conversation, values, restored=[]):
            yield view._replace(picture=shown)
            shown = gr.skip()

    async def retry(
        self, conversation: PageConversation, token: str, *settings: Any
    ) -> AsyncIterator[View]:
        """Answer the last question again, with another seed."""
        if conversation.is_busy or not conversation.turns:
            yield self._view(
                conversation, status=_problem("" if token == conversation.client else LOST)
            )
            return
        try:
            values = settings_of(settings)
        except RequestError as e:
            yield self._view(conversation, status=_problem(str(e)))
            return
        turn = conversation.turns[-1]
        retries = turn.retries + 1
        conversation.update_last(answer="", marked_answer=None, note="", retries=retries)
        if values.seed is not None:
            values = replace(values, seed=values.seed + retries)
        async for view in self._answer(conversation, values, restored=[turn]):
            yield view

    async def _answer(
        self, conversation: PageConversation, settings: Settings, restored: list[PageTurn]
    ) -> AsyncIterator[View]:
        """Answer the last turn. restored: replaces it if there is no answer."""
        question = conversation.turns[-1].question
        conversation.is_busy = True
        running = gr.update(value=None, submit_btn=False, stop_btn=True)
        idle = gr.update(submit_btn=True, stop_btn=False)
        try:
            yield self._view(
                conversation, box=running, status="<span>Thinking …</span>", partial=""
            )
            async for update in answer(self._service, conversation, settings):
                conversation.update_last(answer=update.text, note=update.note)
                if not update.note:
                    yield self._view(
                        conversation, status="<span>Writing …</span>", partial=update.text
                    )
            await self._finish(conversation)
            yield self._view(conversation, box=idle)
        except (RequestError, UserError) as e:
            conversation.turns[-1:] = restored
            idle = gr.update(value={"text": question, "files": []}, submit_btn=True, stop_btn=False)
            yield self._view(conversation, box=idle, status=_problem(str(e)))
        finally:
            conversation.is_busy = False

    async def _finish(self, conversation: PageConversation) -> None:
        """Draw the boxes of a finished answer."""
        turn = conversation.turns[-1]
        if not (self._draws_boxes and conversation.images and turn.answer):
            return
        out = self._file("boxes", ".png")
        draw = rendering.write_marked
        exif = self._service.model.exif
        if await asyncio.to_thread(draw, conversation.images[-1].path, turn.answer, out, exif=exif):
            conversation.update_last(marked_answer=out)

    async def _turn(
        self, question: str, images: list[PageImage], drawn: Box | None, path: str | None
    ) -> PageTurn:
        """The next turn, with the drawn box in its text if it asks about one."""
        if not question.strip():
            raise invalid("Write a question first.")
        if not (self._draws_boxes and needs_box(question)):
            return PageTurn(question, tuple(images))
        if path is None or drawn is None:
            raise invalid("Draw a box on the picture first: press and drag.")
        image = await self._read(path)
        question = with_box(question, drawn, image.size)
        out = self._file("question", ".png")
        exif = self._service.model.exif
        await asyncio.to_thread(rendering.write_marked, image.path, question, out, exif=exif)
        return PageTurn(question, tuple(images), marked_question=out)

    def _check_free(self, conversation: PageConversation) -> None:
        if conversation.is_busy:
            raise invalid("The answer is still being written; stop it first.")

    # --- images -----------------------------------------------------------------------------------

    async def _new_images(
        self, conversation: PageConversation, paths: Sequence[str | None]
    ) -> list[PageImage]:
        """The images that the conversation does not have yet. RequestError: not readable, or too many."""
        new: dict[bytes, PageImage] = {}
        for path in paths:
            if path is not None:
                image = await self._read(path)
                if not conversation.has_image(image):
                    new[image.read.input.digest] = image
        limit = self._service.limits.images
        if len(conversation.images) + len(new) > limit:
            raise invalid(f"More than {limit} pictures are in this conversation; start a new one.")
        return list(new.values())

    async def picture_added(self, picture: Any) -> Any:
        """The picture as the model reads it, for a model that does not rotate by EXIF: browsers do, and a
        box would be drawn into the rotated picture. picture: as the browser sends it."""
        path = Path(picture_file(picture) or "")
        try:
            shown = await asyncio.to_thread(self._shown, path)
        except OSError:  # a question about it says so
            shown = path
        return gr.skip() if shown == path else self._picture(shown)

    def _shown(self, path: Path) -> Path:
        """The file of a picture that a browser shows as the model reads it."""
        return path if self._service.model.exif else stored_copy(path, self._folder)

    async def _read(self, path: str) -> PageImage:
        try:
            file = await asyncio.to_thread(self._shown, Path(path))
            data = await asyncio.to_thread(file.read_bytes)
        except OSError:
            raise invalid("The server does not have this picture any more; add it again.") from None
        image = await self._service.read_image(data)
        thumbnail = self._folder / f"{image.input.digest.hex()}.jpg"
        if not thumbnail.exists():
            write, exif = rendering.write_thumbnail, self._service.model.exif
            await asyncio.to_thread(write, file, thumbnail, exif=exif)
        return PageImage(file, image, thumbnail)

    def _picture(self, path: Path | None) -> Any:
        if path is None:
            return gr.update(value=None)
        value: Any = {"image": str(path), "boxes": []} if self._draws_boxes else str(path)
        return gr.update(value=value)

    def _file(self, name: str, suffix: str) -> Path:
        folder = self._folder / secrets.token_hex(8)
        folder.mkdir()
        return folder / f"{name}{suffix}"

    # --- history ----------------------------------------------------------------------------------

    async def stop(self, conversation: PageConversation) -> None:
        """End the answer that is being written; what is there is kept."""
        while conversation.is_busy:
            if conversation.stop is not None:
                conversation.stop()
                return
            await asyncio.sleep(0.05)  # its prompt is still being prepared

    def undo(self, conversation: PageConversation) -> View:
        """Remove the last question and its answer; the question and its images can be sent again."""
        if conversation.is_busy or not conversation.turns:
            return self._view(conversation)
        turn = conversation.turns.pop()
        paths = [image.path for image in turn.images]
        files = [str(path) for path in paths[:-1]]
        view = self._view(
            conversation, box=gr.update(value={"text": turn.question, "files": files})
        )
        return view._replace(picture=self._picture(paths[-1])) if paths else view

    def new_conversation(self, conversation: PageConversation) -> View:
        """Forget the history and the picture."""
        if conversation.stop is not None:
            conversation.stop()
        conversation.turns = []
        view = self._view(conversation, box=gr.update(value=None, submit_btn=True, stop_btn=False))
        return view._replace(picture=gr.update(value=None))

    def load(
        self, had_conversation: str, box: Any, conversation: PageConversation
    ) -> tuple[str, Any, str]:
        """When the page is opened: its token, the question box and the status.

        had_conversation: there was one before. box has the question that was not answered."""
        conversation.client = secrets.token_hex(8)
        question, _ = question_of(box)
        shown = gr.update(value={"text": question, "files": []}) if question else gr.skip()
        return conversation.client, shown, _problem(LOST) if had_conversation else ""

    # --- files ------------------------------------------------------------------------------------

    def save_conversation(self, conversation: PageConversation) -> Any:
        """The conversation as a JSON file."""
        if not conversation.turns:
            gr.Warning("There is nothing to save yet.")
            return gr.skip()
        out = self._file("conversation", ".json")
        document = conversation.document(self._service.name)
        out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return gr.update(value=str(out))

    def save_picture(self, conversation: PageConversation) -> Any:
        """The last picture with boxes as a PNG file."""
        marked = [turn.marked_answer or turn.marked_question for turn in conversation.turns]
        found = [path for path in marked if path is not None]
        if not found:
            gr.Warning("No answer has boxes yet.")
            return gr.skip()
        return gr.update(value=str(found[-1]))

    async def open_conversation(self, conversation: PageConversation, path: str) -> View:
        """Replace the conversation by one that was saved."""
        if conversation.is_busy:
            return self._view(conversation)
        try:
            transcript = await asyncio.to_thread(read_transcript, Path(path), embedded_only=True)
            turns = await self._opened(transcript)
        except (RequestError, UserError) as e:
            return self._view(conversation, status=_problem(str(e).replace(path, Path(path).name)))
        conversation.turns = turns
        view = self._view(conversation)
        images = conversation.images
        return view._replace(picture=self._picture(images[-1].path if images else None))

    async def _opened(self, transcript: Transcript) -> list[PageTurn]:
        opened = PageConversation()
        for turn in transcript.turns:
            images = []
            for data in turn.images:
                file = self._file("image", "")
                file.write_bytes(data)  # type: ignore[arg-type]
                images.append(await self._read(str(file)))
            opened.turns.append(PageTurn(turn.question, tuple(images), turn.answer))
            await self._finish(opened)
        return opened.turns

    # --- examples and shortcuts -------------------------------------------------------------------

    def example(self, number: int) -> tuple[Any, Any]:
        """An example's picture and question."""
        image, question = self._examples[number]
        return self._picture(image), gr.update(value={"text": question, "files": []})

    def shortcut(self, number: int, box: Any) -> tuple[Any, str]:
        """A button's beginning of a question; files in the box stay."""
        files = (box or {}).get("files") or []
        shortcut = self._shortcuts[number]
        hint = f"<span>{html.escape(shortcut.hint)}</span>"
        return gr.update(value={"text": shortcut.text, "files": files}), hint

    # --- the view ---------------------------------------------------------------------------------

    def _view(
        self,
        conversation: PageConversation,
        *,
        box: Any = None,
        status: str | None = None,
        partial: str | None = None,
    ) -> View:
        """partial: the last answer, which is still being written."""
        last = conversation.turns[-1] if conversation.turns else None
        if status is None:
            status = f"<span>{html.escape(last.note)}</span>" if last and last.note else ""
        table = ""
        if self._draws_boxes and last and last.marked_answer and partial is None:
            table = rendering.box_table(last.answer, conversation.images[-1].size)
        messages = self._messages(conversation, partial)
        return View(messages, box or gr.skip(), gr.skip(), status, table)

    def _messages(
        self, conversation: PageConversation, partial: str | None = None
    ) -> list[dict[str, Any]]:
        """The messages of the chat, as Gradio's Chatbot takes them."""
        messages: list[dict[str, Any]] = []

        def add(role: str, content: Any) -> None:
            messages.append({"role": role, "content": content})

        for number, turn in enumerate(conversation.turns):
            for image in turn.images:
                if turn.marked_question is None or image is not turn.images[-1]:
                    add("user", _file_content(image.thumbnail, "picture"))
            if turn.marked_question is not None:
                add("user", _file_content(turn.marked_question, "picture with the marked box"))
            add("user", rendering.question_html(turn.question))
            if partial is not None and number == len(conversation.turns) - 1:
                add("assistant", self._html(partial, finished=False) or "…")
                continue
            add("assistant", self._html(turn.answer) or "*(no answer)*")
            if turn.marked_answer is not None:
                add("assistant", _file_content(turn.marked_answer, "picture with boxes"))
        return messages

    def _html(self, answer: str, *, finished: bool = True) -> str:
        if not self._draws_boxes:
            return rendering.escape(answer)
        return rendering.answer_html(answer) if finished else rendering.partial_html(answer)


def _file_content(path: Path, text: str) -> dict[str, str]:
    return {"path": str(path), "alt_text": text}


def _problem(message: str) -> str:
    return f"<span class='problem'>{html.escape(message)}</span>"
