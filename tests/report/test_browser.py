"""The pages in headless Chromium: no console errors, nothing fetched, no serious findings of axe, no sideways scrolling
at 390 pixels, hostile rows without effect, curves to hover and zoom. Skipped without a browser."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_kit import HOSTILE, make_run

from finetune.report import page
from finetune.run import records

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright axe-playwright-python")
axe_package = pytest.importorskip("axe_playwright_python", reason="pip install axe-playwright-python")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its event loop
        with sync_api.sync_playwright() as playwright:
            started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            yield started
            started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_run(folder / "one", text=HOSTILE), make_run(folder / "two", stage="ppo", done=False, text=HOSTILE)]
    found = [records.read(run) for run in runs]
    made = {
        "sft": page.of_one(found[0]), "ppo": page.of_one(found[1]), "several": page.of_several(found),
        "index": page.index(folder, found),
    }  # fmt: skip
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


def opened(browser: Any, path: Path, width: int, scheme: str, **more: Any) -> tuple[Any, list[str]]:
    """(the page, what went wrong and what was fetched)"""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
    view, told = context.new_page(), []
    view.on("console", lambda message: told.append(f"console: {message.text}"))
    view.on("pageerror", lambda error: told.append(f"error: {error}"))
    view.on("request", lambda request: told.append(request.url) if request.url != path.as_uri() else None)
    view.goto(path.as_uri())
    return view, told


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", ["sft", "ppo", "several", "index"])
def test_page(name: str, width: int, scheme: str, browser: Any, pages: dict[str, Path]) -> None:
    view, told = opened(browser, pages[name], width, scheme)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert view.evaluate(wide) == 0
    view.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    view.wait_for_timeout(50)
    assert view.evaluate(wide) == 0
    assert view.evaluate("window.broken") is None
    script = Path(axe_package.__file__).parent / "axe.min.js"
    view.evaluate(script.read_text(encoding="utf-8"))
    found = view.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.impact, v.nodes[0].html]))")
    assert [one for one in found if one[1] in ("serious", "critical")] == []
    assert view.locator("#charts canvas").count() == (0 if name == "index" else view.locator("#charts figure").count())
    assert told == []
    view.context.close()


def test_curves_are_hovered_and_zoomed(browser: Any, pages: dict[str, Path]) -> None:
    view, told = opened(browser, pages["sft"], 1280, "light")
    over = view.locator("#charts .u-over").first
    box = over.bounding_box()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    assert view.locator("#charts .u-legend .u-value").first.inner_text() not in ("", "--")
    ticks = "document.querySelector('#charts figure:nth-child(2) .u-legend .u-value').textContent"
    assert view.evaluate(ticks) not in ("", "--"), "the other curves show the same step"
    before = over.screenshot()
    view.mouse.down()
    view.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60)
    view.mouse.up()
    view.mouse.move(5, 5)
    zoomed = over.screenshot()
    assert zoomed != before
    view.locator("#whole").click()
    view.locator("#smooth").select_option("0.9")
    assert view.locator("#charts canvas").count() == view.locator("#charts figure").count()
    assert told == []
    view.context.close()


def test_index_is_sorted_and_filtered(browser: Any, pages: dict[str, Path]) -> None:
    view, _ = opened(browser, pages["index"], 1280, "light")
    names = "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].textContent)"
    assert view.evaluate(names) == ["one", "two"]
    view.get_by_role("button", name="run").click()
    view.get_by_role("button", name="run").click()
    assert view.evaluate(names) == ["two", "one"]
    assert view.locator("thead th").first.get_attribute("aria-sort") == "descending"
    view.locator("#filter").fill("ppo interrupted")
    assert view.evaluate(names) == ["two"]
    view.context.close()


@pytest.mark.parametrize("name", ["sft", "several", "index"])
def test_tables_are_there_without_javascript(name: str, browser: Any, pages: dict[str, Path]) -> None:
    view, told = opened(browser, pages[name], 390, "light", java_script_enabled=False)
    assert view.locator("table:visible").count() > 0
    assert not view.locator("#filter:visible, #smooth:visible").count()
    assert told == []
    view.context.close()
