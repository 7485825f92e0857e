"""The Chinese catalogue is complete, and what finds the messages finds them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import zh_catalogue
from zh_messages import Messages

from finetune.language import CATALOGUE

SOURCE = """
from finetune.errors import Problem, RunError, UserError

AGAIN = "do it again"
WORDS = {"a": "the first one", "b": "the second, by far"}
BAD = ("is a bad thing", "take a good one")


def reason(kind: str) -> str:
    return WORDS[kind]


def refuse(path, what, fix):
    raise UserError(what, path=path, fix=fix)


def check(path, names, size, more):
    if size > 3:
        refuse(path, f"holds {size:,} of {len(names)}", AGAIN)
    what = "is old" if more else f"is {size!r} and new"
    raise UserError(what, fix="choose another" + (", or wait" if more else ""))
    raise RunError(f"stopped at {size}: {reason('a')}")
    return [Problem("a lone word", key=name) for name in names]


class Odd(Exception): ...


def read(path):
    try:
        pass
    except OSError as error:
        raise Odd(f"cannot be opened ({error})")
    log("nobody reads this one")
"""


def test_catalogue_is_complete() -> None:
    wrong = zh_catalogue.wrong(zh_catalogue.read(CATALOGUE), zh_catalogue.templates())
    assert not wrong, "run: python tools/zh_catalogue.py\n" + "\n".join(wrong[:20])


def test_one_entry_a_line_and_sorted() -> None:
    text = CATALOGUE.read_text(encoding="utf-8")
    assert text == zh_catalogue.written(zh_catalogue.read(CATALOGUE)), "run: python tools/zh_catalogue.py --drop"


def test_messages_are_followed_to_their_words(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(SOURCE, encoding="utf-8")
    assert set(Messages(tmp_path).all()) == {
        "do it again", "holds {0} of {1}", "is old", "is {0} and new", "choose another", "choose another, or wait",
        "stopped at {0}: the first one", "stopped at {0}: the second, by far", "a lone word", "is a bad thing",
        "take a good one", "cannot be opened ({a})",
    }  # fmt: skip


def test_what_is_wrong_is_told() -> None:
    wanted = {"no {0} at --here": "a.py:1", "new": "b.py:2"}
    found = zh_catalogue.wrong({"no {0} at --here": "没有 {1}", "old": "旧"}, wanted)
    assert [line.partition(" ")[0] for line in found] == ["missing", "stale:", "other", "--here"]
    assert zh_catalogue.wrong({"no {0} at --here": "--here 没有 {0}", "new": "新"}, wanted) == []
