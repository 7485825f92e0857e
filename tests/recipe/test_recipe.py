"""Recipes: every mistake is one line with the place and the fix; resolve is complete and pure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from finetune.errors import UserError
from finetune.recipe import file, reading
from finetune.recipe.resolve import Hardware, batch_layout, compute_dtype, resolve
from finetune.recipe.stages import RECIPES, SftRecipe

GOOD = """\
version: 1
stage: sft
model: {name: tiny-llama}
data: {train: builtin:tickets/train}
output: {dir: runs/x}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> SftRecipe:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return file.load(str(path), SftRecipe, overrides)


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return "\n".join(caught.value.lines())


@pytest.mark.parametrize(
    ("section", "key", "advice"),
    [
        ("adapter", "lora_rank", "adapter.r"),
        ("adapter", "lora_target", "adapter.target_modules"),
        ("data", "cutoff_len", "data.max_length"),
        ("data", "sequence_len", "data.max_length"),
        ("data", "sample_packing", "data.packing"),
        ("data", "val_size", "data.eval_split"),
        ("model", "model_name_or_path", "model.name"),
        ("train", "warmup_ratio", "train.warmup_steps"),
        ("train", "micro_batch_size", "train.per_device_train_batch_size"),
        ("train", "learning_ratee", "did you mean learning_rate?"),
        ("train", "max_length", "data.max_length"),
        ("data", "learning_rate", "train.learning_rate"),
    ],
)
def test_unknown_keys_are_translated(tmp_path: Path, section: str, key: str, advice: str) -> None:
    kept = {"model": "name: tiny-llama\n  ", "data": "train: x\n  "}.get(section, "")
    lines = [line for line in GOOD.splitlines() if not line.startswith(section)]
    text = "\n".join([*lines, f"{section}:", f"  {kept}{key}: 1"])
    message = complaint(tmp_path, text)
    assert f"{section}.{key}: unknown key" in message
    assert advice in message
    assert f"line {len(text.splitlines())}" in message
    assert str(tmp_path / "r.yaml") in message


def test_top_level_key_of_another_tool(tmp_path: Path) -> None:
    assert "here it is called adapter.r" in complaint(tmp_path, GOOD + "lora_rank: 8\n")
    assert "here it is called output.dir" in complaint(tmp_path, GOOD + "output_dir: 8\n")


def test_all_problems_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, GOOD + "train: {learning_rate: fast, seed: x, lr_scheduler_type: cosin}\nfoo: 1\n")
    assert len(message.splitlines()) == 4
    assert "train.learning_rate: 'fast' is not possible here" in message
    assert "did you mean cosine?" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("version: 1\nstage: sft\nmodel: {name: [\n", "line"),
        ("version: 1\n\tstage: sft\n", "line 2: not readable as YAML"),
        ("- a\n- b\n", "not a mapping of sections"),
        ("", "not a mapping of sections"),
        (GOOD + "model: {name: other}\n", "line 6: model: key stands twice"),
        (GOOD.replace("stage: sft", "stage: sfft"), "stage: unknown stage 'sfft' → did you mean sft?"),
        (GOOD.replace("stage: sft\n", ""), "stage: missing"),
        (GOOD.replace("version: 1\n", ""), "version: version None is not known"),
        (GOOD.replace("version: 1", "version: 2"), "version: version 2 is not known"),
        (GOOD.replace("stage: sft", "stage: pretrain"), "this is a recipe for `ft pretrain`, not `ft sft`"),
        (GOOD.replace("output: {dir: runs/x}\n", ""), "output: missing"),
        (GOOD + "adapter: {method: lorra}\n", "adapter.method: unknown adapter method 'lorra'"),
        (GOOD + "adapter: {r: 0}\n", "adapter.r: 0 is not possible here"),
        (GOOD + "adapter: {method: bitfit, r: 4}\n", "adapter.r: unknown key → it belongs to another adapter.method"),
        (GOOD + "train: {max_steps: 1.5}\n", "train.max_steps: 1.5 is not possible here"),
        (GOOD + "train: {packing: true}\n", "it belongs into data: data.packing"),
        (
            GOOD + "train: {per_device_train_batch_size: 3, gradient_accumulation_steps: 2}\n",
            "3 x gradient_accumulation_steps 2 is 6, and no effective_batch_size of 16",
        ),
    ],
)
def test_broken_recipes(tmp_path: Path, text: str, expected: str) -> None:
    message = complaint(tmp_path, text)
    assert expected in message
    assert str(tmp_path / "r.yaml") in message


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("名: 1".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8"):
        file.load(str(path), SftRecipe)


def test_missing_recipe_suggests_a_shipped_one() -> None:
    with pytest.raises(UserError, match=r"did you mean the shipped recipe quickstart.yaml"):
        file.load("quickstrt", SftRecipe)


def test_overrides(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "train.learning_rate=2e-4", "adapter.r=4", "adapter.target_modules=[q_proj, v_proj]")
    assert recipe.train.learning_rate == 2e-4
    assert recipe.adapter.method == "lora"
    assert recipe.adapter.r == 4
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert "--set: train.learning_rat: unknown key" in complaint(tmp_path, GOOD, "train.learning_rat=1")
    assert "not of the form key=value" in complaint(tmp_path, GOOD, "train.learning_rate")
    assert "stage is not a section" in complaint(tmp_path, GOOD, "stage.x=1")


def test_yaml_reads_plain_exponents_as_numbers(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + "train: {learning_rate: 2e-4}\n").train.learning_rate == 2e-4


def test_byte_order_mark(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + GOOD).model.name == "tiny-llama"


def test_resolve_is_complete_and_stable(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    machine = Hardware("cpu", True, 24.0)
    resolved = resolve(recipe, machine)
    assert Path(resolved.output.dir).is_absolute()
    assert resolved.model.dtype == "bfloat16"
    assert resolve(resolved, machine) == resolved
    again = tmp_path / "resolved.yaml"
    again.write_text(file.to_yaml(resolved), encoding="utf-8")
    assert file.load(str(again), SftRecipe) == resolved


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        (Hardware("cuda", True), "bfloat16"),
        (Hardware("cuda", False), "float16"),  # T4, V100
        (Hardware("cpu", True), "bfloat16"),
        (Hardware("cpu", False), "float32"),
        (Hardware("mps", False), "float32"),
    ],
)
def test_precision_follows_the_hardware(hardware: Hardware, dtype: str) -> None:
    assert compute_dtype("auto", hardware) == dtype
    assert compute_dtype("float32", hardware) == "float32"


@pytest.mark.parametrize("effective", [1, 5, 16, 24, 60])
@pytest.mark.parametrize("max_length", [64, 2048, 32768])
@pytest.mark.parametrize("processes", [1, 4])
def test_batch_layout_keeps_the_effective_size(tmp_path: Path, effective: int, max_length: int, processes: int) -> None:
    train = load(tmp_path, GOOD, f"train.effective_batch_size={effective}").train
    micro, accumulation = batch_layout(train, max_length, Hardware("cuda", True, 24.0, processes))
    assert micro * accumulation == max(1, effective // processes)


def test_schema_describes_every_key() -> None:
    definitions = file.schema()["$defs"]
    for name, definition in definitions.items():
        for key, value in definition.get("properties", {}).items():
            assert value.get("description"), f"{name}.{key} has no description"
    assert set(RECIPES) == {"pretrain", "sft", "reward", "dpo", "kto", "ppo"}


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.output.dir = "elsewhere"  # type: ignore[misc]


SHIPPED = reading.shipped()


def test_schema_beside_the_recipes_is_current() -> None:
    """Editors read it; `ft recipes schema > recipes/ft-recipe.schema.json` writes it."""
    path = next(iter(SHIPPED.values())).parent / "ft-recipe.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == file.schema()


def test_number_of_shipped_recipes() -> None:
    assert len(SHIPPED) == 42


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_loads(name: str) -> None:
    text = SHIPPED[name].read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    first, second = text.splitlines()[:2]
    assert second == "# $schema: ft-recipe.schema.json"
    assert first.startswith(f"# ft {values['stage']} --recipe {name}  "), (
        "headed by its command and the hardware it needs"
    )
    recipe = file.load(name, RECIPES[values["stage"]])
    resolve(recipe, Hardware())
    if "config" not in values["model"]:
        assert 7 <= len(text.splitlines()) <= 25


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("pretrain")])
def test_shipped_recipe_fits_a_run_of_any_length(name: str) -> None:
    """`--set data.train=mine.json`, `--set train.max_steps=5`: the warm-up is a share, and no more than the run."""
    stage = yaml.safe_load(SHIPPED[name].read_text(encoding="utf-8"))["stage"]
    assert file.load(name, RECIPES[stage]).train.warmup_steps < 1


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
         "4 x gradient_accumulation_steps 2 is 8, and no effective_batch_size of 16; set effective_batch_size: 8"),
        ({"per_device_train_batch_size": 3}, "batch_size: 3 does not divide effective_batch_size of 16"),
        ({"per_device_train_batch_size": 32}, "32 does not divide"),
        ({"gradient_accumulation_steps": 3}, "steps: 3 does not divide effective_batch_size of 16"),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, None),
        ({"gradient_accumulation_steps": 8}, None),
        ({"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 5}, "5 is no multiple of eval_steps 3"),
        ({"load_best_model_at_end": True, "eval_steps": 3, "save_steps": 6}, None),
        ({"learning_rate": ".inf"}, "train.learning_rate"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(tmp_path: Path, train: dict[str, object], expected: str | None) -> None:
    settings = [f"train.{key}={value}" for key, value in train.items()] + ["data.eval_split=0.1"]
    if expected is None:
        loaded = load(tmp_path, GOOD, *settings)
        micro, accumulation = batch_layout(loaded.train, loaded.data.max_length, Hardware())
        assert micro * accumulation == loaded.train.effective_batch_size
    else:
        assert expected in complaint(tmp_path, GOOD, *settings)


def test_minibatches_of_ppo_are_counted_alike(tmp_path: Path) -> None:
    text = GOOD.replace("sft", "ppo") + "reward: {functions: [rule.py:score]}\n"
    (tmp_path / "r.yaml").write_text(text)
    sizes = ("train.effective_batch_size=64", "ppo.num_mini_batches=4")
    with pytest.raises(UserError, match=r"32 does not divide effective_batch_size / ppo\.num_mini_batches"):
        file.load(str(tmp_path / "r.yaml"), None, [*sizes, "train.per_device_train_batch_size=32"])
    file.load(str(tmp_path / "r.yaml"), None, [*sizes, "train.per_device_train_batch_size=8"])
    file.load(str(tmp_path / "r.yaml"), None, [*sizes, "train.per_device_train_batch_size=3"])  # the last has one


def test_the_best_model_is_evaluated_where_it_is_saved(tmp_path: Path) -> None:
    best = ("train.load_best_model_at_end=true", "data.eval_split=4")
    for key, other in (("eval_steps", "save_steps"), ("save_steps", "eval_steps")):
        train = resolve(load(tmp_path, GOOD, *best, f"train.{key}=3"), Hardware()).train
        assert getattr(train, other) == 3
    train = resolve(load(tmp_path, GOOD, "train.eval_steps=3", "data.eval_split=4"), Hardware()).train
    assert train.save_steps is None


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("section", ["", "adapter: {}\n", "adapter:\n", "adapter: {r: 8}\n"])
def test_an_adapter_without_a_method_is_the_stages_own(tmp_path: Path, stage: str, section: str) -> None:
    text = GOOD.replace("sft", stage) + section + ("reward: {model: x}\n" if stage == "ppo" else "")
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    if stage == "pretrain" and "r: 8" in section:
        with pytest.raises(UserError, match=r"adapter\.r: unknown key"):
            file.load(str(tmp_path / "r.yaml"), None)
        return
    adapter = file.load(str(tmp_path / "r.yaml"), None).adapter
    assert adapter.method == ("full" if stage == "pretrain" else "lora")
    assert getattr(adapter, "r", 16) == (8 if "r: 8" in section else 16)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("q_proj", ["q_proj"]), ("'q_proj, v_proj'", ["q_proj", "v_proj"]), ("self_attn.q_proj", ["self_attn.q_proj"]),
        ("all-linear", "all-linear"), (r"'.*\.(q|v)_proj'", r".*\.(q|v)_proj"), ("[q_proj]", ["q_proj"]),
    ],
)  # fmt: skip
def test_a_name_as_text_is_that_module(tmp_path: Path, written: str, expected: object) -> None:
    adapter = load(tmp_path, GOOD + f"adapter: {{target_modules: {written}, modules_to_save: lm_head}}\n").adapter
    assert adapter.target_modules == expected
    assert adapter.modules_to_save == ["lm_head"]


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "line 4: not readable as YAML: more than 20,000 values"),
        ("data: &d {train: *d}\n", "line 1: not readable as YAML: an alias stands inside what it names"),
        ("data: &d [1, *d]\n", "an alias stands inside"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "[" * 900 + "]" * 900, ""),
        ("a: " + "9" * 5000, "not readable as YAML"),
        ("a: 2024-13-45\n", "not readable as YAML"),
        ("a: \x00\n", "not readable as YAML"),
        ("? [a, b]\n: 1\n", "not readable as YAML"),
        ("? {a: b}\n: 1\n", "not readable as YAML"),
        ("1: 2\n", "1 is no name of a section"),
        ("data: {\tx: 1\n", "line"),
        ("a: !!python/object:os.system x\n", "not readable as YAML"),
        ("just text", "not a mapping of sections"),
        ("x" * (2 << 20), "is larger than 1 MiB"),
        (GOOD + "data: {train: x}\n", "line 6: data: key stands twice"),
        (GOOD.replace("{train: builtin:tickets/train}", "{train: a, train: b}"), "data.train: key stands twice"),
        (GOOD + "train: {1: 2}\n", "train.1: 1 is not possible here"),
        (GOOD + "train: {null: 2}\n", "train"),
        (GOOD + "train: {[1]: 2}\n", "not readable as YAML"),
        (GOOD + "train: 5\n", "train"),
        (GOOD + "train: [1]\n", "train"),
        (GOOD.replace("{name: tiny-llama}", ""), "model"),
    ],
)
def test_no_file_is_too_odd(tmp_path: Path, text: str, expected: str) -> None:
    said = complaint(tmp_path, text)
    assert expected in said
    assert str(tmp_path / "r.yaml") in said


def test_an_alias_is_what_it_names_and_no_more(tmp_path: Path) -> None:
    text = GOOD.replace("{train: builtin:tickets/train}", "{train: &t builtin:tickets/train}") + "eval: {data: *t}\n"
    assert load(tmp_path, text).eval.data == "builtin:tickets/train"
    shared = GOOD + "train: &t {}\neval: *t\n"
    assert load(tmp_path, shared, "train.max_steps=3").train.max_steps == 3


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 5000, "9" * 5000])
def test_set_takes_no_bombs_either(tmp_path: Path, value: str) -> None:
    assert "train.max_steps" in complaint(tmp_path, GOOD, f"train.max_steps={value}")


def test_a_recipe_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        file.load(str(tmp_path / "r.yaml"), SftRecipe)


def test_keys_without_effect_stand_with_their_line(tmp_path: Path) -> None:
    said = complaint(tmp_path, GOOD + "train:\n  lr_scheduler_type: linear\n  lr_min_ratio: 0.1\n")
    assert "line 8: train.lr_min_ratio: this schedule has no floor → set train.lr_scheduler_type" in said
    assert "--set: train.eval_steps: no rows are held out" in complaint(tmp_path, GOOD, "train.eval_steps=3")
    off = ("train.load_best_model_at_end=false", "train.early_stopping_patience=null", "data.packing=false")
    load(tmp_path, GOOD, *off)  # what is so without them, too


def test_a_resolved_recipe_can_be_run_again(tmp_path: Path) -> None:
    """It holds every default, less those that do nothing beside its other keys."""
    for name in SHIPPED:
        recipe = resolve(file.load(name, None), Hardware())
        text = file.to_yaml(recipe)
        (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
        again = resolve(file.load(str(tmp_path / "again.yaml"), None), Hardware())
        assert file.to_yaml(again) == text
        assert again == recipe


def test_held_out_data_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = resolve(load(tmp_path, GOOD + "eval: {data: 'test*.jsonl'}\n"), Hardware())
    assert recipe.eval.data == str(tmp_path / "test*.jsonl")


def test_names_of_a_hub_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = GOOD.replace("name: tiny-llama", "name: owner/x, source: modelscope")
    recipe = resolve(load(tmp_path, text, "data.train={path: owner/x, source: modelscope}"), Hardware())
    assert recipe.model.name == "owner/x"
    assert recipe.data.train[0].path == "owner/x"  # type: ignore[union-attr]


@pytest.mark.parametrize("stage", ["[sft]", "{a: 1}", "5", "null"])
def test_a_stage_that_is_no_name(tmp_path: Path, stage: str) -> None:
    assert "stage: " in complaint(tmp_path, GOOD.replace("stage: sft", f"stage: {stage}"))
