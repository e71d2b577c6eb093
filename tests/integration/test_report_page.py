"""The page of `qa-dist report` in a real browser: Debian's Chromium, driven by playwright.

Screenshots are left in the tests' output folder, or in the one that QA_DIST_SCREENSHOTS names.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the bench extra is not installed")

from qa_dist.config.options import RunConfig
from qa_dist.report import main
from tests.support.chromium import IN_A_BROWSER
from tests.unit.answering.xss import CORPUS

pytestmark = IN_A_BROWSER

WORDS = "The lighthouse of Orrin Head was lit in the autumn of 1874 by Maud Telfer, who had the stones cut ashore."


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two runs that ended and one that was cut off, about texts that would run as scripts."""
    folder = tmp_path_factory.mktemp("runs")
    paragraphs, texts = [], {}
    for number, markup in enumerate(CORPUS * 3):
        context = f"{markup} {WORDS} {'Nothing else is known. ' * 20}{markup}"
        answer = {"text": "Maud Telfer", "answer_start": context.index("Maud Telfer")}
        paragraphs.append(
            {
                "context": context,
                "qas": [{"id": f"q{number}", "question": f"Who lit it? {markup}", "answers": [answer]}],
            }
        )
        texts[f"q{number}"] = "Maud Telfer" if number % 3 else ("1874", markup)[number % 2]
    data = folder / "dev.json"
    data.write_text(json.dumps({"version": "1.1", "data": [{"title": CORPUS[0], "paragraphs": paragraphs}]}))
    for seed in (1, 2, 3):
        run = folder / f"a-run-with-a-rather-long-name-of-seed-{seed}"
        run.mkdir()
        config = {**RunConfig().flat(), "seed": seed, "validation_file": str(data), "output_dir": "x" * 300}
        (run / "config.yaml").write_text(json.dumps(config))
        steps = [
            {"step": step, "loss": 1 + math.exp(-step / 40) + step % 3 / 9, "learning_rate": 1e-3 / step}
            | {"grad_norm": 1 + step % 5, "num_features": 8, "num_tokens": 900 + step % 7}
            for step in range(1, 200)
        ]
        evaluations = [
            {"step": step, "eval_loss": 1.4, "eval_f1": 50.0, "eval_exact_match": 40.0} for step in (90, 180)
        ]
        lines = sorted([*steps, *evaluations], key=lambda line: line["step"])
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        timings = [
            {"step": step, "step_seconds": 0.3 + step % 11 / 90, "most_tokens": 452 + step % 3, "world_size": 2}
            for step in range(1, 200)
        ]
        (run / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
        if seed == 3:
            continue
        own = {key: text if seed == 1 else text[:4] for key, text in texts.items()}
        (run / "predictions.json").write_text(json.dumps(own))
        lists = {
            key: [
                {"text": text, "score": 1.0, "probability": 0.7, "start_char": -1, "end_char": -1},
                {"text": "x", "score": 0.15, "probability": 0.3, "start_char": -1, "end_char": -1},
            ]
            for key, text in own.items()
        }
        (run / "nbest.json").write_text(json.dumps(lists))
        record = {"seconds": {"train": 61.5, "evaluate": 4.0}, "peak_memory_bytes_per_rank": [2**30, 2**29]}
        (run / "run.json").write_text(json.dumps(record | {"command": ["qa_dist.train", *CORPUS], "num_steps": 199}))
    page = folder / "report.html"
    assert main([*map(str, sorted(folder.glob("a-run*"))), "--output", str(page), "--resamples", "100"]) == 0
    return page.as_uri()


def test_a_wide_page_light_and_dark(page: Any, screenshots: Path) -> None:
    backgrounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.screenshot(path=screenshots / f"report-{scheme}.png")
    assert backgrounds[0] != backgrounds[1]
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    # Colours of curves are the page's: another one in the dark.
    curve = "getComputedStyle(document.querySelector('.chart path[style*=\"--c1\"]')).stroke"
    dark = page.evaluate(curve)
    page.emulate_media(color_scheme="light")
    assert page.evaluate(curve) != dark
    assert page.locator(".chart").count() == 7 + 2


def test_a_phone(page: Any, screenshots: Path) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.screenshot(path=screenshots / "report-phone.png")
    page.locator("#answers").scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "report-phone-answers.png")
    # Letters of 8.5 units in a chart can be read.
    widths = page.evaluate(
        "[...document.querySelectorAll('.chart')].map(each => [each.getBoundingClientRect().width, "
        "each.viewBox.baseVal.width])"
    )
    assert len(widths) == 9
    assert all(width >= 0.9 * units for width, units in widths)


def test_marks_are_seen(page: Any) -> None:
    marks = page.locator(".context mark")
    assert marks.count() > 50
    assert page.locator(".context mark.reference").first.inner_text() == "Maud Telfer"
    for kind, style in (("predicted", "backgroundColor"), ("reference", "boxShadow")):
        first = page.locator(f".context mark.{kind}").first
        assert first.is_visible()
        with_mark, around = first.evaluate(
            "(mark, style) => [mark, mark.parentElement].map(each => getComputedStyle(each)[style])", style
        )
        assert with_mark != around


def test_text_is_shown_as_text(page: Any) -> None:
    assert page.evaluate("window.hacked") is None
    assert page.locator("script, iframe, img, form, textarea, base, math").count() == 0
    assert page.locator("style").count() == 1
    shown = page.locator("main").inner_text()
    assert "<script>window.hacked=1</script>" in shown
    assert "<img src=x onerror=window.hacked=1>" in shown


def test_it_is_read_without_scripts(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert page.locator("article.answer").count() > 20
    assert page.locator("article.answer").first.is_visible()
    page.locator("summary", has_text="Versions, hardware, data").click()
    assert page.locator("th", has_text="command").is_visible()
    context.close()
