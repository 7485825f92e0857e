"""The tables of docs/data.md and data_templates/README.md, made from FORMATS, the recipe's fields and the templates.

python tools/data_tables.py        writes both files again (a test says when they are out of date)
"""

from __future__ import annotations

import re
from pathlib import Path

from finetune.data import templates
from finetune.data.formats import FORMATS
from finetune.data.samples import STAGES
from finetune.recipe.sections import DataConfig, SourceConfig
from finetune.resources import resource_path

BEGIN, END = "<!-- table: {} -->", "<!-- end -->"


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def formats_table() -> str:
    rows = [
        [
            f"`{name}`",
            f"`{cell(form.columns)}`",
            cell(form.about),
            STAGES[form.kind].replace(" or ", ", "),
            f"[{form.sample}]({{}}{form.sample})",
        ]
        for name, form in FORMATS.items()
    ]
    return table(["`data.format`", "columns ([optional])", "what it is", "for", "sample"], rows)


def samples_table() -> str:
    rows = []
    for name, form in FORMATS.items():
        example = first_row(resource_path("data_templates", form.sample))
        line = f"data: {{train: builtin:{form.sample.split('.')[0]}}}"
        rows.append([f"[{form.sample}]({form.sample})", f"`{name}`", f"`{cell(form.columns)}`", example, f"`{line}`"])
    return table(["file", "`data.format`", "columns ([optional])", "an example", "recipe line"], rows)


def first_row(path: Path) -> str:
    """The first row as written, shortened, for a table."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        text = re.sub(r"\s+", " ", text).strip("[ ")
    else:
        text = text.split("\n")[1 if path.suffix in (".csv", ".tsv") else 0].replace("\t", " ⇥ ")
    short = text[:110] + ("…" if len(text) > 110 else "")
    return f"`{cell(short)}`"


def keys_table() -> str:
    rows = []
    for prefix, model in (("data.", DataConfig), ("", SourceConfig)):
        for name, field in model.model_fields.items():
            default = (
                ""
                if field.is_required()
                else f"`{str(field.default).lower() if field.default in (True, False) else field.default}`"
            )
            rows.append([f"`{prefix}{name}`", default.replace("None", "unset"), cell(field.description or "")])
    return table(["key", "default", "meaning"], rows)


def templates_table() -> str:
    rows = []
    for name, text in templates.shipped().items():
        about = re.match(r"\{#-\s*(.*?)\s*-#\}", text, re.DOTALL)
        rows.append([f"`{name}.jinja`", cell(about[1] if about else "")])
    return table(["template", "family"], rows)


TABLES = {"formats": formats_table, "samples": samples_table, "keys": keys_table, "templates": templates_table}


def renewed(text: str, folder: str) -> str:
    """`text` with every marked table written again; `folder` is where its links find the samples."""
    for name, build in TABLES.items():
        begin = BEGIN.format(name)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
        content = f"{begin}\n{build()}\n{END}".replace("{}", folder)
        text = pattern.sub(lambda _, content=content: content, text)  # type: ignore[misc]
    return text


def files() -> dict[Path, str]:
    """The documents and the folder of the samples as seen from each."""
    samples = resource_path("data_templates")
    return {samples.parent / "docs" / "data.md": "../data_templates/", samples / "README.md": ""}


if __name__ == "__main__":
    for path, folder in files().items():
        path.write_text(renewed(path.read_text(encoding="utf-8"), folder), encoding="utf-8")
