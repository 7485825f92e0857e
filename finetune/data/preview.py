"""Samples as the model sees them: trained tokens marked, packing boundaries shown; on the page also who speaks."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from finetune.data import thinking
from finetune.data.audit import Audit
from finetune.data.encoder import Encoder
from finetune.data.packing import plan
from finetune.data.types import IGNORED, Message
from finetune.errors import visible
from finetune.recipe.sections import DataConfig


def samples(config: DataConfig, encoder: Encoder, limit: int = 10, kind: str | None = "sft") -> list[dict[str, Any]]:
    """The first `limit` usable rows. A pair gives two samples, told apart by `answer`."""
    audit = Audit(config, encoder, kind)
    out: list[dict[str, Any]] = []
    for item, encoded in itertools.islice(audit.rows(), limit):
        parts = encoded if isinstance(encoded, dict) else {"": encoded}
        for name, row in parts.items():
            if row is None:
                continue
            decoded = tokens(encoder.tokenizer, row.input_ids)
            given = item.usable.conversations()[name].messages
            turns = given if encoder.treatment == "drop" else thinking.moved(given, encoder.thinking)
            sample = {
                "file": item.file, "row": item.row, "input_ids": row.input_ids, "labels": row.labels,
                "tokens": decoded, "text": encoder.tokenizer.decode(row.input_ids),
                "roles": roles("".join(decoded), turns), **({"moved": True} if turns is not given else {}),
            }  # fmt: skip
            out.append({"answer": name, **sample} if name else sample)
    if not out:
        audit.settle()
    return out


def roles(text: str, messages: list[Message]) -> list[tuple[str, int, int]]:
    """(role, start, end) in characters of what each turn says; what stands between is the template's. A turn that the
    template writes otherwise than it is in the row is not found, and left out."""
    found, at = [], 0
    for message in messages:
        content = message["content"].strip()
        if content and (start := text.find(content, at)) >= 0:
            at = start + len(content)
            found.append((message["role"], start, at))
    return found


def tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    """Each token as text. A character that is spread over several tokens stands at the last of them, so that the texts
    add up to the whole."""
    out: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        whole = not text.endswith("\ufffd") or len(waiting) > 8
        out.append(text if whole else "")
        if whole:
            waiting = []
    if waiting:
        out[-1] = tokenizer.decode(waiting)
    return out


def packs(shown: list[dict[str, Any]], max_length: int) -> list[list[int]]:
    """Numbers of the samples that share a row; of these samples only, the whole data packs tighter."""
    return plan([len(sample["input_ids"]) for sample in shown], max_length)


def runs(sample: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    marked = zip((label != IGNORED for label in sample["labels"]), sample["tokens"], strict=True)
    for trained, group in itertools.groupby(marked, key=lambda pair: pair[0]):
        yield trained, "".join(text for _, text in group)


def heading(sample: dict[str, Any]) -> str:
    trained = sum(label != IGNORED for label in sample["labels"])
    answer = f" · {sample['answer']}" if "answer" in sample else ""
    answer += " · <think> tags moved into reasoning_content" if sample.get("moved") else ""
    return f"{sample['file']}, row {sample['row']}{answer} · {len(sample['input_ids'])} tokens, {trained} trained"


MARKS = ("⟦", "⟧")


def as_text(shown: list[dict[str, Any]], rows: list[list[int]] | None = None, coloured: bool = True) -> Any:
    """For a terminal: trained text green, the rest dim; without colours trained text between MARKS. `rows` are the
    packed rows."""
    from rich.text import Text

    text = Text()
    for number, group in enumerate(rows or [list(range(len(shown)))], 1):
        if rows:
            length = sum(len(shown[i]["input_ids"]) for i in group)
            text.append(f"══ packed row {number}: {len(group)} samples, {length} tokens\n", "bold")
        for i in group:
            text.append(f"── {visible(heading(shown[i]))}\n", "cyan")
            for trained, part in runs(shown[i]):
                part = visible(part) if coloured or not trained else visible(part).join(MARKS)
                text.append(part, "bold green" if trained else "dim")
            text.append("\n")
    return text


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>ft data preview</title>
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }}
h2 {{ font-size: 0.9rem; color: #57606a; border-top: 1px solid #d0d7de; padding-top: 1rem; font-weight: 600; }}
h1 {{ font-size: 1rem; }}
pre {{ white-space: pre-wrap; font: 13px/1.6 ui-monospace, monospace; margin: 0; color: #6e7781; }}
mark {{ background: #dafbe1; color: #1a7f37; border-radius: 3px; }}
[data-role] {{ color: #0550ae; }}
[data-role="system"] {{ color: #8250df; }}
[data-role="tool"] {{ color: #953800; }}
[data-role="assistant"] {{ color: #24292f; }}
pre [data-role]::before {{ content: attr(data-role); font: 600 10px system-ui, sans-serif; margin-right: 0.4em;
  padding: 0 0.4em; border: 1px solid currentColor; border-radius: 3px; vertical-align: 1px; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #0d1117; color: #e6edf3; }}
  mark {{ background: #12361f; color: #7ee787; }}
  [data-role] {{ color: #79c0ff; }}
  [data-role="system"] {{ color: #d2a8ff; }}
  [data-role="tool"] {{ color: #ffa657; }}
  [data-role="assistant"] {{ color: #e6edf3; }}
}}
</style>
<p><mark>Marked</mark> text is trained; the rest is only read: grey is the template's, and
<span data-role="system">system</span>, <span data-role="user">user</span>, <span data-role="tool">tool</span> and
<span data-role="assistant">assistant</span> have a colour each.</p>
{body}
</html>
"""


def as_html(shown: list[dict[str, Any]], rows: list[list[int]] | None = None) -> str:
    """One page without outside resources; content cannot break out of it."""
    parts = []
    for number, group in enumerate(rows or [list(range(len(shown)))], 1):
        if rows:
            parts.append(f"<h1>Packed row {number}: {len(group)} samples</h1>")
        for i in group:
            body, at = "", 0
            for trained, part in runs(shown[i]):
                inner = "".join(spoken(part, at, shown[i].get("roles", ()), trained))
                body += f"<mark>{inner}</mark>" if trained else inner
                at += len(part)
            parts.append(f"<h2>{escaped(heading(shown[i]))}</h2>\n<pre>{body}</pre>")
    return PAGE.format(body="\n".join(parts))


def spoken(part: str, at: int, roles: Iterable[tuple[str, int, int]], trained: bool) -> Iterator[str]:
    """A stretch that begins at character `at`, as HTML; what the assistant says and is trained has its mark already."""
    end, done = at + len(part), at
    for role, first, last in roles:
        a, b = max(first, done), min(last, end)
        if a < b and not (trained and role == "assistant"):
            yield escaped(part[done - at : a - at])
            yield f'<span data-role="{escaped(role)}">{escaped(part[a - at : b - at])}</span>'
            done = b
    yield escaped(part[done - at :])


def escaped(text: str) -> str:
    """Also what would turn the reading order round: a mark has to stand on what is trained."""
    return html.escape(visible(text))
