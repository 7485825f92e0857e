"""The README is true: its commands exist and run, its file tree is the tree, the Chinese one shows the same code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def commands(text: str) -> list[list[str]]:
    """The ft commands of the bash blocks, comments left out."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ft ")]


@pytest.mark.parametrize("command", commands(README), ids=" ".join)
def test_command_and_options_exist(command: list[str]) -> None:
    words = [word for word in command if not word.startswith("-")]
    group = words[:2] if words[0] in ("recipes", "data", "models") else words[:1]
    helped = ft(*group, "--help")
    assert helped.returncode == 0, helped.stderr
    for option in (word.partition("=")[0] for word in command if word.startswith("--")):
        assert option in helped.stdout, f"{option} is not in ft {' '.join(group)} --help"


def test_shipped_recipe_stands_in_the_readme() -> None:
    """The recipe shown is the shipped one, but for the remarks."""
    import yaml

    (shown,) = blocks(README, "yaml")
    shipped = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(shown) == yaml.safe_load(shipped)


def test_quickstart_recipe_dry_run(tmp_path: Path) -> None:
    done = ft("sft", "--recipe", "quickstart.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def tree() -> dict[str, str]:
    """path -> phrase of the file tree."""
    found, folder = {}, ""
    for line in next(b for b in blocks(README, "") if b.startswith("finetune/")).splitlines():
        name, _, phrase = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name
            found[folder] = phrase.strip()
        else:
            found[folder + name] = phrase.strip()
    return found


def test_file_tree() -> None:
    listed = tree()
    for path, phrase in listed.items():
        assert (ROOT / path).exists(), f"{path} is in the README's tree only"
        assert phrase or path == "finetune/", f"{path} has no phrase"
    for path in sorted((ROOT / "finetune").iterdir()):
        name = f"finetune/{path.name}{'/' if path.is_dir() else ''}"
        if not path.name.startswith("__") and path.name not in ("recipes", "data_templates"):
            assert name in listed, f"{name} is missing in the README's tree"


def test_chinese_readme_shows_the_same_code() -> None:
    assert commands(CHINESE) == commands(README)
    assert re.findall(r"^make \w+", "\n".join(blocks(CHINESE, "bash")), re.M) == re.findall(
        r"^make \w+", "\n".join(blocks(README, "bash")), re.M
    )
    figures = re.compile(r"<!-- (\w+) -->(.*?)<!-- /\1 -->", re.DOTALL)
    here, there = ([re.findall(r"\d+\.\d+", found) for _, found in figures.findall(text)] for text in (CHINESE, README))
    assert here == there
    assert here[0]


def test_first_screen_names_both_commands() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert "make quickstart" in first
    assert "make test" in first


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README + CHINESE))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_docs_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_chinese_page_of_data_names_every_format_and_key() -> None:
    from finetune.data.formats import FORMATS
    from finetune.recipe.sections import SourceConfig

    page = (ROOT / "docs" / "zh" / "data.md").read_text(encoding="utf-8")
    english = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\(\.\./data_templates/", english, flags=re.MULTILINE)
    assert sorted(rows) == sorted(FORMATS)
    for name in [*rows, *re.findall(r"^\| `(data\.\w+)` \|", english, flags=re.MULTILINE), *SourceConfig.model_fields]:
        assert f"`{name}`" in page, name
