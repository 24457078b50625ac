"""The report in a real browser."""

import json

from helpers.browser import browser_page

from minigpt4_jax.cli import evaluate
from minigpt4_jax.evaluation.benchmarks import find
from minigpt4_jax.evaluation.results import describe, write_scores


def test_the_report_fits_phones(tmp_path):
    benchmark, long = find("gqa"), "x" * 200
    (tmp_path / "gqa.json").write_text(
        json.dumps([{"image": "0.jpg", "question": long, "answer": "yes"}])
    )
    rows = benchmark.read(tmp_path / "gqa.json", "")
    folders = []
    for step, answer in ((1, "yes"), (2, long)):
        folders.append(tmp_path / f"step_{step}")
        (folders[-1] / "gqa").mkdir(parents=True)
        scores = describe(benchmark, "", rows, benchmark.judge(rows, [answer]))
        write_scores(folders[-1] / "gqa", scores | {"model": f"/models/{long}"})
    evaluate.main(["report", *map(str, folders)])
    with browser_page(viewport={"width": 390, "height": 800}) as page:
        page.set_content((folders[-1] / "report.html").read_text())
        assert page.locator("svg").count() == 1 and page.locator(".row").count() == 2
        assert page.evaluate("document.documentElement.scrollWidth") == 390
