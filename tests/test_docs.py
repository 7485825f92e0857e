"""The pages say what the program does: those made of it are current, every command line in them is one that the program
takes, every recipe in them is valid, and every command has an example."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.cli import completion
from finetune.cli.examples import EXAMPLES, examples
from finetune.errors import UserError
from finetune.recipe.file import check
from finetune.recipe.stages import RECIPES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import docs_pages  # noqa: E402

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "SECURITY.md"]
TREE = docs_pages.tree()
KEYS = completion.keys(None)
VARIABLE = re.compile(r"\$\{?\w+\}?")
"""Of the shell."""


def test_made_pages_are_current() -> None:
    made = docs_pages.everything()
    for name, text in made.items():
        path = ROOT / "docs" / name
        assert path.exists(), f"{name}: run python tools/docs_pages.py"
        assert path.read_text(encoding="utf-8") == text, f"{name}: run python tools/docs_pages.py"
    assert {f"commands/{path.name}" for path in (ROOT / "docs" / "commands").iterdir()} == set(docs_pages.pages())


def test_every_page_is_in_the_contents_once() -> None:
    listed = [page for named in docs_pages.contents().values() for page in named]
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert there - set(listed) == {"index.md", *docs_pages.pages()} - {docs_pages.COMMANDS}
    assert all(page in there for named in docs_pages.CONTENTS.values() for page in named)


def found(words: list[str]) -> tuple[Any, list[str], list[str]]:
    """(the command, its names, the other words). AssertionError for a name that is none."""
    command, names = TREE, []
    words = [word for word in words if word not in ("--debug", "--verbose")]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]!r} in {words}"
        names.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    return command, names, words


def parsed(words: list[str]) -> None:
    """Takes the words as the program does, up to where it would run. AssertionError where it refuses them."""
    command, names, rest = found(words)
    assert not hasattr(command, "commands") or rest, f"ft {' '.join(names)} wants a command"
    try:
        context = command.make_context(" ".join(names), list(rest))
    except Exception as error:
        raise AssertionError(f"ft {shlex.join(words)}: {error}") from error
    for setting in context.params.get("set_") or ():
        key, sign, _ = setting.partition("=")
        assert sign, setting
        assert key in KEYS or any(name.startswith(f"{key}.") for name in KEYS), f"no recipe has {key}"


def lines_of(text: str) -> list[str]:
    """The command lines of the code blocks, also in pipes; in blocks without a language two spaces end them."""
    lines = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if kind in ("bash", "sh", "yaml", "dockerfile"):
                found = re.findall(r"(?:^|[|;&]\s*|#\s+|=\S+ |\$ |exec )(ft [a-z].*?)(?=$|\s[|<>&]|;)", line.strip())
                lines += [re.split(r"\s{2,}", one)[0] if kind == "yaml" else one for one in found]
            elif kind == "" and line.startswith("ft "):
                lines.append(re.split(r"\s{2,}|\s[|<>]\s", line)[0])
    return lines


def inline(text: str) -> list[str]:
    return re.findall(r"`(ft [a-z][^`\n]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for line in lines_of(text):
        words = shlex.split(line, comments=True)[1:]
        try:
            parsed([word for word in words if not VARIABLE.fullmatch(word)])  # of options, as $how
        except AssertionError:
            parsed([VARIABLE.sub("1", word) for word in words])  # of a value, as $RANK
    for line in inline(text):
        words = re.sub(r"[…[\]]", " ", line).split()[1:]
        words = words[1:] if words[0] == "help" else words
        command, names, rest = found(words)
        options = {one for param in command.params for one in param.opts} | {"--help", "-h"}
        for word in rest:
            assert not word.startswith("-") or word in ("-", "--") or word.split("=")[0] in options, f"{line}: {word}"
        assert names or rest or "help" in line


def test_shell_blocks_are_shell() -> None:
    """`bash -n` reads them without running them, each by itself."""
    for page in PAGES:
        for block in re.findall(
            r"^```(?:bash|sh)\n(.*?)^```$", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
        ):
            done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), f"{page.name}: {block}"


def test_lines_are_found_and_refused() -> None:
    """The net has no holes of the obvious kinds."""
    text = "```bash\necho hi | ft chat runs/a  # x\nA=b ft serve m\n```\n```\nft plan a.yaml      for you\n```\n"
    assert [line.split("#")[0].strip() for line in lines_of(text)] == ["ft chat runs/a", "ft serve m", "ft plan a.yaml"]
    for wrong in ("sfr x", "sft x --recipes y", "runs show", "sft x --set data.pakcing=true", "eval x --limit many"):
        with pytest.raises(AssertionError):
            parsed(wrong.split())


REQUIRED: dict[str, Any] = {"model": {"name": "tiny-llama"}, "data": {"train": "builtin:tickets/train"}}


def as_recipes(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a whole recipe itself, of sections a recipe of each stage that they may be of."""
    if {"model", "data"} <= values.keys() and "stage" in values:
        return [values]
    stages = [values["stage"]] if "stage" in values else list(RECIPES)
    extra = {"output": {"dir": "runs/x"}, "version": 1}
    needed = {"ppo": {"reward": {"model": "runs/reward"}}}
    return [
        {**extra, "stage": stage, **needed.get(stage, {}), **values,
         **{name: {**section, **(values.get(name) or {})} for name, section in REQUIRED.items()}}
        for stage in stages
    ]  # fmt: skip


def blocks(page: Path) -> list[Any]:
    text = page.read_text(encoding="utf-8")
    read = [
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]
    names = {name for kind in RECIPES.values() for name in kind.model_fields} | {"extends"}
    return [one for one in read if isinstance(one, dict) and one.keys() & names]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_recipes_are_valid(page: Path) -> None:
    """Sections that are shown alone have to be those of some stage."""
    for values in blocks(page):
        values = {key: value for key, value in values.items() if key != "extends"}
        refusals = []
        for one in as_recipes(values):
            try:
                check(one, one["stage"])
            except UserError as error:
                refusals.append(f"{one['stage']}: {error}")
        assert len(refusals) < len(as_recipes(values)), (values, refusals)


def commands(command: Any, names: tuple[str, ...] = ()) -> list[str]:
    if not hasattr(command, "commands"):
        return [" ".join(names)]
    return [one for name, inner in command.commands.items() for one in commands(inner, (*names, name))]


def test_every_command_has_an_example_that_it_takes() -> None:
    assert set(EXAMPLES) == {"", *commands(TREE)}
    for name in EXAMPLES:
        lines = examples(name)
        assert lines
        for line in lines:
            assert line.startswith(f"ft {name}".rstrip())
            parsed(shlex.split(line.partition(" > ")[0])[1:])
        command, _, _ = found(name.split())
        helped = command.get_help(command.make_context(f"ft {name}".strip(), [], resilient_parsing=True))
        assert all(f"    {line}" in helped for line in lines)


def test_llms_names_every_page_and_command() -> None:
    text = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
    for name in TREE.commands:
        assert f"[ft {name}]" in text


def test_the_image_is_made_of_what_is_here() -> None:
    """To be seen without Docker: what is copied is there, what is made is a target, what it starts is a command."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    ignored = {line.strip("*/") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()}
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert "." in copied
    for name in copied:
        assert (ROOT / name).exists(), name
        assert name == "." or name not in ignored
    made = re.findall(r"\bmake (\S+)", text) + re.findall(r'"make", "(\w+)"', text)
    assert {"quickstart", "test", ".venv/installed"} <= set(made) - {"g++"}
    assert {name for name in made if name != "g++"} <= targets
    for line in re.findall(r"(?:ft|ft-cuda) (ft [a-z].*)$", text, re.MULTILINE):
        parsed(shlex.split(line)[1:])
    needed = re.findall(
        r'^(?:readme|license-files) = (?:\[)?"([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M
    )
    assert set(needed) <= set(copied), "pip reads these before anything is built"
