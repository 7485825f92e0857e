"""`1 rows are cut` as `1 row is cut`. Messages are written for many, so that each is one template, and agree here."""

from __future__ import annotations

import re

UNITS = (
    "GPUs|adapters|answers|blocks|bytes|calls|cards|cells|changes|characters|checkpoints|columns|conversations|cores|"
    "devices|duplicates|embeddings|entries|epochs|evaluations|examples|exchanges|files|heads|folders|groups|ids|items|jobs|layers|"
    "lines|machines|messages|metrics|minibatches|models|nats|numbers|outputs|pairs|parameters|parts|passes|positions|problems|processes|"
    "prompts|questions|ranks|rejects|replies|reports|requests|rollouts|rounds|rows|runs|samples|scores|seconds|sets|shots|"
    "sources|steps|tasks|tensors|terms|texts|things|threads|times|tokens|turns|updates|values|weights|words"
)
BETWEEN = (
    "PPO|bad|cut|different|empty|further|held-out|index|long|missing|more|optimizer|other|packed|prompt|random|rejected|sampled|"
    "short|trained|training|usable|virtual|wrong"
)
"""What may stand between the number and its unit."""
VERBS = {"are": "is", "have": "has", "were": "was", "do": "does", "begin": "begins", "come": "comes", "end": "ends",
         "fit": "fits", "need": "needs", "stand": "stands", "take": "takes", "think": "thinks"}  # fmt: skip
ONE = re.compile(
    rf"(?<![\w.,:/=^*-])(?P<one>[+-]?1 )(?P<between>(?:(?:{BETWEEN}) )*)(?P<unit>{UNITS}|others)"
    rf"(?P<verb> (?:{'|'.join(VERBS)}))?(?![\w/=(:-]|\.\w)"
)


def singular(unit: str) -> str:
    if unit.endswith("ies"):
        return unit[:-3] + "y"
    return unit[:-2] if unit.endswith(("sses", "ches")) else unit[:-1]


def agreed(text: str) -> str:
    """Numbers of one with their noun and verb; everything else as it is."""
    if "1 " not in text:
        return text

    def one(found: re.Match[str]) -> str:
        verb = found["verb"] or ""
        return f"{found['one']}{found['between']}{singular(found['unit'])}{verb and ' ' + VERBS[verb[1:]]}"

    return ONE.sub(one, text)
