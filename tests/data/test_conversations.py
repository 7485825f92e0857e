"""From the recipe's data section to datasets: lengths, hold-out, weights, cache, counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_kit import assistant, byte_level, encoder, make_rows, system, user, write

from finetune import cache
from finetune.data import audit, chat, conversations, held_out, samples, sources, token_cache
from finetune.data.rows import Rows
from finetune.data.types import Conversation, Preference
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig, SourceConfig


def load(path: Any, **settings: Any) -> Rows:
    extra = {key: settings.pop(key) for key in ("eval_data", "cache_folder") if key in settings}
    config = DataConfig(train=path, **settings)
    return conversations.load_sft(
        config, encoder(), seed=1, eval_data=extra.get("eval_data"), cache=extra.get("cache_folder")
    )


def test_rows_become_ids_and_labels(tmp_path: Path) -> None:
    data = load(write(tmp_path / "x.jsonl", make_rows(3)))
    row = encoder().encode(Conversation(make_rows(3)[0]["messages"]))
    assert data.train.column_names == ["input_ids", "labels"]
    assert data.train[0] == {"input_ids": row.input_ids, "labels": row.labels}
    assert data.eval is None
    trained = sum(label != -100 for r in data.train for label in r["labels"])
    assert data.counts["rows"] == data.counts["used"] == len(data.train) == 3
    assert data.counts["trained_tokens"] == trained
    assert data.counts["tokens"] == sum(len(r["input_ids"]) for r in data.train)
    assert data.warnings == []


def test_turn_weights_are_a_column_only_where_there_are_any(tmp_path: Path) -> None:
    rows = [*make_rows(1), {"messages": [user("q"), assistant("ab", train=0.5)]}]
    path = write(tmp_path / "x.jsonl", rows)
    for data in (load(path), load(path, cache_folder=tmp_path / "cache")):
        assert data.train[1]["weights"][-4:] == [0.5, 0.5, 0.5, 0.0]
        assert data.train[0]["weights"] == [float(label != -100) for label in data.train[0]["labels"]]


LONG = {"messages": [user("q"), assistant("long " * 40)]}
LONG_QUESTION = {"messages": [user("long " * 40), assistant("a")]}


def test_overlong_rows_are_cut_and_counted(tmp_path: Path) -> None:
    data = load(write(tmp_path / "x.jsonl", [*make_rows(3), LONG]), max_length=64)
    assert [len(row["input_ids"]) for row in data.train][-1] == 64
    assert data.counts["truncated"] == 1
    assert data.warnings == ["1 rows cut to data.max_length"]


def test_overlong_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    data = load(write(tmp_path / "x.jsonl", [*make_rows(3), LONG]), max_length=64, on_overlong="drop")
    assert len(data.train) == 3
    assert (data.counts["dropped"], data.counts["truncated"]) == (1, 0)
    assert data.warnings == ["1 rows left out: over data.max_length"]


def test_a_few_rows_whose_answer_is_cut_away_are_left_out(tmp_path: Path) -> None:
    data = load(write(tmp_path / "x.jsonl", [*make_rows(30), LONG_QUESTION]), max_length=64)
    assert len(data.train) == 30
    assert (data.counts["cut_away"], data.counts["dropped"]) == (1, 1)
    with pytest.raises(UserError, match="2 of 5 rows have no trained token within 64 tokens"):
        load(write(tmp_path / "y.jsonl", [*make_rows(3), LONG_QUESTION, LONG_QUESTION]), max_length=64)


def test_bad_rows_stop_the_run_all_at_once_or_are_dropped(tmp_path: Path) -> None:
    bad = [{"messages": [user("q"), assistant("")]}, {"messages": [user("q")]}]
    path = write(tmp_path / "x.jsonl", [*make_rows(60), *bad])
    with pytest.raises(UserError) as caught:
        load(path)
    assert [(p.row, p.message) for p in caught.value.problems] == [
        (61, "turn 2: the assistant's answer is empty"),
        (62, "no turn of the assistant, nothing to learn"),
    ]
    data = load(path, on_error="drop")
    assert (len(data.train), data.counts["dropped"]) == (60, 2)
    assert data.warnings == ["2 rows left out: they cannot be used"]
    with pytest.raises(UserError, match=r"2 of 62 rows cannot be used, over data.max_dropped \(1%\)"):
        load(path, on_error="drop", max_dropped=0.01)


def test_the_rest_of_a_broken_file_is_never_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(make_rows(60))[:-200])
    with pytest.raises(UserError, match=r"x.json, row 59, line 1: not valid JSON"):
        load(str(path), on_error="drop")
    (tmp_path / "x.csv").write_text("question,answer\n" + "q,a\n" * 60 + '"q,a\nq,a\n')
    with pytest.raises(UserError, match=r"x.csv, row 61: not valid csv"):
        load(str(tmp_path / "x.csv"), on_error="drop")


def test_holding_out_is_stable_by_content(tmp_path: Path) -> None:
    """More data, or data in another order, never moves a row from one side to the other."""

    def texts(rows: Any) -> set[str]:
        return {encoder().tokenizer.decode(row["input_ids"]) for row in rows}

    few = load(write(tmp_path / "x.jsonl", make_rows(300)), eval_split=0.2)
    many = load(write(tmp_path / "y.jsonl", list(reversed(make_rows(900)))), eval_split=0.2)
    assert few.eval is not None
    assert many.eval is not None
    assert 30 < len(few.eval) < 90
    assert texts(few.eval) <= texts(many.eval)
    assert texts(few.train) <= texts(many.train)
    assert len(few.train) + len(few.eval) == 300
    assert few.counts["eval_rows"] == len(few.eval)
    more = load(write(tmp_path / "x.jsonl", make_rows(300)), eval_split=0.3)
    assert more.eval is not None
    assert texts(few.eval) <= texts(more.eval)


def test_the_same_question_never_stands_on_both_sides(tmp_path: Path) -> None:
    rows = [{"messages": [user(f"question {i % 50}"), assistant(f"answer {i}")]} for i in range(200)]
    data = load(write(tmp_path / "x.jsonl", rows), eval_split=0.3)
    sides = [
        {encoder().tokenizer.decode(r["input_ids"]).split("\n")[1] for r in side} for side in (data.train, data.eval)
    ]
    assert not sides[0] & sides[1]


def test_a_number_of_rows_can_be_held_out(tmp_path: Path) -> None:
    data = load(write(tmp_path / "x.jsonl", make_rows(50)), eval_split=7)
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (43, 7)
    with pytest.raises(UserError, match="every row is held out"):
        load(write(tmp_path / "x.jsonl", make_rows(5)), eval_split=9)


def test_sources_have_weights(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", make_rows(400, "a")), write(tmp_path / "b.jsonl", make_rows(10, "b"))
    data = load([SourceConfig(path=one, weight=0.5), SourceConfig(path=two, weight=3.0)])
    texts = [encoder().tokenizer.decode(row["input_ids"]) for row in data.train]
    assert sum("b question" in text for text in texts) == 30
    assert 150 < sum("a question" in text for text in texts) < 250
    assert data.counts["rows"] == 410
    held = load([SourceConfig(path=one), SourceConfig(path=two, weight=3.0)], eval_split=0.5)
    assert held.eval is not None
    assert len({tuple(row["input_ids"]) for row in held.eval}) == len(held.eval)  # held-out rows are not repeated


def test_sources_may_differ_in_format(tmp_path: Path) -> None:
    flat = write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    data = load(
        [
            flat,
            SourceConfig(
                path=write(tmp_path / "b.jsonl", [{"x": "q", "y": "a"}]), columns={"question": "x", "answer": "y"}
            ),
        ]
    )
    assert data.train[0] == data.train[1]
    assert data.warnings == ["1 duplicate rows"]


def test_large_data_is_cached_by_everything_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write(tmp_path / "x.jsonl", make_rows(50)), tmp_path / "cache"
    first = load(path, cache_folder=cache, eval_split=0.2)
    reads: list[Any] = []
    read_file = sources.read_file
    monkeypatch.setattr(sources, "read_file", lambda p, *unit: reads.append(p) or read_file(p, *unit))
    again = load(path, cache_folder=cache, eval_split=0.2)
    assert not reads
    assert (again.counts, again.warnings) == (first.counts, first.warnings)
    assert again.train[:] == first.train[:]
    assert load(path, cache_folder=cache, eval_split=0.5).counts["rows"] == 50  # splitting is not part of the key
    assert not reads
    load(path, cache_folder=cache, max_length=512)
    assert len(reads) == 1
    write(tmp_path / "x.jsonl", make_rows(51))
    assert load(path, cache_folder=cache).counts["rows"] == 51
    assert len(reads) == 2
    made = chat.make_encoder(encoder().tokenizer)
    made.template = "{{ messages }}"
    assert conversations.cache_file(DataConfig(train=path), made, None, 1, cache) != conversations.cache_file(
        DataConfig(train=path), encoder(), None, 1, cache
    )


def test_nothing_is_left_of_a_run_that_failed(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "x.jsonl", [*make_rows(5), {"messages": []}]), tmp_path / "cache"
    with pytest.raises(UserError):
        load(path, cache_folder=cache)
    assert list(cache.iterdir()) == []


def test_small_data_stays_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", make_rows(5))
    assert conversations.cache_file(DataConfig(train=path), encoder(), None, 1, None) is None
    assert token_cache.LARGE > 1 << 20
    assert load(path).train.cache_files == []


def test_tokens_of_many_batches_are_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.jsonl", make_rows(30))
    whole = load(path).train[:]
    monkeypatch.setattr("finetune.data.audit.BATCH", 7)
    monkeypatch.setattr(token_cache, "FLUSH", 4)
    assert load(path).train[:] == whole


def test_markers_that_are_plain_text(tmp_path: Path) -> None:
    from test_templates import make

    _, llama2 = make("llama2")
    path = write(tmp_path / "x.jsonl", [{"messages": [user("say [/INST] twice"), assistant("a")]}])
    with pytest.raises(UserError, match=r"row 1: turn 1: '\[/INST\]' is a turn marker of this model, and plain text"):
        conversations.load_sft(DataConfig(train=path), llama2)
    data = conversations.load_sft(DataConfig(train=path, on_forged_marker="allow"), llama2)
    assert data.counts["forged_markers"] == 1
    assert data.warnings == ["1 turn markers inside content"]


def test_samples_of_other_kinds() -> None:
    pairs = audit.load_samples(DataConfig(train="builtin:preference"), "preference")
    assert isinstance(pairs[0], Preference)
    assert len(audit.load_samples(DataConfig(train="builtin:ranked"), "preference", encoder=encoder())) == 4
    assert len(audit.load_samples(DataConfig(train="builtin:unpaired"), "unpaired", encoder=encoder())) == 2
    assert len(audit.load_samples(DataConfig(train="builtin:text"), "text")) == 3


def test_rows_for_generation(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "only asked"}, {"prompt": "q", "completion": "a"}])
    rows = held_out.load_eval_rows(path, DataConfig(train="-"))
    assert [row.messages for row in rows] == [[user("only asked")], [user("q"), assistant("a")]]
    bad = write(tmp_path / "y.jsonl", [{"messages": [system("s"), assistant("a")]}])
    with pytest.raises(UserError, match="row 1: turn 2: the conversation begins with the assistant"):
        held_out.load_eval_rows(bad)


def test_the_shipped_task_loads() -> None:
    data = load("builtin:tickets/train", max_samples=100)
    assert len(data.train) == 100


SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL = {
    "alpaca_zh_demo.json": 1000,
    "alpaca_en_demo.json": 999,
    "glaive_toolcall_zh_demo.json": 300,
    "gsm8k_test.jsonl": 1319,
}


@pytest.mark.parametrize("file", REAL)
def test_files_that_nobody_here_wrote(file: str) -> None:
    if not (SHARED / file).is_file():
        pytest.skip("the file is not here")
    data = load(str(SHARED / file), max_length=16384)
    assert data.counts["used"] == REAL[file]
    assert data.counts["dropped"] == data.counts["truncated"] == 0


def test_pairs_that_nobody_here_wrote() -> None:
    if not (SHARED / "dpo_zh_demo.json").is_file():
        pytest.skip("the file is not here")
    config = DataConfig(train=str(SHARED / "dpo_zh_demo.json"), max_length=32768)
    assert len(audit.load_samples(config, "preference", encoder=encoder())) == 300
    with pytest.raises(
        UserError, match=r"the rows are preference data \(preference\), but this stage needs sft data → use ft dpo"
    ):
        load(str(SHARED / "dpo_zh_demo.json"))


def test_a_shipped_template_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", make_rows(2))
    data = conversations.load_sft(DataConfig(train=path), chat.make_encoder(byte_level(None)))
    assert data.warnings == ["chat format: the shipped template plain.jinja (the tokenizer has none)"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "tokenising 9 rows of x.jsonl"),
        ({"max_samples": 4}, "tokenising 4 rows of x.jsonl"),
        ({"train": ["{path}", "{path}"]}, "tokenising 18 rows of x.jsonl, x.jsonl"),
        ({"train": {"path": "{path}", "filter": {"a": 1}}}, "tokenising x.jsonl"),
    ],
)
def test_reading_says_what_and_how_much(
    settings: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.jsonl", make_rows(9))
    filled = json.loads(json.dumps({"train": "{path}", **settings}).replace("{path}", path))
    assert list(samples.watched(iter(range(9)), DataConfig(**filled))) == list(range(9))
    assert capsys.readouterr().err.splitlines() == [said]


def test_counts_can_be_written_as_json(tmp_path: Path) -> None:
    json.dumps(load(write(tmp_path / "x.jsonl", make_rows(2)), eval_split=1).counts)


def test_a_cache_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a home that cannot be written to, the cache lives as long as the process."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert cache.cache_folder.__wrapped__() == tmp_path / "cache" / "finetune"
    monkeypatch.setenv("HF_DATASETS_CACHE", "/dev/null/cache")
    found = cache.cache_folder.__wrapped__()
    assert found.is_dir()
    assert found.name.startswith("ft-cache-")


def sides(path: str, **settings: Any) -> tuple[set[str], set[str]]:
    """(train, held out): what stands in the brackets of each row's question."""
    data = load(path, **settings)
    train, held = (
        {encoder().tokenizer.decode(row["input_ids"]).split("[")[1].split("]")[0] for row in rows}
        for rows in (data.train, data.eval or [])
    )
    return train, held


def test_the_same_question_in_other_words_of_the_system_stays_on_one_side(tmp_path: Path) -> None:
    """With another system turn, spacing, case, width or closing mark, and however far the conversation goes on."""

    def row(number: int, form: int) -> dict[str, Any]:
        asked = f"What is [{number}]"
        forms = [
            [user(asked), assistant("a")],
            [system("Be kind."), user(asked), assistant("b")],
            [user(f"{asked} "), assistant("c")],
            [user(f"  what  IS [{number}] ?"), assistant("d")],
            [user(f"Ｗhat is [{number}]。"), assistant("e")],
            [system("Be short."), user(asked), assistant("f"), user("And why?"), assistant("g")],
        ]
        return {"messages": forms[form]}

    rows = [row(number, form) for number in range(60) for form in range(6)]
    for share in (0.3, 40):
        train, held = sides(write(tmp_path / "x.jsonl", rows), eval_split=share)
        assert held
        assert not train & held


def test_rows_of_one_question_are_not_all_taken_or_left_by_a_weight(tmp_path: Path) -> None:
    rows = [{"messages": [user("go on"), assistant(f"answer {i}")]} for i in range(400)]
    data = load([SourceConfig(path=write(tmp_path / "x.jsonl", rows), weight=0.5)])
    assert 150 < len(data.train) < 250


def test_a_split_that_is_far_from_what_was_asked_is_told(tmp_path: Path) -> None:
    same = write(tmp_path / "x.jsonl", [{"messages": [user("go on"), assistant(f"answer {i}")]} for i in range(400)])
    with pytest.raises(UserError, match="every row is held out"):  # one question stays on one side
        load(same, eval_split=0.05)
    for alike, told in ((6, False), (7, True)):  # answers to each question; one row was asked for
        rows = [{"messages": [user(f"q {i // alike}"), assistant(f"answer {i}")]} for i in range(alike * 40)]
        found = load(write(tmp_path / "z.jsonl", rows), eval_split=1)
        assert len(found.eval) == alike
        line = f"holds out {alike} of {alike * 40} rows: rows with the same first question stay together"
        assert found.warnings == ([f"data.eval_split {line}"] if told else [])
    assert load(write(tmp_path / "y.jsonl", make_rows(400)), eval_split=0.05).warnings == []


def test_truncation_never_trains_half_a_character(tmp_path: Path) -> None:
    rows = [{"messages": [user("q"), assistant(word * 40)]} for word in ("你", "é", "🙂", "a你")]
    path = write(tmp_path / "x.jsonl", rows)
    for length in range(40, 48):
        for row in load(path, max_length=length).train:
            assert length - 3 <= len(row["input_ids"]) <= length
            assert "\ufffd" not in encoder().tokenizer.decode(row["input_ids"])
            assert len(row["labels"]) == len(row["input_ids"])


def test_a_row_whose_only_trained_token_is_half_a_character_is_left_out(tmp_path: Path) -> None:
    row = {"messages": [user("q"), assistant("你好")]}
    start = len(encoder().prompt_ids([user("q")]))
    data = load(write(tmp_path / "x.jsonl", [*make_rows(30), row]), max_length=200)
    assert data.counts["cut_away"] == 0
    from finetune.data.audit import Audit

    found = Audit(DataConfig(train=write(tmp_path / "y.jsonl", [row]), max_length=start + 2), encoder())
    assert list(found.rows()) == []
    assert found.counts["cut_away"] == 1


def test_a_replacement_character_of_the_user_is_no_half_character(tmp_path: Path) -> None:
    row = {"messages": [user("q"), assistant("\ufffd" * 40)]}
    assert len(load(write(tmp_path / "x.jsonl", [row]), max_length=44).train[0]["input_ids"]) > 40
