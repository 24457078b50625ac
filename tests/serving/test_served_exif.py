"""A server turns photos as its model does: the model's pixels, sizes for boxes, and the page's pictures."""

import asyncio
import io
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny
from helpers.serving import make_service
from helpers.sideways import SIZE, stored, upright, write_photo
from PIL import Image

import minigpt4_jax
from minigpt4_jax.processing.images import load_pixels
from minigpt4_jax.serving.ui import handlers
from minigpt4_jax.serving.ui.conversation import PageConversation
from minigpt4_jax.serving.ui.tasks import V2_SHORTCUTS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exif") / "model"
    return minigpt4_jax.load(tiny.write_random_model(folder), dtype="float32")


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


def test_the_page_shows_what_the_model_reads(service, tmp_path, monkeypatch):
    photo, conversation = write_photo(tmp_path / "1.png"), PageConversation()

    async def answer(*_):
        yield SimpleNamespace(text="<p>a cup</p> {<0><0><50><50>}", note="")

    monkeypatch.setattr(handlers, "answer", answer)
    page = handlers.Handlers(
        service, tmp_path, V2_SHORTCUTS, [], draws_boxes=True, has_system=False
    )
    box = {"xmin": 0, "ymin": 0, "xmax": 12, "ymax": 12}
    picture = {"image": {"path": str(photo)}, "boxes": [box]}
    question = {"text": "[identify] what is this", "files": []}

    async def ask():
        async for _ in page.ask(conversation, "", question, picture, None, 1.0, 0.9, 1, 8, ""):
            pass

    asyncio.run(ask())
    (turn,) = conversation.turns
    (image,) = turn.images
    assert image.size == size_of(service)
    assert ("<50><30>" if service.model.exif else "<30><50>") in turn.question
    for path in (image.thumbnail, turn.marked_question, turn.marked_answer):
        with Image.open(path) as shown:
            assert (shown.height > shown.width) == service.model.exif
