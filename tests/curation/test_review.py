"""`curate review`: decisions by keyboard in a real browser, on disk at once; only this machine is served."""

import http.client
import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import tiny
from helpers.browser import browser_page
from helpers.sideways import upright, write_photo
from PIL import Image

from minigpt4_jax.cli.curation import review
from minigpt4_jax.curation.decisions import Decision, Decisions
from minigpt4_jax.curation.review_server import ReviewServer
from minigpt4_jax.curation.rows import decisions_path, read_rows
from minigpt4_jax.errors import UserError


@pytest.fixture
def source(tmp_path):
    """Five rows with images, whose texts would be markup in a careless page."""
    path = tiny.write_data(tmp_path, rows=5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for n, row in enumerate(rows):
        row |= {"id": str(n), "caption": f"<b>text</b> {n} & more", "references": ["a caption"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def serving(path):
    """The server of a file of rows, in a thread."""
    decisions = Decisions(decisions_path(path))
    with ReviewServer(read_rows(path), path.parent, decisions, 0, path.name) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def written(path):
    """(id, decision, caption) of every decision in the file."""
    lines = decisions_path(path).read_text().splitlines()
    return [(d["id"], d["decision"], d.get("caption")) for d in map(json.loads, lines)]


def test_rows_are_decided_by_keyboard(source):
    with serving(source) as server, browser_page(viewport={"width": 1200, "height": 700}) as page:
        page.goto(server.url)
        page.get_by_text("1 of 5").wait_for()
        assert page.locator("#caption").inner_text() == "<b>text</b> 0 & more"
        assert page.locator("#references").inner_text() == "captions: a caption"
        page.wait_for_function("document.images[0].naturalWidth == 40")
        page.keyboard.press("a")
        page.get_by_text("2 of 5").wait_for()
        assert written(source) == [("0", "accept", None)]
        page.keyboard.press("r")
        page.get_by_text("3 of 5").wait_for()
        page.keyboard.press("e")
        page.locator("textarea").fill("typed: a, e and r are letters here")
        page.keyboard.press("r")
        page.keyboard.press("Control+Enter")
        page.get_by_text("4 of 5").wait_for()
        assert written(source)[1:] == [
            ("1", "reject", None), ("2", "edit", "typed: a, e and r are letters herer"),
        ]  # fmt: skip
        page.keyboard.press("u")
        page.get_by_text("3 of 5").wait_for()
        assert written(source)[3:] == [("2", "none", None)]
        assert page.locator("#counts").inner_text() == "1 accept · 0 edit · 1 reject · 3 open"
        page.keyboard.press("e")
        page.locator("textarea").fill("   ")
        page.keyboard.press("Control+Enter")
        page.get_by_text("the caption is empty").wait_for()
        page.keyboard.press("Escape")
        page.keyboard.press("ArrowLeft")
        page.get_by_text("2 of 5").wait_for()
        assert page.locator("#verdict").inner_text() == "reject"
    with serving(source) as server, browser_page() as page:  # the next open row after a new start
        page.goto(server.url)
        page.get_by_text("3 of 5").wait_for()
        page.get_by_role("button", name="accept").click()
        page.get_by_text("4 of 5").wait_for()
    assert written(source)[-1] == ("2", "accept", None)


def test_the_page_says_when_the_server_is_gone(source):
    with browser_page() as page:
        with serving(source) as server:
            page.goto(server.url)
            page.get_by_text("1 of 5").wait_for()
        page.keyboard.press("a")
        page.get_by_text("the server does not answer").wait_for()
    assert not decisions_path(source).exists()


def request(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_other_sites_cannot_read_or_decide(source):
    decision = json.dumps({"number": 0, "decision": "reject"})
    with serving(source) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert request(server, "GET", "/rows")[0] == 200
        assert request(server, "GET", "/rows", Host="evil.example:80")[0] == 403
        as_form = {"Content-Type": "text/plain"}
        assert request(server, "POST", "/decisions", decision, **as_form)[0] == 415
        assert request(server, "GET", "/images/../rows.jsonl")[0] == 404
        assert request(server, "GET", "/images/99")[0] == 404
    assert not decisions_path(source).exists()


def test_a_photo_that_is_converted_for_the_browser_is_turned(source, tmp_path):
    photo = write_photo(tmp_path / "photo.png").rename(tmp_path / "photo")  # of no known type
    row = {"id": "0", "image": "photo", "caption": "a text"}
    source.write_text(json.dumps(row) + "\n")
    with serving(source) as server:
        status, png = request(server, "GET", "/images/0")
    assert status == 200
    with Image.open(io.BytesIO(png)) as shown:
        np.testing.assert_array_equal(shown, upright(photo))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[]", "expected an object"),
        ("{", "Expecting property name"),
        ('{"number": 5, "decision": "accept"}', "there is no row 5"),
        ('{"number": 0, "decision": "burn"}', "expected one of accept, edit, reject, none"),
        ('{"number": 0, "decision": "edit"}', "the caption is empty"),
    ],
)
def test_wrong_requests_decide_nothing(source, body, message):
    with serving(source) as server:
        status, answer = request(
            server, "POST", "/decisions", body, **{"Content-Type": "application/json"}
        )
        assert status == 400 and message in json.loads(answer)["error"]
    assert not decisions_path(source).exists()


def test_decisions_survive_a_kill_in_the_middle_of_a_line(source):
    rows = read_rows(source)
    path = decisions_path(source)
    first = Decisions(path)
    first.put(rows[0], Decision("reject"))
    first.put(rows[1], Decision("edit", "better"))
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Decisions(path)
        complete = whole[:cut].count(b"\n")
        assert [again.get(row) is not None for row in rows] == [n < complete for n in range(5)]
        again.put(rows[2], Decision("accept"))
        assert Decisions(path).get(rows[2]) == Decision("accept")
    kept, removed = Decisions(path).apply(rows)
    assert [row["id"] for row in kept] == ["1", "2", "3", "4"]
    assert kept[0]["caption"] == "better" and kept[0]["original"] == rows[1]["caption"]
    assert [(row["id"], row["cause"]) for row in removed] == [("0", "rejected")]
    kept, removed = Decisions(path).apply(rows, only_accepted=True)
    assert [row["id"] for row in kept] == ["1", "2"] and len(removed) == 3
    changed = {**rows[0], "caption": "another text"}
    assert Decisions(path).get(changed) is None  # a decision is about one text
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="line 1: is no decision"):
        Decisions(path)


def test_mistakes_are_told(source, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        review.main([f"--input={tmp_path / 'none.jsonl'}"])
    with (
        serving(source) as server,
        pytest.raises(UserError, match=r"--port=\d+: .* choose another"),
    ):
        review.main([f"--input={source}", f"--port={server.server_address[1]}"])
