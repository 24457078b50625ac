"""A real browser for tests of pages: Debian's chromium-headless-shell, or another Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser_page(**options: Any) -> Iterator[Any]:
    """A page of playwright; the test is skipped where no browser is installed. options: of the page.

    Every request to another host than this machine is an error of the test.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"no browser: apt-get install {PROGRAMS[0]}")
    outside: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(**options)
        page.on("request", lambda r: None if _is_local(r.url) else outside.append(r.url))
        page.set_default_timeout(10_000)
        yield page
        browser.close()
    assert not outside, f"the page asked other hosts: {outside}"


def _is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "http://localhost:", "data:", "blob:", "about:"))
