"""Thinking: what each setting trains, on the templates of Qwen3, Qwen3.5, GLM-4.5 and others, as trl ships them.

A golden is the text with what is trained between ⟦ and ⟧; its ids are checked against apply_chat_template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from conftest import SHARED, write_rows

from finetune.data import audit, chat, preview, thinking
from finetune.data.conversations import load_sft
from finetune.data.pairs import load_pairs
from finetune.data.prompts import load_prompts
from finetune.data.types import IGNORED, Conversation, Preference
from finetune.errors import UserError
from finetune.models import tokenizers
from finetune.recipe.sections import DataConfig, ModelConfig

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SPECIAL = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|channel>", "<channel|>",
           "<|turn>", "<turn|>", "<|think|>"]  # fmt: skip


def tokenizer(template: str) -> Any:
    """That of tiny-qwen with the control tokens of the families added."""
    from tokenizers import AddedToken

    made = tokenizers.load_tokenizer(ModelConfig(name="tiny-qwen"))
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>", "\n\n")])
    made.embedding_rows = len(made)
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if template != "own" else made.chat_template
    return made


@pytest.fixture(scope="module")
def encoders() -> Any:
    known: dict[tuple[str, str], Any] = {}

    def of(template: str, treatment: str = "keep") -> Any:
        if (template, treatment) not in known:
            known[template, treatment] = chat.make_encoder(tokenizer(template), None, treatment)
        return known[template, treatment]

    return of


def u(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def a(text: str, thought: str | None = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {}), **more}


THINKS = [u("q"), a("yes", "why")]
INLINE = [u("q"), a("<think>\nwhy\n</think>\n\nyes")]
PLAIN = [u("q"), a("yes")]
EMPTY = [u("q"), a("<think>\n\n</think>\n\nyes")]
TURNS = [*PLAIN, u("r"), a("no")]
EARLIER = [*THINKS, u("r"), a("no", "because")]


def marked(encoder: Any, row: Any) -> str:
    parts = [
        (label != IGNORED, encoder.tokenizer.decode([i])) for i, label in zip(row.input_ids, row.labels, strict=True)
    ]
    return "".join(f"⟦{text}⟧" if trained else text for trained, text in parts).replace("⟧⟦", "")


Q, R = (
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
)
BLOCK = "<think>\n\n</think>\n\n"
GQ, GOFF = "[gMASK]<sop><|user|>\nq<|assistant|>", "[gMASK]<sop><|user|>\nq/nothink<|assistant|>\n<think></think>"
NQ = f"<|im_start|>system\n<|im_end|>\n{Q}"
GOLDEN = [
    # template, setting, row, train_on, the text
    ("qwen3", "keep", THINKS, "assistant", f"{Q}⟦<think>\nwhy\n</think>\n\nyes<|im_end|>⟧\n"),
    ("qwen3", "keep", INLINE, "assistant", f"{Q}⟦<think>\nwhy\n</think>\n\nyes<|im_end|>⟧\n"),
    ("qwen3", "keep", PLAIN, "assistant", f"{Q}⟦{BLOCK}yes<|im_end|>⟧\n"),
    ("qwen3", "keep", EARLIER, "last", f"{Q}yes<|im_end|>\n{R}⟦<think>\nbecause\n</think>\n\nno<|im_end|>⟧\n"),
    ("qwen3", "keep", TURNS, "assistant", f"{Q}⟦yes<|im_end|>⟧\n{R}⟦{BLOCK}no<|im_end|>⟧\n"),
    ("qwen3", "drop", THINKS, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3", "drop", INLINE, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3", "drop", EMPTY, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3", "drop", PLAIN, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3", "drop", EARLIER, "assistant", f"{Q}⟦yes<|im_end|>⟧\n{R}{BLOCK}⟦no<|im_end|>⟧\n"),
    ("qwen3", "empty", THINKS, "assistant", f"{Q}⟦<think>\nwhy\n</think>\n\nyes<|im_end|>⟧\n"),
    ("qwen3", "empty", INLINE, "assistant", f"{Q}⟦<think>\nwhy\n</think>\n\nyes<|im_end|>⟧\n"),
    ("qwen3", "empty", PLAIN, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3", "empty", EMPTY, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3", "empty", TURNS, "assistant", f"{Q}yes<|im_end|>\n{R}{BLOCK}⟦no<|im_end|>⟧\n"),
    ("qwen3", "empty", PLAIN, "all", f"⟦{Q}⟧{BLOCK}⟦yes<|im_end|>\n⟧"),
    ("qwen3", "drop", TURNS, "all", f"⟦{Q}yes<|im_end|>\n{R}⟧{BLOCK}⟦no<|im_end|>\n⟧"),
    ("qwen3_5_think", "keep", THINKS, "assistant", f"{Q}<think>\n⟦why\n</think>\n\nyes<|im_end|>⟧\n"),
    ("qwen3_5_think", "keep", EARLIER, "last", f"{Q}yes<|im_end|>\n{R}<think>\n⟦because\n</think>\n\nno<|im_end|>⟧\n"),
    ("qwen3_5_think", "keep", PLAIN, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3_5_think", "empty", PLAIN, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3_5_think", "empty", TURNS, "assistant", f"{Q}yes<|im_end|>\n{R}{BLOCK}⟦no<|im_end|>⟧\n"),
    ("qwen3_5_think", "drop", THINKS, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("qwen3_5_think_training", "keep", THINKS, "assistant", f"{Q}<think>\n⟦why\n</think>\n\nyes<|im_end|>⟧\n"),
    ("qwen3_5_nothink", "keep", THINKS, "assistant", f"{Q}<think>\n⟦why\n</think>\n\nyes<|im_end|>⟧\n"),
    ("qwen3_5_nothink", "keep", PLAIN, "assistant", f"{Q}{BLOCK}⟦yes<|im_end|>⟧\n"),
    ("glm4moe", "keep", THINKS, "assistant", f"{GQ}⟦\n<think>why</think>\nyes<|user|>⟧"),
    ("glm4moe", "keep", PLAIN, "assistant", f"{GQ}⟦\n<think></think>\nyes<|user|>⟧"),
    ("glm4moe", "empty", PLAIN, "assistant", f"{GOFF}⟦\nyes<|user|>⟧"),
    ("glm4moe", "empty", THINKS, "assistant", f"{GQ}⟦\n<think>why</think>\nyes<|user|>⟧"),
    ("glm4moe", "empty", TURNS, "assistant",
     f"{GOFF}⟦\nyes<|user|>⟧\nr/nothink<|assistant|>\n<think></think>⟦\nno<|user|>⟧"),
    ("glm4moe", "drop", THINKS, "assistant", f"{GOFF}⟦\nyes<|user|>⟧"),
    ("nemotron_3_nano", "keep", PLAIN, "assistant", f"{NQ}<think></think>⟦yes<|im_end|>⟧\n"),
    ("gemma4_v5", "empty", PLAIN, "assistant", "<|endoftext|><|turn>user\nq<turn|>\n<|turn>model\n⟦yes<turn|>⟧\n"),
]  # fmt: skip


@pytest.mark.parametrize(("template", "treatment", "row", "train_on", "text"), GOLDEN)
def test_goldens(encoders: Any, template: str, treatment: str, row: Any, train_on: str, text: str) -> None:
    encoder = encoders(template, treatment)
    conversation = Conversation(row)
    found = encoder.encode(conversation, train_on)
    assert marked(encoder, found) == text
    thinks, on = encoder.mode(conversation, train_on)
    assert found.thinks is thinks is (row in (THINKS, INLINE, EARLIER))
    # The ids are transformers' own, of the row as the setting leaves it, with the switch where it is set.
    rendered = thinking.dropped(row, encoder.thinking) if treatment == "drop" else row
    given = {} if on is None else {"enable_thinking": on}
    reference = encoder.tokenizer.apply_chat_template(rendered, return_dict=False, **given)
    assert found.input_ids[: len(reference)] == reference
    # And what is trained follows what generation will show.
    prompt = encoder.tokenizer.apply_chat_template(
        rendered[:-1], add_generation_prompt=True, return_dict=False, **given
    )
    assert encoder.prompt_ids(conversation.asked, None, on) == prompt == found.input_ids[: len(prompt)]
    if train_on != "all":
        assert set(found.labels[-2:]) != {IGNORED}
        last = max(i for i, label in enumerate(found.labels) if label == IGNORED and i < len(prompt))
        assert last == len(prompt) - 1, "the answer is trained from its first token on"


@pytest.mark.parametrize(
    "template", ["qwen3", "qwen3_8", "glm4moe", "nemotron_3_nano", "gemma4_v5", "gptoss", "lfm2_2_5"]
)
def test_thinking_in_tags_is_thinking(encoders: Any, template: str) -> None:
    """Also where the template does not look for tags: as a part of the answer it would be trained behind an empty block
    (Qwen3.8) or in the final channel (gpt-oss); and an empty block of the row's is none."""
    encoder = encoders(template)
    for tagged, row in ((INLINE, THINKS), (EMPTY, PLAIN)):
        found, wanted = encoder.encode(Conversation(tagged)), encoder.encode(Conversation(row))
        assert marked(encoder, found) == marked(encoder, wanted)
        assert found.input_ids == wanted.input_ids
        asked = [*tagged, u("r")], [*row, u("r")]
        assert encoder.prompt_ids(asked[0]) == encoder.prompt_ids(asked[1])


def test_tags_that_become_thinking_are_told(encoders: Any, tmp_path: Path) -> None:
    """Where the template reads them, nothing is done; what only speaks of tags stays, and so does a row with both."""
    both = [u("q"), a("<think>\none\n</think>\n\nyes", "two")]
    spoken = [u("q"), a("write <think> and </think>")]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": m} for m in (INLINE, EMPTY, PLAIN, THINKS, both, spoken)])
    told = "2 rows whose <think> tags became reasoning_content: the chat template does not look into content"
    for template, treatment, found in (
        ("qwen3_8", "keep", True), ("gptoss", "keep", True), ("qwen3_8", "drop", False), ("qwen3", "keep", False),
    ):  # fmt: skip
        config = DataConfig(
            train=str(rows), thinking=treatment, on_error="drop", max_dropped=0.5
        )  # Qwen3: the last row
        assert (told in load_sft(config, encoders(template, treatment)).warnings) is found, (template, treatment)
    encoder = encoders("qwen3_8")
    assert "write <think> and </think><|im_end|>" in marked(encoder, encoder.encode(Conversation(spoken)))
    shown = preview.samples(DataConfig(train=str(rows)), encoder)
    assert [sample.get("moved", False) for sample in shown] == [True, True, False, False, False, False]
    assert (shown[0]["input_ids"], shown[0]["roles"]) == (shown[3]["input_ids"], shown[3]["roles"])
    assert "row 1 · <think> tags moved into reasoning_content" in str(preview.as_text(shown))


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_5_nothink", "glm4moe", "nemotron_3_nano"])
def test_what_is_asked_is_what_was_shown(encoders: Any, template: str) -> None:
    """The prompts of --thinking off and on are the context of `empty` on plain rows and of `keep` on thinking ones."""
    for treatment, row, on in (("empty", PLAIN, False), ("drop", THINKS, False), ("keep", THINKS, True)):
        encoder = thinking.asked(encoders(template), on, "--thinking")
        shown = encoders(template, treatment).encode(Conversation(row))
        context = shown.input_ids[: next(i for i, label in enumerate(shown.labels) if label != IGNORED)]
        assert encoder.prompt_ids([row[0]]) == context


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "glm4moe"])
@pytest.mark.parametrize("treatment", ["keep", "empty"])
def test_thinking_that_the_template_drops_is_never_trained_as_if_it_were_there(
    encoders: Any, template: str, treatment: str, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": EARLIER}])
    report = audit.check(DataConfig(train=str(rows), thinking=treatment), encoders(template, treatment))
    assert report.errors == 1
    assert "turn 2" in report.problems[0]["message"]
    assert "data.train_on: last" in report.problems[0]["message"]
    last = DataConfig(train=str(rows), thinking=treatment, train_on="last")
    said = audit.check(last, encoders(template, treatment)).problems
    assert [p["message"] for p in said] == ["the chat template leaves out the thinking of turn 2"]


def test_turns_without_their_block_are_counted(encoders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": TURNS}, {"messages": PLAIN}])
    config = DataConfig(train=str(rows), thinking="empty")
    report = audit.check(config, encoders("qwen3", "empty"))
    assert [(p["level"], p["row"], p["kind"]) for p in report.problems] == [("warning", 1, "untrained_turn")]
    assert "turn 2 is not trained" in report.problems[0]["message"]
    loaded = load_sft(config, encoders("qwen3", "empty"))
    assert any("1 turns that are not trained" in line for line in loaded.warnings)
    assert not any("merges the end" in line for line in loaded.warnings)


def test_a_row_is_compared_with_the_prompt_that_it_is_written_for(encoders: Any, tmp_path: Path) -> None:
    """Its last turn, the only one that is trained, has no thinking, whatever the first one has."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [*THINKS, u("r"), a("no")]}])
    config = DataConfig(train=str(rows), thinking="empty", train_on="last")
    assert not any("merges the end" in line for line in load_sft(config, encoders("glm4moe", "empty")).warnings)


def test_the_default_says_what_it_trains(encoders: Any, tmp_path: Path) -> None:
    rows, more = (
        write_rows(tmp_path / name, [{"messages": m}]) for name, m in (("a.jsonl", PLAIN), ("b.jsonl", THINKS))
    )
    said = "no row has thinking, and the empty block that the chat template writes for that is trained, too"
    for path, template, treatment, told in (
        (rows, "qwen3", "keep", True), (rows, "qwen3", "empty", False), (more, "qwen3", "keep", False),
        (rows, "glm4moe", "keep", True), (rows, "qwen3_5_think", "keep", False), (rows, "own", "keep", False),
    ):  # fmt: skip
        config = DataConfig(train=str(path), thinking=treatment)
        warnings = load_sft(config, encoders(template, treatment)).warnings
        assert any(line.startswith(said) for line in warnings) is told, (template, treatment)


def test_a_flagged_turn_stays_out_of_all(encoders: Any) -> None:
    row = encoders("qwen3", "empty").encode(Conversation([u("q"), a("yes", train=False), u("r"), a("no")]), "all")
    assert marked(encoders("qwen3"), row) == f"⟦{Q}⟧yes<|im_end|>⟦\n{R}⟧{BLOCK}⟦no<|im_end|>\n⟧"


def test_what_is_dropped_is_said(encoders: Any, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"messages": m} for m in (THINKS, PLAIN, [u("w"), a("<think>x</think>")])]
    )
    config = DataConfig(train=str(rows), thinking="drop", on_error="drop", max_dropped=0.5)
    loaded = load_sft(config, encoders("qwen3", "drop"))
    assert loaded.counts["thinking"] == 1
    assert "1 rows without the thinking that they hold (data.thinking: drop)" in loaded.warnings
    with pytest.raises(UserError, match="nothing is left without its thinking"):
        load_sft(DataConfig(train=str(rows), thinking="drop"), encoders("qwen3", "drop"))


@pytest.mark.parametrize("treatment", ["keep", "empty"])
def test_thinking_without_an_end_is_told(encoders: Any, treatment: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": [u("q"), a("<think>\nit may be")]}, {"messages": THINKS}])
    report = audit.check(DataConfig(train=str(rows), thinking=treatment), encoders("qwen3", treatment))
    assert [(p["level"], p["row"], p["kind"]) for p in report.problems] == [("warning", 1, "unfinished_thinking")]
    assert "turn 2: its thinking does not end" in report.problems[0]["message"]


def test_templates_that_know_of_none(encoders: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can be told not to think") as refused:
        encoders("own", "empty")
    assert refused.value.problems[0].key == "data.thinking"
    with pytest.raises(UserError, match="no switch for thinking") as refused:
        thinking.asked(encoders("own"), False, "--thinking")
    assert refused.value.problems[0].key == "--thinking"
    plain = [encoders("own", treatment).encode(Conversation(PLAIN)) for treatment in ("keep", "drop")]
    assert plain[0] == plain[1], "nothing to drop"
    dropped = [encoders("own", "drop").encode(Conversation(row)).input_ids for row in (THINKS, INLINE)]
    assert dropped == [plain[0].input_ids] * 2
    assert "why" in marked(encoders("own"), encoders("own").encode(Conversation(INLINE)))


def test_chatglm_drops_too() -> None:
    base = tokenizers.load_tokenizer(ModelConfig(name="tiny-chatglm3"))
    encoder = chat.make_encoder(base, None, "drop")
    assert encoder.encode(Conversation(THINKS)).input_ids == encoder.encode(Conversation(PLAIN)).input_ids
    with pytest.raises(UserError, match="cannot"):
        chat.make_encoder(base, None, "empty")


def test_answers_of_a_pair_are_written_alike(encoders: Any, tmp_path: Path) -> None:
    """GLM's /nothink stands in the question: it must not differ between the two."""
    encoder = encoders("glm4moe", "empty")
    for chosen, switch in ((a("yes", "why"), ""), (a("yes"), "/nothink")):
        both = Preference([u("q")], [chosen], [a("no")]).conversations()
        texts = [marked(encoder, encoder.encode(both[side])) for side in ("chosen", "rejected")]
        assert all(text.startswith(f"[gMASK]<sop><|user|>\nq{switch}<|assistant|>") for text in texts), texts
    row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    rows = write_rows(tmp_path / "pairs.jsonl", [row])
    for to_score in (False, True):
        found = load_pairs(DataConfig(train=str(rows), thinking="empty"), encoder, to_score=to_score).train[0]
        head = encoder.prompt_ids([u("q")], None, False)
        assert found["chosen_ids"][: len(head)] == found["rejected_ids"][: len(head)] == head
        assert not any(found["chosen_mask"][: len(head)])


def test_prompts_of_ppo(encoders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": PLAIN}])
    for on, end in ((False, BLOCK), (True, "assistant\n"), (None, "assistant\n")):
        encoder = thinking.asked(encoders("qwen3"), on, "ppo.thinking")
        (prompt,) = load_prompts(DataConfig(train=str(rows)), encoder).train
        assert encoder.tokenizer.decode(prompt.ids).endswith(end)
        shown = encoders("qwen3", "empty" if on is False else "keep").encode(Conversation(PLAIN if not on else THINKS))
        assert shown.input_ids[: len(prompt.ids)] == prompt.ids


def test_the_preview_shows_the_block_as_context(encoders: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": PLAIN}])
    shown = preview.samples(DataConfig(train=str(rows), thinking="empty"), encoders("qwen3", "empty"))
    assert [text for trained, text in preview.runs(shown[0]) if trained] == ["yes<|im_end|>"]
    assert BLOCK in "".join(text for trained, text in preview.runs(shown[0]) if not trained)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of cases is not here")
@pytest.mark.parametrize("case", ["reasoning-content", "thinking-key", "qwen3-multiturn"])
def test_shared_cases(encoders: Any, case: str) -> None:
    path = str(SHARED / "cases" / case / "train.jsonl")
    for treatment in ("keep", "empty"):
        config = DataConfig(train=path, thinking=treatment, train_on="last")
        loaded = load_sft(config, encoders("qwen3", treatment))
        assert loaded.counts["thinking"] == loaded.counts["used"] > 0
        trained = [marked(encoders("qwen3"), encoders("qwen3", treatment).encode(Conversation(THINKS)))]
        assert all("why" in text for text in trained)
    dropped = load_sft(DataConfig(train=path, thinking="drop"), encoders("qwen3", "drop"))
    texts = [encoders("qwen3").tokenizer.decode(ids) for ids in dropped.train["input_ids"]]
    assert not any("thought" in text or "make four" in text for text in texts)
    assert all(text.endswith("<|im_end|>\n") for text in texts)


# --- what a template knows, and what stands behind thinking ---


@pytest.mark.parametrize(
    ("template", "switch", "default", "begin", "end"),
    [
        ("qwen3", "enable_thinking", True, "<think>", "</think>"),
        ("qwen3_5_nothink", "enable_thinking", False, "<think>", "</think>"),
        ("glm4moe", "enable_thinking", True, "<think>", "</think>"),
        ("gemma4", "enable_thinking", False, "<|channel>thought", "<channel|>"),
        ("gemma4_v5", "enable_thinking", False, "<|channel>thought", "<channel|>"),
        ("lfm2_2_5", None, None, "<think>", "</think>"),
        ("llama3", None, None, "<think>", "</think>"),
    ],
)
def test_detected(template: str, switch: str | None, default: bool | None, begin: str, end: str) -> None:
    variables = (("bos_token", "<s>"), ("eos_token", "</s>"))
    found = thinking.detected((TEMPLATES / f"{template}.jinja").read_text(), variables)
    assert (found.switch, found.default, found.begin, found.end) == (switch, default, begin, end)


def test_deepseek_calls_it_thinking() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A></think>{{ m.content }}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{{ '<think>' if thinking else '</think>' }}{% endif %}"
    )
    found = thinking.detected(template, ())
    assert (found.switch, found.default, found.shown) == ("thinking", False, False)
    assert found.variables(True) == {"thinking": True}
    assert found.variables(None) == {}


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nyes", False, ("yes", "why", False)),
        ("why\n</think>\n\nyes", True, ("yes", "why", False)),
        ("why\n</think>\n\nyes", False, ("yes", "why", False)),  # whoever made the prompt opened it
        ("<think>\n\n</think>\n\nyes", False, ("yes", "", False)),
        ("<think>\nit may", False, ("", "it may", True)),
        ("it may", True, ("", "it may", True)),
        ("", True, ("", "", True)),
        ("yes", False, ("yes", "", False)),
        ("write <think> and </think>", False, ("write <think> and </think>", "", False)),
        ("<think>a</think>", False, ("", "a", False)),
    ],
)
def test_answer(text: str, begun: bool, expected: tuple[str, str, bool]) -> None:
    assert thinking.answer(text, begun=begun) == expected


def test_answer_by_the_templates_own_marks(encoders: Any) -> None:
    encoder = encoders("gemma4_v5")
    ids = encoder.tokenizer.encode("<|channel>thought\nwhy\n<channel|>yes<turn|>", add_special_tokens=False)
    text = thinking.decoded(encoder.tokenizer, ids, encoder.thinking)
    assert thinking.answer(text, encoder.thinking) == ("yes", "why", False)
    assert thinking.answer("<think>why</think>yes", encoder.thinking) == ("yes", "why", False)
    assert thinking.decoded(encoder.tokenizer, encoder.tokenizer.encode("yes<turn|>"), encoder.thinking) == "yes"


def test_begun(encoders: Any) -> None:
    for template, on, expected in (
        ("qwen3", True, False),
        ("qwen3_5_think", True, True),
        ("qwen3_5_think", False, False),
    ):
        encoder = encoders(template)
        prompt = encoder.prompt_ids([u("q")], None, on)
        assert thinking.begun(encoder.tokenizer, prompt, encoder.thinking) is expected


def test_records(encoders: Any, tmp_path: Path) -> None:
    """Which settings and rows show what, and when use with another is told."""
    for template, treatment, counts, shown in (
        ("qwen3", "keep", {"used": 2}, ["off", "on"]),
        ("qwen3", "keep", {"used": 2, "thinking": 2}, ["on"]),
        ("qwen3", "empty", {"used": 2}, ["off"]),
        ("qwen3", "empty", {"used": 2, "thinking": 1}, ["off", "on"]),
        ("qwen3", "drop", {"used": 2, "thinking": 2}, ["off"]),
        ("qwen3_5_think", "keep", {"used": 2}, ["off"]),
    ):
        told = thinking.record(encoders(template, treatment), counts)
        assert told["shown"] == shown, (template, treatment, counts)
        (tmp_path / thinking.FILE).write_text(str(told).replace("'", '"'))
        assert thinking.read(tmp_path) == told
        marks = encoders(template).thinking
        for on in (True, False):
            assert (thinking.mismatch(told, on, marks) is None) == (thinking.named(on) in shown)
        assert (thinking.mismatch(told, None, marks) is None) == ("on" in shown), "by default both think"
        assert thinking.usual(told) is (None if len(shown) == 2 else shown == ["on"])
    for broken in ("{}", "[1]", '{"data.thinking": "keep", "shown": ["maybe"]}', '{"data.thinking": 1}', "no"):
        (tmp_path / thinking.FILE).write_text(broken)
        assert thinking.read(tmp_path) == {}
    assert thinking.usual({}) is None
    assert thinking.mismatch({}, False, encoders("qwen3").thinking) is None
