"""Prompts for reinforcement learning: rows of any chat format, answered or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune.data.audit import Audit, Encoding
from finetune.data.encoder import Encoder
from finetune.data.rows import Rows, divided, gathered
from finetune.data.samples import Item
from finetune.data.shown import told
from finetune.data.types import Message, RowProblem, Text
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    """Ends where the answer begins."""
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    columns: dict[str, Any]
    """The row as it stands in the file, and `reference`: the answer it holds, or None."""

    @property
    def text(self) -> str:
        """What was asked last."""
        return next((str(m["content"]) for m in reversed(self.messages) if m["role"] != "assistant"), "")


def load_prompts(config: DataConfig, encoder: Encoder, *, seed: int = 42, eval_data: Any = None) -> Rows:
    """Every prompt of `data.train` of at most `data.max_length` tokens, as a list of Prompt; longer ones are left out
    and counted, or errors (`on_overlong`). UserError with every problem of every row."""
    audit = Audit(config, None, "prompts", eval_data)
    audit.counts["overlong"] = 0

    def prompt(item: Item, _: Encoding) -> Prompt | None:
        sample = item.usable
        if isinstance(sample, Text):
            fix = "give rows with a prompt or messages"
            raise UserError("raw text asks nothing", path=item.file, key="data.train", fix=fix)
        try:
            audit.check_forged(encoder, sample.asked)
            ids = encoder.prompt_ids(sample.asked, sample.tools)
            if len(ids) > config.max_length and config.on_overlong == "error":
                what = f"the prompt has {len(ids)} tokens, over data.max_length {config.max_length}"
                raise RowProblem("overlong", what, "raise data.max_length, or set data.on_overlong: drop")
        except RowProblem as problem:
            audit.refuse(item, problem)
            return None
        if len(ids) > config.max_length:
            audit.counts["overlong"] += 1
            return None
        audit.left_out(item, [what for what, _ in told(encoder.losses.of(sample.asked, sample.tools), set())])
        return Prompt(ids, sample.asked, sample.tools, {**item.data, "reference": sample.reference})

    rows, hashes, weights, places = gathered(audit, seed, prompt)
    counts, warnings, too_long = dict(audit.counts), audit.warnings(), audit.counts["overlong"]
    if not rows:
        raise UserError("no prompt is left", key="data.max_length", fix=f"raise it: {too_long} are longer")
    if too_long:
        warnings.append(f"{too_long} prompts are longer than data.max_length ({config.max_length}) and left out")
    pick = lambda numbers: [rows[i] for i in numbers]  # noqa: E731
    return divided(pick, hashes, weights, config.eval_split, counts, warnings, places, audit.seen())
