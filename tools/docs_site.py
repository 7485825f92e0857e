"""For mkdocs (`make docs`): the contents of tools/docs_pages.py as navigation, and files of the repository that docs/
link to (recipes, sample data, …) beside the pages."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import docs_pages
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Navigation, and what pages link to outside of docs/ as files below `repository/`."""
    sections = [{name: list(named)} for name, named in docs_pages.contents().items()]
    config.nav = ["index.md", *({**section} for section in sections)]
    commands = sorted(page for page in docs_pages.pages() if page != docs_pages.COMMANDS)
    for section in config.nav[1:]:
        for named in section.values():
            if docs_pages.COMMANDS in named:
                named += commands
    for path in sorted({path for page in list(files.documentation_pages()) for path in outside(page)}):
        name = f"repository/{path.relative_to(ROOT)}"
        name += ".txt" if path.suffix == ".md" else ""  # else it would be a page, with links of its own
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def outside(page: Any) -> list[Path]:
    """Files of the repository that a page of docs/ links to."""
    here = Path(page.abs_src_path)
    found = [(here.parent / link).resolve() for link, _ in LINK.findall(here.read_text(encoding="utf-8"))]
    return [path for path in found if path.is_file() and not path.is_relative_to(docs_pages.DOCS.resolve())]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to those files lead to the copies; a link that leads nowhere stays, and is an error of mkdocs."""
    here = Path(page.file.abs_src_path)

    def there(found: re.Match[str]) -> str:
        path = (here.parent / found[1]).resolve()
        if path not in outside(page.file):
            return found[0]
        up = "../" * page.file.src_uri.count("/")
        return f"]({up}repository/{path.relative_to(ROOT)}{'.txt' if path.suffix == '.md' else ''})"

    return LINK.sub(there, markdown)
