"""The web page in a real browser: a tiny MiniGPT-v2, one server, one browser."""

import asyncio
import base64
import json
import re
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from fastapi.testclient import TestClient
from helpers import tiny
from helpers.browser import browser_page
from helpers.serving import SMALL, make_service, noise, running_server
from PIL import Image

import minigpt4_jax
from minigpt4_jax.processing.boxes import parse_boxes
from minigpt4_jax.serving.app import create_app
from minigpt4_jax.serving.service import Sender
from minigpt4_jax.serving.ui import answering, guard
from minigpt4_jax.serving.ui.examples import PageExample
from minigpt4_jax.serving.ui.page import mount_page
from minigpt4_jax.visualization.boxes import PALETTE

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SAMPLING = {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 48, "min_new_tokens": 48}


class Site:
    """A server with the page, which can be restarted at the same address."""

    def __init__(self, model, folder):
        self.model, self.folder = model, folder
        self.picture = folder / "picture.png"
        noise(1, 400, 300).save(self.picture)
        self._port, self._running = 0, None
        self.start()

    def start(self):
        self.service = make_service(self.model, SMALL)
        self.service.defaults = dict(SAMPLING)
        examples = [PageExample(self.picture, "[vqa] how many?")]
        self._running = running_server(
            self.service, port=self._port, mount=lambda app: mount_page(app, self.service, examples)
        )
        self.url = self._running.__enter__().url
        self._port = int(self.url.rsplit(":", 1)[1])

    def stop(self):
        self._running.__exit__(None, None, None)

    def expected(self, questions, **options):
        """The last answer of the same conversation without the server."""
        conversation = self.model.conversation()
        for n, question in enumerate(questions):
            images = [self.picture] if n == 0 else []
            answer = conversation.ask(question, images, **SAMPLING | options)
        return answer


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    # LoRA-free MiniGPT-v2 with four patches a token
    path = tiny.write_random_model(
        folder / "model", qformer=False, variant="minigpt-v2", merge_patches=4, llm_layers=1
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(answering, "INTERVAL", 0.0)  # every piece is sent
    site = Site(minigpt4_jax.load(path), folder)
    yield site
    site.stop()
    patch.undo()


@pytest.fixture(scope="module")
def browser():
    with browser_page() as page:
        yield page.context.browser


class Visitor:
    """A user with an open page."""

    def __init__(self, browser, site, size=DESKTOP):
        self.page = browser.new_page(viewport=size, accept_downloads=True)
        self.page.set_default_timeout(60_000)
        self.page.goto(f"{site.url}/")
        self.box.wait_for()

    @property
    def box(self):
        return self.page.locator("#question textarea")

    @property
    def status(self):
        return self.page.locator("#status")

    @property
    def answers(self):
        return self.page.locator("#chat .bot-row")

    def add_picture(self, path):
        self.page.locator("#picture input[type=file]").set_input_files(path)
        self.page.locator("#picture canvas").wait_for()

    def ask(self, text=None, *, wait=True):
        if text is not None:
            self.box.fill(text)
        self._turns = self.answers.count()
        self.box.press("Enter")
        if wait:
            self.wait_for_answer()

    def wait_for_answer(self):
        self.answers.nth(self._turns).wait_for()
        self.page.locator("#status", has_text=re.compile(r"\d+ tokens")).wait_for()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def set_seed(self, seed):
        field = self.page.get_by_label("Seed")
        if not field.is_visible():
            self.page.locator("#settings > button").click()
        field.fill(str(seed))
        field.blur()

    def download(self, name):
        with self.page.expect_download() as download:
            self.press(name)
        return download.value.path()

    def saved(self):
        """The conversation as it is downloaded."""
        return json.loads(self.download("Save conversation").read_text())["turns"]

    def close(self):
        self.page.close()


@pytest.fixture
def visitor(browser, site):
    visitor = Visitor(browser, site)
    yield visitor
    visitor.close()


def test_two_turns_a_retry_and_an_edited_question(site, visitor):
    visitor.add_picture(site.picture)
    visitor.set_seed(7)
    visitor.page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
            const all = document.querySelectorAll('#chat [data-testid=bot]');
            if (all.length) window.seen.add(all[all.length - 1].innerText.trim());
        }).observe(document.querySelector('#chat'),
            {subtree: true, childList: true, characterData: true}) }"""
    )
    visitor.ask("what is this?")
    assert visitor.page.evaluate("window.seen.size") > 2  # it grew
    assert re.search(r"48 tokens · [\d.]+ tokens/s · first token after [\d.]+ s · seed 7",
                     visitor.status.inner_text())  # fmt: skip
    visitor.ask("and why?")
    first, second = visitor.saved()
    (image,), second_images = first["images"], second["images"]
    assert not second_images
    assert base64.b64decode(image.partition(",")[2]) == site.picture.read_bytes()  # as uploaded
    assert first["answer"] == site.expected(["what is this?"], seed=7)
    assert second["answer"] == site.expected(["what is this?", "and why?"], seed=7)

    visitor.press("Retry")
    visitor.page.locator("#status", has_text="seed 8").wait_for()
    retried = visitor.saved()[1]["answer"]
    assert retried != second["answer"]

    visitor.press("Edit question")
    visitor.page.wait_for_function("document.querySelector('#question textarea').value != ''")
    assert visitor.box.input_value() == "and why?"
    visitor.ask("and how?")
    assert [turn["question"] for turn in visitor.saved()] == ["what is this?", "and how?"]
    visitor.press("New conversation")
    visitor.answers.first.wait_for(state="detached")


def test_a_drawn_box_is_sent(site, visitor):
    visitor.add_picture(site.picture)
    visitor.press("Identify")
    visitor.page.locator("#hint", has_text="Draw a box").wait_for()
    visitor.ask(wait=False)
    visitor.page.locator("#status", has_text="Draw a box on the picture first").wait_for()
    canvas = visitor.page.locator("#picture canvas").bounding_box()
    y, height = canvas["y"], canvas["height"]
    width = height * 4 / 3  # of the picture, in the middle of the canvas
    x = canvas["x"] + (canvas["width"] - width) / 2
    visitor.page.mouse.move(x + 0.25 * width, y + 0.2 * height)
    visitor.page.mouse.down()
    visitor.page.mouse.move(x + 0.5 * width, y + 0.5 * height, steps=4)
    visitor.page.mouse.move(x + 0.75 * width, y + 0.8 * height, steps=4)
    visitor.page.mouse.up()
    visitor.ask()
    question = visitor.saved()[0]["question"]
    ((_, box),) = parse_boxes(question.removeprefix("[identify] what is this "), 100, 100)
    assert box == pytest.approx((25, 20, 75, 80), abs=2)
    assert "{" not in visitor.page.locator("#chat [data-testid=user]").last.inner_text()


def test_boxes_of_an_answer_are_shown(site, visitor, tmp_path):
    visitor.add_picture(site.picture)
    visitor.ask("hello")
    path = visitor.download("Save conversation")
    document = json.loads(path.read_text())
    document["turns"][0]["answer"] = (
        "<p>a cat</p> {<10><20><30><40>} & <p>a dog</p> {<50><0><99><99>}"
    )
    (tmp_path / "conversation.json").write_text(json.dumps(document))
    visitor.page.locator("#actions input[type=file]").set_input_files(
        tmp_path / "conversation.json"
    )
    visitor.page.locator("#boxes table").wait_for()
    visitor.page.locator("#chat", has_text="a cat & a dog").wait_for()
    cells = visitor.page.locator("#boxes td").all_inner_texts()
    assert cells[:6] == ["a cat", "40", "60", "120", "120", "80 x 60"]
    assert visitor.answers.first.inner_text().strip() == "a cat & a dog"
    colors = visitor.page.locator("#chat [data-testid=bot] span[style]").evaluate_all(
        "found => found.map(e => getComputedStyle(e).color)"
    )
    assert colors == [f"rgb{PALETTE[0]}", f"rgb{PALETTE[1]}"]
    visitor.page.context.grant_permissions(["clipboard-read"])
    visitor.page.get_by_label("Copy message").last.click()
    visitor.page.wait_for_function(
        "async () => await navigator.clipboard.readText() == 'a cat & a dog'"
    )
    picture = Image.open(visitor.download("Save picture"))
    assert picture.format == "PNG"
    assert picture.getpixel((50, picture.height * 3 // 10)) == PALETTE[0]
    visitor.page.wait_for_function(
        "[...document.querySelectorAll('#chat [data-testid=bot] img')].some(i => i.naturalWidth == 500)"
    )


def test_an_empty_seed_is_another_each_time(visitor):
    for seed in ("one", "9" * 5000):
        visitor.set_seed(seed)
        visitor.ask("hello", wait=False)
        visitor.page.locator("#status", has_text=f"Seed '{seed[:3]}").wait_for()
    visitor.set_seed("")
    seeds = set()
    for _ in range(2):
        visitor.ask("hello")
        seeds.add(visitor.status.inner_text().rpartition("seed ")[2])
    assert len(seeds) == 2


@contextmanager
def busy_device(site):
    """No answer begins meanwhile."""
    release = threading.Event()

    async def wait():
        await site.service.call(lambda _: release.wait(60), (), Sender())

    busy = threading.Thread(target=lambda: asyncio.run(wait()))
    busy.start()
    yield
    release.set()
    busy.join()


def test_a_waiting_answer_is_stopped(site, visitor):
    """Also while the device is busy with something else."""
    with busy_device(site):
        visitor.ask("a long story", wait=False)
        visitor.page.locator("#question .stop-button").click()
        visitor.page.locator("#status", has_text="0 tokens · seed").wait_for()
        assert "stopped" in visitor.status.inner_text()
    visitor.ask("and now?")
    assert [bool(turn["answer"]) for turn in visitor.saved()] == [False, True]


def test_two_users_at_once(site, browser, visitor):
    other = Visitor(browser, site)
    questions = {visitor: "a cat?", other: "a dog?"}
    for seed, (user, question) in enumerate(questions.items()):
        user.add_picture(site.picture)
        user.set_seed(seed)
        user.box.fill(question)
    for user in questions:
        user.ask(wait=False)
    for seed, (user, question) in enumerate(questions.items()):
        user.wait_for_answer()
        assert [turn["answer"] for turn in user.saved()] == [site.expected([question], seed=seed)]
    other.close()


def test_the_server_is_restarted_under_an_open_page(site, visitor):
    visitor.add_picture(site.picture)
    visitor.ask("before")
    # until then a stream is open, and Gradio loads a page again whose stream has broken
    visitor.page.wait_for_function("sessionStorage.getItem('minigpt4-conversation')")
    site.stop()
    site.start()
    visitor.ask("after", wait=False)
    visitor._turns = 0
    visitor.page.get_by_text("the server was restarted").first.wait_for()
    visitor.page.locator("#chat", has_text="after").wait_for()
    visitor.wait_for_answer()
    visitor.ask("again")
    assert [turn["question"] for turn in visitor.saved()] == ["after", "again"]


def test_a_question_without_an_answer_survives_a_loaded_page(site, visitor):
    """As after a lost connection; typed text too."""

    def load_again(question):
        visitor.page.reload()
        visitor.box.wait_for()
        visitor.page.wait_for_function(
            "text => document.querySelector('#question textarea').value == text", arg=question
        )

    with busy_device(site):
        visitor.ask("a long story", wait=False)
        visitor.page.locator("#question .stop-button").wait_for()
        load_again("a long story")
        visitor.box.fill("a short story")
        load_again("a short story")
    visitor.ask()
    load_again("")
    visitor.page.locator("#status", has_text="was restarted").wait_for()
    assert visitor.box.input_value() == ""


def test_a_phone(site, browser):
    visitor = Visitor(browser, site, PHONE)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    visitor.page.locator("#examples tbody tr").first.click()
    visitor.page.wait_for_function("document.querySelector('#question textarea').value != ''")
    visitor.ask()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    visitor.close()


def test_a_closed_page_frees_its_row(site, browser):
    visitor = Visitor(browser, site)
    visitor.ask("a long story", wait=False)
    visitor.close()
    end = time.monotonic() + 20
    while site.service.scheduler.num_running and time.monotonic() < end:
        time.sleep(0.05)
    assert site.service.scheduler.num_running == 0


def test_files_of_other_hosts_are_not_fetched(site):
    """Gradio would fetch them, whatever --allow-image-urls says."""
    address = f"{site.url}/health"
    file = {"path": address, "meta": {"_type": "gradio.FileData"}}
    api = f"{site.url}/ui/gradio_api"
    replies = [
        httpx.get(f"{api}/file={address}"),
        httpx.get(f"{api}/file=HTTPS://example.org/x.png"),
        httpx.post(f"{api}/queue/join", json={"data": [{"files": [file]}], "fn_index": 0}),
        httpx.post(f"{api}/queue/join", content=b"x" * (guard.MAX_BYTES + 1)),
    ]
    assert [reply.status_code for reply in replies] == [403, 403, 403, 413]
    assert "other hosts" in replies[2].json()["detail"]


def test_a_key_is_asked_for(site):
    service = make_service(site.model)
    app = create_app(service, keys=["secret"], unguarded=("/ui",))
    mount_page(app, service, keys=["secret"])

    client = TestClient(app)
    login = {"username": "me", "password": "wrong"}
    assert client.get("/ui/config").status_code == 401
    assert client.post("/ui/login", data=login).status_code == 400
    assert client.post("/ui/login", data=login | {"password": "secret"}).status_code == 200
    assert client.get("/ui/config").status_code == 200
    assert client.get("/v1/models").status_code == 401
