"""GPUs by name and by memory: bytes, and how fast they multiply. No torch."""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

from finetune.errors import UserError


class Card(NamedTuple):
    name: str
    memory: float
    """GB (10^9 bytes)."""
    tflops: float | None
    """Dense bfloat16 (T4, V100: float16) with float32 sums, of the data sheet; None: not known."""
    device: str = "cuda"
    bf16: bool = True


CARDS = {
    "T4": Card("T4", 15.8, 65, bf16=False), "V100": Card("V100", 16.9, 112, bf16=False),
    "RTX 3060": Card("RTX 3060", 12.6, 51), "RTX 3090": Card("RTX 3090", 25.3, 71),
    "RTX 4060 Ti": Card("RTX 4060 Ti", 17.2, 88), "RTX 4090": Card("RTX 4090", 25.3, 165),
    "RTX 5090": Card("RTX 5090", 34.2, 209), "A10": Card("A10", 24.1, 125), "L4": Card("L4", 24.1, 121),
    "L40S": Card("L40S", 47.7, 362), "A100": Card("A100", 42.4, 312), "A100 80GB": Card("A100 80GB", 85.1, 312),
    "H100": Card("H100", 85.0, 989), "H200": Card("H200", 150.0, 989), "B200": Card("B200", 192.0, 2250),
}  # fmt: skip
"""Memory is what the driver reports, less than the name says where it keeps some for itself."""


def card(text: str) -> Card:
    """`24GB`, `RTX 4090`, `A100-80GB`. UserError for what is neither."""
    wanted = re.sub(r"[\s_-]+", " ", text).strip()
    size = re.fullmatch(r"([\d.]+)\s?(gb|gib|g)?", text.strip().lower())
    if size is not None and _number(size[1]):
        gb = float(size[1]) * (1.073741824 if size[2] == "gib" else 1.0)
        return Card(f"{size[1]} GB", gb, None)
    known = {name.lower(): found for name, found in CARDS.items()}
    spelled = {name.replace(" ", ""): found for name, found in known.items()}
    found = known.get(wanted.lower()) or spelled.get(wanted.lower().replace(" ", ""))
    if found is None:
        near = difflib.get_close_matches(wanted.lower(), known, n=1)
        size_of_it = "give its memory, as in 48GB"
        fix = f"{size_of_it}, or one of {', '.join(CARDS)}"
        if near:
            fix = f"did you mean {known[near[0]].name}? Or {size_of_it}"
        raise UserError(f"{text!r} is neither a size nor a card that is known here", key="--gpu", fix=fix)
    return found


def _number(text: str) -> bool:
    try:
        return 0 < float(text) < 1_000  # 4090 is a card
    except ValueError:
        return False
