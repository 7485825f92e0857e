"""report.html: everything is told, nothing that data brings is obeyed, and it stays small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ft
from report_kit import HOSTILE, make_run

from finetune.report import page
from finetune.report.curves import panels, thinned
from finetune.run import records


class Seen(HTMLParser):
    """The tags of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def curves_of(text: str) -> Any:
    return json.loads(re.search(r'id="curves">(.*?)</script>', text, re.S)[1])  # type: ignore[index]


def test_all_parts_are_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a run", result={"plan": {"peak_memory_gb": 1.5, "memory": {"weights": 0.5}}})
    text = page.of_one(records.read(run))
    said = Seen(text).text
    for part in (
        "Decisions and warnings", "0.25 [0.1, 0.4]", "0.75 [0.6, 0.9]", "0.5 [0.3, 0.7]", "row 7", "答案 hello",
        "16-31",
        "93.8%", "planned: weights", "1.5 GB", "1.25 GB", "adapter.r", "learning rate", "torch", "60 rows",
    ):  # fmt: skip
        assert part in said or part in text, part
    assert "/home/me" not in text
    titles = [panel["title"] for panel in curves_of(text)]
    assert titles[:3] == ["loss", "held-out answers", "learning rate"]
    assert {"gradient norm", "entropy, nats per token", "tokens per second", "peak memory, GB"} <= {*titles}


def test_keys_that_are_not_the_default_come_first_and_are_marked(tmp_path: Path) -> None:
    text = page.of_one(records.read(make_run(tmp_path / "run")))
    text = text.replace("<wbr>", "")
    rows = re.findall(r'<tr( class="other")?><th scope="row">([\w.]+)</th><td>(.*?)</td><td>(.*?)</td>', text)
    marked = {key: (value, usual) for other, key, value, usual in rows if other}
    assert marked["adapter.r"] == ("8", "16")
    assert "train.learning_rate" not in marked, "it has its default"
    assert "train.learning_rate" in [key for _, key, _, _ in rows]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_what_data_brings_is_text(stage: str, tmp_path: Path) -> None:
    """Tags and attributes are the same whatever stands in rows, names, recipe and errors."""
    plain = make_run(tmp_path / "plain", stage=stage)
    hostile = make_run(tmp_path / 'h"><script>alert(1)</script>'.replace("/", ""), stage=stage, text=HOSTILE)
    error = {"error": HOSTILE}
    for run, what in ((plain, {"error": "x"}), (hostile, error)):
        (run / "error.json").write_text(json.dumps(what), encoding="utf-8")
    pages = [page.of_one(records.read(run)) for run in (plain, hostile)]
    assert Seen(pages[0]).tags == Seen(pages[1]).tags
    assert [one[:2] for one in Seen(pages[0]).attributes] == [one[:2] for one in Seen(pages[1]).attributes]
    assert "\u202e" not in pages[1]
    assert "{{ 7*7 }}" in pages[1]
    both = [
        page.of_several([records.read(run), records.read(other)]) for run, other in ((plain, plain), (plain, hostile))
    ]
    assert Seen(both[0]).tags.count("script") == Seen(both[1]).tags.count("script") == 3
    listed = page.index(tmp_path, list(records.below(tmp_path)))
    assert Seen(listed).tags.count("script") == 3


def test_halves_of_surrogate_pairs_and_nan_are_no_obstacle(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", text="half \ud83d")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN, "grad_norm": Infinity}\nnot json\n')
    page.write(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    assert all(None not in line["y"] for panel in curves_of(text) for line in panel["lines"])


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_ten_thousand_steps_stay_below_a_megabyte(stage: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stage=stage, steps=10_000)
    text = page.of_one(records.read(run))
    assert len(text.encode()) < 1_000_000
    loss = curves_of(text)[0]["lines"][0]
    assert loss["x"][0] == 1
    assert loss["x"][-1] >= 9_990
    many = [records.read(make_run(tmp_path / f"run{i}", stage=stage, steps=10_000)) for i in range(2)]
    assert len(page.of_several(many).encode()) < 1_000_000


def test_what_jumps_out_stays_in_a_thinned_line() -> None:
    rows = [{"step": i, "loss": 99.0 if i == 4321 else 1 + i % 7 / 100} for i in range(10_000)]
    kept = thinned(rows, "loss", 200)
    assert len(kept) <= 200
    assert 4321 in [row["step"] for row in kept]
    assert [row["step"] for row in kept] == sorted(row["step"] for row in kept)


def test_everything_that_was_logged_is_drawn() -> None:
    rows = [{"step": 1, "loss": 1.0, "my_own": 2.0, "eval_my_own": 3.0}, {"step": 2, "rewards/rules.py:short": 0.5}]
    drawn = {line["key"]: panel["more"] for panel in panels(rows, 10) for line in panel["lines"]}
    assert drawn == {"loss": False, "my_own": True, "eval_my_own": True, "rewards/rules.py:short": True}


def test_nothing_is_fetched_and_only_our_scripts_run(tmp_path: Path) -> None:
    text = page.of_one(records.read(make_run(tmp_path / "run")))
    seen = Seen(text)
    outside = [
        value for _, name, value in seen.attributes if name in ("src", "href") and not str(value).startswith("data:")
    ]
    assert not outside
    policy = next(value for tag, name, value in seen.attributes if tag == "meta" and "default-src" in str(value))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2
    assert all(f"'sha256-{page.digest(script)}'" in str(policy) for script in scripts)
    assert "MIT License" in text


def test_command(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "runs" / "one"), make_run(tmp_path / "runs" / "two", done=False, evaluated=False)
    assert ft("report", one).returncode == 0
    assert page.is_report(one / "report.html")
    both = ft("report", one, two, cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert "interrupted at step 40" in (tmp_path / "report.html").read_text(encoding="utf-8")
    listed = ft("report", tmp_path / "runs")
    assert "2 runs, 1 report made anew" in listed.stderr
    links = [
        value
        for _, name, value in Seen((tmp_path / "runs/index.html").read_text(encoding="utf-8")).attributes
        if name == "href"
    ]
    assert links == ["one/report.html", "two/report.html"]
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine", encoding="utf-8")
    refused = ft("report", one, "--output", mine)
    assert refused.returncode == 2
    assert "nothing that ft wrote" in refused.stderr
    assert mine.read_text(encoding="utf-8") == "<p>mine"
    (tmp_path / "empty").mkdir()
    for wrong in ([tmp_path / "empty"], [one, one], [tmp_path / "nowhere"], [one, tmp_path / "empty"]):
        assert ft("report", *wrong).returncode == 2
