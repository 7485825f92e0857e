# ruff: noqa: E501  (a case a line reads best)
"""A folder of what people give to ft by mistake: files of other tools, half files, files that are none; and many
command lines in one process, where torch cannot be imported."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import shlex
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import finetune

TABLE = Path(__file__).parent / "fixtures" / "bad_inputs.txt"
Case = tuple[str, str]


def cases() -> tuple[list[Case], list[Case]]:
    """(command line, what is said), of those that need no torch and of those that do."""
    found: tuple[list[Case], list[Case]] = ([], [])
    late = 0
    for block in TABLE.read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("#"):
            late |= block.startswith("# late")
            continue
        line, _, said = block.strip("\n").partition("\n")
        found[late].append((line.removeprefix("$ ft").strip(), said))
    return found


ROW = '{"instruction": "q", "output": "a"}\n'
HEAD = "version: 1\nstage: sft\n"
GOOD = HEAD + "model: {name: tiny-llama}\ndata: {train: rows.jsonl}\noutput: {dir: runs/new}\n"


def good(**lines: str) -> str:
    """The good recipe with lines in place of its own, or behind them."""
    kept = dict(line.split(": ", 1) for line in GOOD.splitlines())
    return "".join(f"{key}: {value}\n" for key, value in {**kept, **lines}.items())


# fmt: off
LLAMA_FACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
### output
output_dir: saves/llama3-8b/lora/sft
learning_rate: 1.0e-4
"""
AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
adapter: lora
sequence_len: 2048
sample_packing: true
lora_r: 16
micro_batch_size: 2
"""
SWIFT = """\
model: Qwen/Qwen2.5-7B-Instruct
train_type: lora
dataset: AI-ModelScope/alpaca-gpt4-data-zh#500
num_train_epochs: 1
lora_rank: 8
"""
RECIPES: dict[str, str | bytes] = {
    "mine.yaml": GOOD, "llamafactory.yaml": LLAMA_FACTORY, "axolotl.yaml": AXOLOTL, "swift.yaml": SWIFT,
    "tabs.yaml": HEAD + "model:\n\tname: tiny-llama\n",
    "utf16.yaml": GOOD.encode("utf-16"), "latin1.yaml": good(output="{dir: runs/café}").encode("latin-1"),
    "packed.yaml": gzip.compress(GOOD.encode(), mtime=0),
    "bom.yaml": codecs.BOM_UTF8 + good(train="{lr: 1}").encode(),
    "empty.yaml": "", "comment.yaml": "# nothing yet\n", "list.yaml": "- version: 1\n- stage: sft\n", "text.yaml": "hello\n",
    "recipe.json": json.dumps({"version": 1, "stage": "sft", "train": {}}), "cut.yaml": HEAD + "model: {name: tiny-llama\n",
    "two.yaml": GOOD + "---\n" + GOOD, "twice.yaml": GOOD + "data: {train: rows.jsonl}\n",
    "python.yaml": HEAD + "model: !!python/object/apply:os.system ['touch pwned']\n",
    "bomb.yaml": "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself.yaml": HEAD + "model: &m {name: *m}\n", "deep.yaml": HEAD + "model: " + "[" * 3000 + "]" * 3000 + "\n",
    "huge.yaml": good(train="{max_steps: " + "9" * 5000 + "}"), "large.yaml": GOOD + "#" * (1 << 20),
    "date.yaml": good(train="{seed: 2024-13-45}"), "nul.yaml": good(data='{train: "rows\\0.jsonl"}'), "control.yaml": b"version: 1\nstage: sft\x00\n",
    "no_version.yaml": GOOD.removeprefix("version: 1\n"), "version2.yaml": good(version="2"), "no_stage.yaml": GOOD.replace("stage: sft\n", ""),
    "stage.yaml": good(stage="sfft"), "dpo.yaml": good(stage="dpo"), "no_data.yaml": GOOD.replace("data: {train: rows.jsonl}\n", ""),
    "section_list.yaml": good(data="[rows.jsonl]"), "section_text.yaml": good(model="tiny-llama"), "section_null.yaml": good(output=""),
    "numbers.yaml": good(train='{learning_rate: "1e-4", max_steps: "20", effective_batch_size: 16.0}'),
    "yes.yaml": good(data='{train: rows.jsonl, packing: "yes"}'), "one.yaml": good(data="{train: rows.jsonl, packing: 1}"),
    "negative.yaml": good(train="{learning_rate: -1e-4, max_steps: 0, seed: -1, warmup_steps: -0.1, save_total_limit: 0}"),
    "nan.yaml": good(train="{learning_rate: .nan, weight_decay: .inf}"), "lora_huge.yaml": good(adapter="{method: lora, r: -8, lora_dropout: 1.5}"),
    "method.yaml": good(adapter="{method: qlora}"), "peft.yaml": good(adapter="{peft_type: LORA, task_type: CAUSAL_LM, r: 8}"),
    "packing.yaml": good(train="{packing: true}"), "spelled.yaml": good(train="{learning_rat: 1e-4}"),
    "remote.yaml": good(model="{name: tiny-llama, trust_remote_code: true}"), "no_base.yaml": good(model="{name: ./weights}"),
    "env.yaml": good(model="{name: $MODEL}"), "template.yaml": good(model="{name: tiny-llama, chat_template: rows}"),
    "key_number.yaml": GOOD + "1: {a: b}\n", "null_key.yaml": GOOD + "null: x\n", "inner_key.yaml": good(model="{name: tiny-llama, 1: x}"), "merge_key.yaml": GOOD + "train: {<<: 3}\n",
}
DATA: dict[str, str | bytes] = {
    "rows.jsonl": ROW * 4, "empty.jsonl": "", "blank.jsonl": " \n\n", "half.jsonl": ROW + ROW[:20], "nan.jsonl": '{"instruction": "q", "output": NaN}\n',
    "big_number.jsonl": '{"instruction": "q", "output": "a", "id": 1e999}\n', "keys.jsonl": '{"instruction": "q", "instruction": "p", "output": "a"}\n',
    "digits.jsonl": '{"instruction": "q", "output": "a", "id": ' + "9" * 5000 + "}\n",
    "bomb.jsonl": '{"instruction": "q", "output": ' + "[" * 50_000 + "]" * 50_000 + "}\n", "utf16.jsonl": ROW.encode("utf-16"),
    "utf16le.csv": "instruction,output\nq,a\n".encode("utf-16-le"), "gbk.jsonl": '{"instruction": "你好", "output": "世界"}\n'.encode("gbk"), "cut.jsonl.gz": gzip.compress(ROW.encode() * 99, mtime=0)[:40],
    "no.jsonl.gz": "not packed\n", "half.csv": 'instruction,output\n"q,a\n', "wide.csv": "instruction,output\nq,a,b\n",
    "hash.csv": "instruction#output\nq#a\n", "headless.csv": "q,a\nq2,a2\n", "html.jsonl": "<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "pointer.jsonl": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "python.jsonl": "{'instruction': 'q', 'output': 'a'}\n",
    "numbers.jsonl": "1\n2\n", "lists.jsonl": '["q", "a"]\n', "null.jsonl": "null\n", "columns.jsonl": '{"a": 1, "b": 2}\n', "image.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 50,
    "weights.parquet": b"PAR1" + b"\0" * 50, "cut.arrow": b"ARROW1\0\0" + b"\0" * 20, "list.json": '[{"instruction": "q", "output": "a"},\n{"instruction": "q"', "dict.json": '{"instruction": "q", "output": "a"',
    "名字 空格.jsonl": ROW[:10] + "\n", "new\nline.jsonl": ROW[:10] + "\n", "-dash.jsonl": ROW[:10] + "\n", "pair.jsonl": '{"prompt": "q", "chosen": "a", "rejected": ""}\n',
    "same.jsonl": '{"prompt": "q", "chosen": "a", "rejected": "a"}\n', "turns.jsonl": '{"messages": [{"role": "user", "content": "q"}]}\n', "roles.jsonl": '{"messages": [{"role": "human", "content": "q"}, {"role": "bot", "content": "a"}]}\n',
    "emoji.jsonl": '{"instruction": "q", "output": "\\ud83d"}\n', "label.jsonl": '{"prompt": "q", "completion": "a", "label": "maybe"}\n', "rule.py": "def f(prompts, completions, **_):\n    return [0.0] * len(prompts)\n",
    "answers.jsonl": ROW, "rules.txt": "f\n", "broken.py": "def f(:\n", "broken.jinja": "{% for m in messages %}{{ m.content }}\n",
    "\x1b[31m.jsonl": ROW[:10] + "\n",
}
# fmt: on
LORA = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny-llama",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
}


def write(root: Path, name: str, content: Any) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def folder(root: Path) -> None:
    """Everything that the table names."""
    for name, content in {**RECIPES, **DATA}.items():
        write(root, name, content)
    with zipfile.ZipFile(root / "sheet.jsonl", "w") as book:
        book.writestr("xl/workbook.xml", "<workbook/>")
    for name in ("folder.yaml", "folder.jsonl", "nothing", "runs", "adapters/empty", "spaces/a b"):
        (root / name).mkdir(parents=True)
    for name, target in {
        "dangling.yaml": "gone",
        "dangling.jsonl": "gone",
        "loop.jsonl": "loop.jsonl",
        "link": "nothing",
    }.items():
        (root / name).symlink_to(target)
    for name in ("pipe.jsonl", "pipe.yaml", "adapters/pipe"):
        os.mkfifo(root / name)
    # models
    write(root, "own/config.json", {"model_type": "llama"})
    write(root, "models/bert/config.json", {"model_type": "bert"})
    write(root, "models/cut/config.json", '{"model_type": "lla')
    write(root, "models/list/config.json", "[1]")
    write(root, "models/deep/config.json", "[" * 50_000)
    write(
        root,
        "models/code/config.json",
        {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}},
    )
    write(root, "models/nothing/tokenizer.json", "{}")
    write(root, "model.gguf", b"GGUF" + struct.pack("<I", 3) + b"\0" * 4)
    write(root, "not.gguf", "hello")
    write(root, "weights.safetensors", b"\0" * 9)
    # adapters
    for name, config in {
        "near": LORA, "score": {**LORA, "task_type": "SEQ_CLS"}, "lost": {**LORA, "base_model_name_or_path": "/nowhere/base"},
        "nameless": {"peft_type": "LORA"}, "number": {**LORA, "base_model_name_or_path": 7}, "cut": '{"peft_type": "LO',
        "list": "[]", "deep": "[" * 50_000, "hub": {**LORA, "base_model_name_or_path": "owner/nothing"},
        "nul": {**LORA, "base_model_name_or_path": "a\0b"}, "long": {**LORA, "base_model_name_or_path": "x" * 5000},
    }.items():  # fmt: skip
        write(root, f"adapters/{name}/adapter_config.json", config)
    write(root, "adapters/identity/adapter_config.json", LORA)
    write(root, "adapters/identity/base_identity.json", {"base": ["tiny-llama"], "revision": 7})
    # runs
    write(root, "runs/near/adapter/adapter_config.json", LORA)
    write(root, "runs/full/model/config.json", {"model_type": "llama"})
    write(root, "runs/begun/recipe.yaml", GOOD)
    for name, text in {
        "bomb": RECIPES["bomb.yaml"],
        "deep": RECIPES["deep.yaml"],
        "date": RECIPES["date.yaml"],
        "list": "[1]\n",
        "eval": "eval: [1]\n",
    }.items():
        write(root, f"runs/{name}/recipe.yaml", text)
        write(root, f"runs/{name}/adapter/adapter_config.json", LORA)
    write(root, "trl/checkpoint-10/adapter_config.json", LORA)
    write(root, "trl/checkpoint-10/trainer_state.json", {"global_step": 10})
    write(root, "trl/README.md", "# trl\n")
    write(root, "runs/foreign/checkpoints/checkpoint-10/trainer_state.json", {})
    write(root, "runs/foreign/recipe.yaml", "mine\n")
    write(root, "runs/done/result.json", {"stage": "sft", "versions": {"ft": "0"}})
    write(root, "runs/done/recipe.yaml", GOOD)


def models(root: Path) -> None:
    """The adapters whose weights are looked at; to be called where torch is there."""
    import torch
    from safetensors.torch import save_file

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(root / "pwned"),)

    def layer(width: int) -> dict[str, Any]:
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        return {f"{name}.lora_A.weight": torch.zeros(4, width), f"{name}.lora_B.weight": torch.zeros(width, 4)}

    for name, config in {
        "truncated": LORA, "pickle": LORA, "pointer": LORA, "blank": LORA, "other_base": LORA,
        "newer": {**LORA, "of_tomorrow": True, "another_key": {"a": 1}}, "unknown": {**LORA, "peft_type": "TOMORROW"},
    }.items():  # fmt: skip
        write(root, f"adapters/{name}/adapter_config.json", config)
        save_file(layer(7), root / "adapters" / name / "adapter_model.safetensors")
    place = root / "adapters" / "truncated" / "adapter_model.safetensors"
    place.write_bytes(place.read_bytes()[:-9])
    write(root, "adapters/blank/adapter_model.safetensors", "")
    write(root, "adapters/pointer/adapter_model.safetensors", DATA["pointer.jsonl"])
    (root / "adapters/pickle/adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, root / "adapters/pickle/adapter_model.bin")


ENVIRONMENT = {"PYTHONPATH": str(Path(finetune.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
WITHOUT_TORCH = """
import json, sys

asked = []

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers"):
            asked.append(name)
            raise RuntimeError(f"{name} is imported")

sys.meta_path.insert(0, Refused())
from finetune.cli import main

for line in sys.stdin:
    sys.argv, code = ["ft", *json.loads(line)], 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    print(f"<end {json.dumps([code, asked])}>", file=sys.stderr, flush=True)
    asked.clear()
"""
Told = tuple[int, list[str], str]
"""Exit code, heavy modules that were asked for, stderr."""


def process(
    program: str, where: Path, *words: str, given: str = "", begin: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """begin: what the process does before it becomes Python."""
    return subprocess.run(
        [sys.executable, "-c", program, *words], input=given, capture_output=True, text=True, cwd=where,
        env={**os.environ, **ENVIRONMENT}, preexec_fn=begin, timeout=300,
    )  # fmt: skip


def as_table(text: str, here: Path) -> str:
    """What differs between machines and installations left out."""
    for found, written in ((str(here), "HERE"), (", smollm2-135m", ""), ("\n\n", "\n")):
        text = text.replace(found, written)
    return text.rstrip("\n")


def typed(where: Path, lines: Iterable[str], begin: Callable[[], None] | None = None) -> dict[str, Told]:
    """What is said of each command line, all typed in `where`, in one process without torch and transformers."""
    asked = "".join(json.dumps(shlex.split(line)) + "\n" for line in lines)
    done = process(WITHOUT_TORCH, where, given=asked, begin=begin)
    found, text = [], done.stderr
    for _ in lines:
        said, end, text = text.partition("<end ")
        assert end, done.stderr[-3000:]
        known, _, text = text.partition(">\n")
        found.append((*json.loads(known), said))
    return dict(zip(lines, found, strict=True))
