"""The pictures of docs/reports.md: a report, light, dark and on a phone; with OTHER two runs in one another, too.

python tools/screenshots.py [RUN [OTHER]]   by default runs/quickstart, trained and evaluated if missing
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
# (file, runs on the page, width, height, colours, the heading that stands on top)
SHOTS = [
    ("report.png", 1, 1100, 1150, "light", None),
    ("report_dark.png", 1, 1100, 900, "dark", "Curves"),
    ("report_mobile.png", 1, 390, 844, "dark", None),
    ("several.png", 2, 1100, 900, "light", None),
]


def ft(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "finetune", *words], check=True)


def main() -> None:
    from playwright.sync_api import sync_playwright

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("no Chromium here: make chromium")
    runs = [Path(word) for word in sys.argv[1:]] or [Path("runs/quickstart")]
    if not runs[0].exists():
        ft("sft", "quickstart.yaml", "--output", str(runs[0]))
    if not (runs[0] / "evaluation.json").exists():
        ft("eval", str(runs[0]), "--compare-base")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, count, width, height, colours, heading in SHOTS:
            if count > len(runs):
                continue
            page = Path(folder) / f"{name}.html"
            ft("report", *map(str, runs[:count]), "--output", str(page))
            context = started.new_context(viewport={"width": width, "height": height}, color_scheme=colours)
            view = context.new_page()
            view.goto(page.as_uri())
            if heading is not None:
                view.get_by_role("heading", name=heading, exact=True).evaluate("one => one.scrollIntoView()")
            view.wait_for_timeout(200)
            view.screenshot(path=IMAGES / name)
            context.close()
        started.close()


if __name__ == "__main__":
    main()
