"""What counts as the same question."""

from __future__ import annotations

from finetune.data.types import Conversation, Sample, Text


def asked(*turns: tuple[str, str]) -> Conversation:
    return Conversation([{"role": role, "content": content} for role, content in turns])


def test_the_same_question_in_other_clothes() -> None:
    plain = asked(("user", "What is it?"), ("assistant", "a"))
    clothes: tuple[Sample, ...] = (
        asked(("user", "  what IS it ？ "), ("assistant", "b")),
        asked(("system", "be brief"), ("user", "What is it"), ("assistant", "c")),
        asked(("user", "What is it?"), ("assistant", "a"), ("user", "and now?"), ("assistant", "d")),
        Text("what is it."),
    )
    for same in clothes:
        assert same.question == plain.question == "whatisit"
        assert same.content_hash == plain.content_hash
    assert asked(("user", "?!"), ("assistant", "a")).question == "?!", "nothing but punctuation is a question, too"
    assert asked(("user", "What was it?")).content_hash != plain.content_hash
