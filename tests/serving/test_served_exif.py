"""A server turns photos as its model does: the model's pixels, sizes for boxes, and the page's pictures."""

import asyncio
import io
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
from helpers import tiny
from helpers.serving import make_service
from helpers.sideways import SIZE, stored, upright, write_photo
from PIL import Image

import minigpt4_jax
from minigpt4_jax.processing.images import load_pixels
from minigpt4_jax.serving.app import create_app
from minigpt4_jax.serving.errors import RequestError
from minigpt4_jax.serving.ui import handlers, layout
from minigpt4_jax.serving.ui.conversation import PageConversation
from minigpt4_jax.serving.ui.examples import PageExample
from minigpt4_jax.serving.ui.page import mount_page
from minigpt4_jax.serving.ui.stored_copies import stored_copy
from minigpt4_jax.serving.ui.tasks import V2_SHORTCUTS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exif") / "model"
    return minigpt4_jax.load(tiny.write_random_model(folder, llm_layers=1), dtype="float32")


@pytest.fixture(params=[True, False])
def service(request, model, monkeypatch):
    monkeypatch.setattr(model, "exif", request.param)
    return make_service(model)


def size_of(service):
    return SIZE[::-1] if service.model.exif else SIZE


def test_the_model_reads_the_photo_as_it_says(service, tmp_path):
    photo = write_photo(tmp_path / "1.png")
    read = service.images.read(photo.read_bytes())
    expected = (upright if service.model.exif else stored)(photo)
    np.testing.assert_array_equal(read.input.pixels, load_pixels(expected, 28))
    assert read.size == expected.size


def test_the_size_of_a_tiff_is_that_of_its_pixels(model, monkeypatch):
    """Pillow turns TIFFs itself: their size must not be turned once more."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(file, "TIFF", exif=exif)
    monkeypatch.setattr(model, "exif", True)
    assert make_service(model).images.read(file.getvalue()).size == SIZE[::-1]


def test_a_file_that_is_no_image_is_told_as_such(model):
    file = io.BytesIO()
    Image.new("RGB", SIZE).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", SIZE)])
    images = make_service(model).images
    assert images.read(file.getvalue()).size == SIZE  # of some cameras
    with pytest.raises(
        RequestError, match=r"cannot be read \(another file, or damaged\); expected"
    ):
        images.read(b"no image")


@pytest.fixture
def page(service, tmp_path, monkeypatch):
    """The handlers of the page of a MiniGPT-v2 that always gives the same answer."""

    async def answer(*_):
        yield SimpleNamespace(text="<p>a cup</p> {<0><0><50><50>}", note="")

    monkeypatch.setattr(handlers, "answer", answer)
    return handlers.Handlers(
        service, tmp_path, V2_SHORTCUTS, [], draws_boxes=True, has_system=False
    )


def ask(page, conversation, text, files=(), picture=None):
    """Send a question; returns the pictures beside the chat that it sets."""
    question = {"text": text, "files": [{"path": str(file)} for file in files]}

    async def views():
        settings = (1.0, 0.9, 1, 8, "")
        asked = page.ask(conversation, "", question, picture, None, *settings)
        return [view.picture async for view in asked]

    return [picture["value"] for picture in asyncio.run(views()) if "value" in picture]


def test_the_page_shows_what_the_model_reads(service, page, tmp_path):
    photo, conversation = write_photo(tmp_path / "1.png"), PageConversation()
    box = {"xmin": 0, "ymin": 0, "xmax": 12, "ymax": 12}
    picture = {"image": {"path": str(photo)}, "boxes": [box]}
    ask(page, conversation, "[identify] what is this", picture=picture)
    (turn,) = conversation.turns
    (image,) = turn.images
    assert image.size == size_of(service)
    assert ("<50><30>" if service.model.exif else "<30><50>") in turn.question
    for path in (image.thumbnail, turn.marked_question, turn.marked_answer):
        with Image.open(path) as shown:
            assert (shown.height > shown.width) == service.model.exif


def as_browsers_show(path):
    """A picture turned by its EXIF orientation, as a browser and the box annotator show it."""
    return np.asarray((upright if Image.open(path).getexif().get(0x0112) == 6 else stored)(path))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_stored_copy_has_the_same_pixels_and_is_not_turned(tmp_path, suffix, order):
    exif, photo = Image.Exif(), tmp_path / f"1.{suffix}"
    exif.endian = order
    exif[0x010F], exif[0x0112], exif[0x0132] = "camera", 6, "2026:01:01 00:00:00"
    stored(write_photo(tmp_path / "plain.png")).save(photo, exif=exif)
    copy = stored_copy(photo, tmp_path)
    with Image.open(copy) as shown:
        assert dict(shown.getexif()) == dict(exif) | {0x0112: 1}
    np.testing.assert_array_equal(stored(copy), stored(photo))
    assert copy.stat().st_size == photo.stat().st_size
    assert stored_copy(copy, tmp_path) == copy  # it needs none


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\xff\xd8\xff\xe1\x00\x10Exif\0\0II*\0\xff"]
)
def test_a_file_that_cannot_be_read_is_its_own_copy(tmp_path, content):
    (tmp_path / "1.jpg").write_bytes(content)
    assert stored_copy(tmp_path / "1.jpg", tmp_path) == tmp_path / "1.jpg"


def test_the_picture_that_is_shown_is_the_models(service, page, tmp_path):
    """On upload, behind a question with files, and of a question that is edited; it is one picture."""
    photo, conversation = write_photo(tmp_path / "1.jpg"), PageConversation()
    expected = np.asarray((upright if service.model.exif else stored)(photo))
    added = asyncio.run(page.picture_added({"image": {"path": str(photo)}, "boxes": []}))
    uploaded = str(photo) if added == gr.skip() else added["value"]["image"]
    (asked,) = ask(page, conversation, "what is this", [photo])
    np.testing.assert_array_equal(as_browsers_show(uploaded), expected)
    np.testing.assert_array_equal(as_browsers_show(asked["image"]), expected)
    for path in (uploaded, asked["image"]):
        ask(page, conversation, "and now", picture={"image": {"path": path}, "boxes": []})
    assert [len(turn.images) for turn in conversation.turns] == [1, 0, 0]
    del conversation.turns[1:]
    undone = page.undo(conversation).picture["value"]["image"]
    np.testing.assert_array_equal(as_browsers_show(undone), expected)


def test_a_page_replaces_pictures_only_where_the_model_does_not_turn_them(
    service, tmp_path, monkeypatch
):
    photo, built, build = write_photo(tmp_path / "1.png"), [], layout.build
    monkeypatch.setattr(
        layout, "build", lambda info: built.append((info, build(info))) or built[-1][1]
    )
    mount_page(create_app(service), service, [PageExample(photo, "what is this?")])
    ((info, page),) = built
    triggers = [target for fn in page.blocks.fns.values() for target in fn.targets]
    assert ((page.picture._id, "upload") in triggers) != service.model.exif
    ((example, _),) = info.examples
    expected = (upright if service.model.exif else stored)(photo)
    np.testing.assert_array_equal(as_browsers_show(example), expected)
    assert Path(example).suffix == ".png"
