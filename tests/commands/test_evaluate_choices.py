"""Multiple choice in the layouts of C-Eval, CMMLU and MMLU, and metrics by name, from files to figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED, ft, make_tokenizer, write_rows

from finetune.commands import evaluate
from finetune.data import choices as files
from finetune.data.chat import make_encoder
from finetune.data.held_out import rows_of
from finetune.errors import UserError
from finetune.evaluation import choices, generation, likelihood, measuring, targets
from finetune.metrics import METRICS
from finetune.recipe.sections import DataConfig, ModelConfig

CEVAL = "id,question,A,B,C,D,answer,explanation\n"
CMMLU = ",Question,A,B,C,D,Answer\n"


def ceval(folder: Path) -> Path:
    """Two subjects; dev has explanations, test no answers, and one question spans lines."""
    for split in ("dev", "val", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    for subject, sums in (("physics", (1, 2, 3)), ("art_studies", (4, 5))):
        lines = "".join(f'{i},"{n}加1\n等于?",{n},{n + 1},{n + 2},{n + 3},{"BBA"[i]},\n' for i, n in enumerate(sums))
        (folder / "val" / f"{subject}_val.csv").write_text("\ufeff" + CEVAL + lines, encoding="utf-8")
        shots = "".join(f'{i},"{i}加{i}等于?",{2 * i},7,8,9,A,"因为, 如此"\n' for i in range(5))
        (folder / "dev" / f"{subject}_dev.csv").write_text(CEVAL + shots, encoding="utf-8")
        (folder / "test" / f"{subject}_test.csv").write_text("id,question,A,B,C,D\n0,1加1,1,2,3,4\n", encoding="utf-8")
    names = {"physics": ["Physics", "物理", "STEM"]}
    (folder / "subject_mapping.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def mmlu(folder: Path) -> Path:
    for split, count in (("dev", 5), ("test", 4), ("val", 2), ("auxiliary_train", 3)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = "".join(f'"What is {i}, plus one?",{i},{i + 1},7,8,B\n' for i in range(count))
        name = "anything" if split == "auxiliary_train" else f"abstract_algebra_{split}"
        (folder / split / f"{name}.csv").write_text(lines, encoding="utf-8")
    return folder


def cmmlu(folder: Path) -> Path:
    for split, count in (("dev", 5), ("test", 3)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{i},{i}加一等于,{i},{i + 1},七,八,B\n" for i in range(count))
        (folder / split / "agronomy.csv").write_text(CMMLU + lines, encoding="utf-8")
    return folder


@pytest.mark.parametrize("published", [ceval, cmmlu, mmlu])
def test_each_published_layout(tmp_path: Path, published: Any) -> None:
    folder = published(tmp_path / "a folder")
    held = rows_of(str(folder), DataConfig(train="-"), None)
    split, counts, layout = {
        "ceval": ("val", {"art_studies": 2, "physics": 3}, "ceval"), "cmmlu": ("test", {"agronomy": 3}, "cmmlu"),
        "mmlu": ("test", {"abstract_algebra": 4}, "mmlu"),
    }[published.__name__]  # fmt: skip
    assert held.kind == "choices"
    assert {group: sum(row.group == group for row in held.rows) for group in held.shots} == counts
    assert {Path(row.file).parent.name for row in held.rows} == {split}
    assert {row.sample.layout for row in held.rows} == {layout}
    assert [len(shots) for shots in held.shots.values()] == [5] * len(counts)
    assert [row.sample.reference for row in held.rows][:2] == ["B", "B"]
    assert len(rows_of(str(folder), DataConfig(train="-"), 1).rows) == len(counts), "the first of each subject"
    one = rows_of(held.rows[0].file, DataConfig(train="-"), None)
    assert len(one.shots[str(held.rows[0].group)]) == 5, "a single file finds the shots of its subject, too"


def test_prompts_are_the_published_ones(tmp_path: Path) -> None:
    asked = {layout: files.Choice("q", ("x", "y"), 1, layout, "物理") for layout in choices.LAYOUTS}

    class Letters:
        eos_token_id = None

        def encode(self, text: str) -> list[int]:
            return [ord(c) for c in text]

    def text(layout: str, listed: bool = True, shots: int = 1) -> tuple[str, list[str]]:
        before, options = choices.as_published(Letters(), asked[layout], [asked[layout]] * shots, listed)
        return "".join(map(chr, before)), ["".join(map(chr, ids)) for ids in options]

    assert text("ceval") == (
        "以下是中国关于物理考试的单项选择题，请选出其中的正确答案。\n\n"
        "q\nA. x\nB. y\n答案：B\n\nq\nA. x\nB. y\n答案：", ["A", "B"],
    )  # fmt: skip
    assert text("cmmlu", shots=0) == (
        "以下是关于物理的单项选择题，请直接给出正确答案的选项。\n\n题目：q\nA. x\nB. y\n答案是：", ["A", "B"],
    )  # fmt: skip
    assert text("mmlu") == (
        "The following are multiple choice questions (with answers) about 物理.\n\n"
        "q\nA. x\nB. y\nAnswer: B\n\nq\nA. x\nB. y\nAnswer:", [" A", " B"],
    )  # fmt: skip
    assert text("mmlu", listed=False, shots=0) == (
        "The following are questions (with answers) about 物理.\n\nq\nAnswer:",
        [" x", " y"],
    )


def test_a_token_across_the_border_belongs_to_the_options() -> None:
    """：A may be one token where ：B is two: compared is what follows the last token that all have in common."""
    assert choices.parted([1, 2, 9], [[1, 2, 7], [1, 2, 9, 8]]) == ([1, 2], [[7], [9, 8]])
    assert choices.parted([1, 2, 9], [[1, 2, 9, 5], [1, 2, 9, 6, 6]]) == ([1, 2, 9], [[5], [6, 6]])
    assert choices.parted([1, 2, 9], [[1, 2], [1, 2, 9, 6]]) == ([1], [[2], [2, 9, 6]]), "never an option of no token"


def plain_scores(model: Any, before: Sequence[int], options: Sequence[Sequence[int]]) -> list[float]:
    scores = []
    for ids in options:
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *ids]])).logits[0].float().log_softmax(-1)
        scores.append(sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(ids)))
    return scores


def test_scores_equal_a_plain_loop(base: Path) -> None:
    """Options of one token and of several, prompts of all lengths in a batch."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    drawn = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, 200, (n,), generator=drawn).tolist()  # noqa: E731
    asked = [(ids(5 + 7 * i), [ids(1 + (j if i % 2 else 0)) for j in range(4)]) for i in range(9)]
    asked.append((ids(30), [[7, 8, 9], [7, 8, 3], [7, 8, 9, 9], [5]]))
    done: list[int] = []
    found = choices.log_likelihoods(model, asked, 0, 4, done.append)
    assert sum(done) == len(asked)
    for (before, options), scores in zip(asked, found, strict=True):
        assert scores == pytest.approx(plain_scores(model, before, options), abs=1e-4)


def test_a_chat_model_is_asked_in_turns() -> None:
    encoder = make_encoder(make_tokenizer())
    shot, one = (files.Choice(q, ("x", "yy"), 1, "mmlu", "art") for q in ("p", "q"))
    before, options = choices.as_conversation(encoder, one, [shot], True)
    assert encoder.tokenizer.decode(before) == (
        "<|im_start|>user\nThe following are multiple choice questions (with answers) about art.\n\n"
        "p\nA. x\nB. yy\nAnswer:<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
        "<|im_start|>user\nq\nA. x\nB. yy\nAnswer:<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [encoder.tokenizer.decode(ids) for ids in options] == ["A", "B"], "without the end of the turn"
    _, options = choices.as_conversation(encoder, one, [], False)
    assert [encoder.tokenizer.decode(ids) for ids in options] == ["x", "yy"]


def test_accuracy_of_a_folder(base: Path, tmp_path: Path) -> None:
    """Figures, rows and intervals against a loop over the prompts with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.metrics import wilson

    folder, out, lines = ceval(tmp_path / "C-Eval"), tmp_path / "out.json", tmp_path / "rows.jsonl"
    named = ["choice_accuracy", "choice_accuracy_macro", "choice_accuracy_full"]
    evaluate.run(
        [], model=str(base), data=str(folder), json_file=str(out), predictions=str(lines), named=named, shots=1
    )
    found = json.loads(out.read_text())
    figures = found["runs"][0]["metrics"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    encoder, right = make_encoder(tokenizer), {"letter": [], "full": []}  # type: ignore[var-annotated]
    held = rows_of(str(folder), DataConfig(train="-"), None)
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    for row, values in zip(held.rows, written, strict=True):
        for kind in right:
            asked = choices.as_conversation(encoder, row.sample, held.shots[str(row.group)][:1], kind == "letter")
            sizes = [1] * 4 if kind == "letter" else [len(option) for option in row.sample.options]
            scores = [s / n for s, n in zip(plain_scores(model, *asked), sizes, strict=True)]
            assert [*values[f"{kind}_scores"].values()] == pytest.approx(
                scores, abs=0.02
            )  # bfloat16 where there is one
            best = max(values[f"{kind}_scores"], key=values[f"{kind}_scores"].get)
            right[kind].append(best == row.sample.reference)
        assert values["prediction"] == max(values["letter_scores"], key=values["letter_scores"].get)
        assert values["correct"] == (values["prediction"] == values["reference"])
    hits = sum(right["letter"])
    assert figures["choice_accuracy"] == pytest.approx(hits / 5)
    assert figures["choice_accuracy_ci"] == pytest.approx(list(wilson(hits, 5)))
    assert figures["choice_accuracy_full"] == pytest.approx(sum(right["full"]) / 5)
    subjects = [figures["choice_accuracy/art_studies"], figures["choice_accuracy/physics"]]
    assert figures["choice_accuracy_macro"] == pytest.approx(sum(subjects) / 2)
    assert (found["shots"], found["runs"][0]["generation"]["prompt"]) == (1, "chat template")


def test_a_model_without_a_chat_template_is_asked_as_published(base: Path, tmp_path: Path) -> None:
    import shutil

    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    out = tmp_path / "out.json"
    evaluate.run([], model=str(plain), data=str(mmlu(tmp_path / "mmlu")), json_file=str(out), limit=2)
    found = json.loads(out.read_text())
    assert found["runs"][0]["generation"] == {"shots": 5, "prompt": "as published"}
    assert found["runs"][0]["n"] == 2


def test_shots_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    folder = mmlu(tmp_path / "mmlu")
    held = rows_of(str(folder), DataConfig(train="-"), None)
    encode = lambda shots: ([0] * (10 + 5 * len(shots)), [[1]])  # noqa: E731
    shots = held.shots["abstract_algebra"]
    assert choices.fitting(encode, shots, None, held.rows[0])[1] == 5
    assert choices.fitting(encode, shots, 26, held.rows[0])[1] == 3
    with pytest.raises(UserError, match=r"_test\.csv, row 1: the question alone"):
        choices.fitting(encode, shots, 10, held.rows[0])
    assert (choices.shots_of(held, None), choices.shots_of(held, 2)) == (5, 2)
    with pytest.raises(UserError, match=r"--shots: .*abstract_algebra has 5 questions, and 6 shots"):
        choices.shots_of(held, 6, "--shots")


def test_questions_with_fewer_shots_are_counted_once(base: Path, tmp_path: Path) -> None:
    """However many metrics ask for them: by letter and by text none of the four has room for five."""
    base_of = measuring.Base.open(ModelConfig(name=str(base), dtype="float32"))
    model = measuring.load_model(targets.model_target(str(base)))
    held = rows_of(str(mmlu(tmp_path / "mmlu")), DataConfig(train="-"), None)
    which = [m for m in METRICS if m.name in ("choice_accuracy", "choice_accuracy_full")]
    found = choices.evaluate("x", model, base_of.tokenizer, base_of.encoder, held, 5, 8, 300, which)
    assert found.notes == ["4 questions are asked with fewer shots: with 5 they have over 300 tokens"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (CEVAL + "0,q,1,2,3,4,E,\n", r"x_val\.csv, row 1: the answer 'E' is none of A, B, C, D"),
        (CEVAL + "0,q,1,2,3,4,B,\n1,q,1,,3,4,A,\n2,,1,2,3,4,A,\n", r"row 2: an option is[\s\S]*row 3: the question"),
        (CEVAL + "0,q,1,2,3,4,B,\n1,q,1,2\n", r"row 2: 4 cells are too few"),
        (CEVAL + "0,q,1,2,3,4,B,\n1,q,1,2,3,4,,\n", r"row 2: has no answer"),
        ("id,question,A,B,C,D\n0,q,1,2,3,4\n", "has no answers.*C-Eval publishes its test set without.*val split"),
        (CEVAL, "a header and no question"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_measured(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x_val.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        rows_of(str(tmp_path / "x_val.csv"), DataConfig(train="-"), None)


def test_a_test_set_without_answers_is_named(tmp_path: Path) -> None:
    folder = ceval(tmp_path / "c")
    with pytest.raises(UserError, match="has no answers"):
        rows_of(str(folder / "test"), DataConfig(train="-"), None)
    (tmp_path / "c" / "val" / "physics_val.csv").write_bytes((CEVAL + "0,中,1,2,3,4,B,\n").encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8"):
        rows_of(str(folder), DataConfig(train="-"), None)


def test_other_csv_files_are_not_multiple_choice(tmp_path: Path) -> None:
    for name, content in {"qa": "question,answer\nq,a\n", "abc": "A,B,C\n1,2,3\n", "short": "a,b,A\n"}.items():
        (tmp_path / f"{name}.csv").write_text(content)
        assert not files.is_choices(tmp_path / f"{name}.csv")
    assert not files.is_choices(tmp_path)
    assert not files.is_choices("builtin:tickets/test")


def test_leakage_finds_questions_of_multiple_choice(tmp_path: Path) -> None:
    from finetune.data.leakage import HeldOut
    from finetune.data.samples import held_out_section
    from finetune.data.types import Conversation

    folder = mmlu(tmp_path / "mmlu")
    question = files.read(folder / "test" / "abstract_algebra_test.csv")[1].sample.prompt_text
    trained = [Conversation([{"role": "user", "content": text}]) for text in ("another", question)]
    ((row, finding),) = HeldOut(held_out_section(str(folder))).findings(trained)
    assert row == 1
    assert "abstract_algebra_test.csv, row 2" in finding.message


# --- metrics by name ---


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    rows = [{"question": f"{n} + 1?", "answer": f"{n}+1\n#### {n + 1}", "level": n} for n in range(999, 1003)]
    return write_rows(tmp_path / "sums.jsonl", rows)


def test_numbers_are_measured_by_themselves(
    base: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["1,000.0", " so 1001\n", "#### 7", "none"]
    monkeypatch.setattr(generation, "generate", lambda *_: said)
    out, lines = tmp_path / "out.json", tmp_path / "rows.jsonl"
    evaluate.run([], model=str(base), data=str(sums), json_file=str(out), predictions=str(lines))
    found = json.loads(out.read_text())["runs"][0]["metrics"]
    assert (found["number_match"], found["exact_match"]) == (0.5, 0)
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["prediction"] for row in written] == said, "as they were written"
    assert [row["correct"] for row in written] == [1, 1, 0, 0]
    printed = capsys.readouterr()
    assert "by the references also measured: number_match" in " ".join(printed.err.split())
    assert "exact match: white space at both ends does not count" in printed.out


def test_only_what_is_named_is_computed(
    base: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("nothing is to be computed here")

    out = str(tmp_path / "out.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate", never)
        evaluate.run([], model=str(base), data=str(sums), json_file=out, named=["loss", "token_accuracy"])
    found = json.loads(Path(out).read_text())["runs"][0]["metrics"]
    assert set(found) == {"loss", "loss_ci", "token_accuracy", "token_accuracy_ci", "weights_gb"}
    assert 0 <= found["token_accuracy_ci"][0] <= found["token_accuracy"] <= 1
    (tmp_path / "own.py").write_text("def f(prediction, reference, level):\n    return level\n")
    monkeypatch.setattr(generation, "negative_log_likelihoods", lambda _, rows, *__: never() if rows else [])
    named = [f"{tmp_path / 'own.py'}:f", "bleu"]
    evaluate.run([], model=str(base), data=str(sums), json_file=out, named=named)
    written = json.loads(Path(out).read_text())
    assert written["runs"][0]["metrics"]["own.py:f"] == pytest.approx(1000.5)
    assert written["runs"][0]["metrics"]["bleu_how"].startswith("sacrebleu ")
    assert "bleu" in written["normalises"]


def test_token_accuracy_is_the_share_of_most_probable_tokens(base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(base), [([5, 6, 7, 8], [-100, 6, 7, -100]), ([9, 4], [-100, 4])]
    for ids, labels in rows:
        best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        labels[1] = ids[1] = best[0]  # the next token is the most probable one
    found = likelihood.negative_log_likelihoods(model, rows, 0, 2)
    for (ids, labels), scored in zip(rows, found, strict=True):
        best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        right = sum(label == guess for label, guess in zip(labels[1:], best, strict=False))
        assert (scored.right, scored.tokens) == (right, sum(label != -100 for label in labels))
        assert right


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"named": ["reward"]}, "reward needs a reward model.*--reward RUN"),
        ({"named": ["loss"], "temperature": 0.5}, "--temperature: has no effect: none of the metrics needs answers"),
        ({"named": ["choice_accuracy"]}, "--metrics: choice_accuracy is measured on choices"),
        ({"named": ["field_accuracy"]}, "field_accuracy is of none of these rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    base: Path, sums: Path, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "load_model", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=said):
        evaluate.run([], model=str(base), data=str(sums), **options)


def test_names_from_the_command_line_and_the_recipe(base: Path, sums: Path, recipe: Any, tmp_path: Path) -> None:
    done = ft("eval", "--model", base, "--data", sums, "--metrics", "loss", "--metrics", "perplexity", "--json", "-")
    assert json.loads(done.stdout)["runs"][0]["metrics"].keys() >= {"loss", "perplexity"}
    path = recipe(eval={"data": str(sums), "metrics": "loss"})
    found = json.loads(ft("eval", "--recipe", path, "--json", "-").stdout)["runs"][0]["metrics"]
    assert set(found) == {"loss", "loss_ci", "weights_gb"}
    for command in (("sft", recipe(eval={"metrics": "los"})), ("eval", "--recipe", recipe(eval={"metrics": "los"}))):
        done = ft(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert "eval.metrics: no metric is called 'los' → did you mean loss?" in done.stderr


@pytest.mark.skipif(not (SHARED / "data" / "gsm8k_test.jsonl").exists(), reason="no GSM8K here")
def test_gsm8k_is_known_by_its_answers() -> None:
    from finetune.metrics import by_itself, numbers

    held = rows_of(str(SHARED / "data" / "gsm8k_test.jsonl"), DataConfig(train="-"), 200)
    found = [{"reference": row.sample.reference} for row in held.rows]
    assert by_itself("answers", found)[0].name == "number_match"
    marked = [row["reference"].partition("####")[2].strip().replace(",", "") for row in found]
    assert [numbers.final_number(row["reference"]) for row in found] == [int(number) for number in marked]
