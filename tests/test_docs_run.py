"""The pages' command lines are run as they stand, page by page, in a folder that has the files they name.

bash reads each block. What is not run here is named in ELSEWHERE with the reason, what is made smaller in SMALLER.
Blocks that train are `slow` (`make slow`).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from docs_shell import Shell

ROOT = Path(__file__).parent.parent
PAGES = [path for folder in ("docs", "docs/commands", "docs/zh") for path in sorted((ROOT / folder).glob("*.md"))]
NETWORK, TOOL = "downloads", "another tool"
SEVERAL = "several processes; tests/training/test_ranks.py trains with them"
ELSEWHERE = {
    "pip install": NETWORK,
    "git clone": NETWORK,
    "python -m venv": NETWORK,
    "docker ": TOOL,
    "vllm serve": TOOL,
    "python -m sglang": TOOL,
    "ollama ": TOOL,
    "echo 'FROM ./merged'": TOOL,
    "llama-cli ": TOOL,
    "ray job submit": "a cluster",
    "torchrun ": SEVERAL,
    "accelerate launch": SEVERAL,
    "ft sft recipe.yaml --launch": SEVERAL,
    "ft dpo recipe.yaml --launch": SEVERAL,
    "ft sft qwen72.yaml": "several GPUs, and 72B weights",
    "ft plan qwen72.yaml": "downloads the config of its base",
    "#!/bin/bash": "a job of Slurm, with its commands",
    "ft compare quickstart.yaml": "searches a learning rate for each method: minutes; tests/commands/test_compare.py",
    "make ": "makes an environment, or works for minutes to hours",
    "python benchmarks/real.py": "works for an hour or two",
    ". .venv/bin/activate": "what make quickstart made",
    "ft --install-completion": "writes into the shell's own files",
    "ft serve": "does not end by itself; tests/commands/test_serve.py",
    "FT_API_KEY=": "does not end by itself; tests/commands/test_serve.py",
    "ft eval runs/align/": "of make align's runs",
    "ft eval runs/real/": "of make real's runs",
    "ft eval runs/mine --tasks gsm8k": NETWORK,
    "--push-to-hub": NETWORK,
    "model.source=modelscope": NETWORK,
    "client = openai.OpenAI": "needs a server; tests/commands/test_serve.py has these lines",
}
"""What a line begins with, or an option in it, or the first line of a block -> why it is not run here."""
TRAINING = r"^(sft|dpo|kto|reward|pretrain|ppo|compare) (?!.*--dry-run)"
SMALLER = [
    (TRAINING, ["--set", "train.max_steps=2", "--set", "train.effective_batch_size=4"]),
    (TRAINING + "(?!.*--resume)(?<!compare )", ["--overwrite"]),  # the folder has runs already
    (TRAINING + ".*--resume", ["--set", "train.max_steps=4"]),  # what is there is finished, and goes on
    (r"^pretrain ", ["--set", "train.warmup_steps=0", "--set", "train.eval_steps=1"]),
    (TRAINING + r"(?!.*model\.name)\S+_qwen\.yaml", ["--set", "model.name=tiny-qwen"]),
    (TRAINING + r"(?!.*model\.name)\S+(?<!tiny)_llama\.yaml", ["--set", "model.name=tiny-llama"]),
    (r"^ppo ", ["--set", "ppo.max_new_tokens=8"]),
    (r"^ppo ppo_(?!.*reward\.(train=null|model))", ["--set", "reward.num_train_epochs=0.01"]),
    (r"^(merge|export) ", ["--overwrite"]),
    (r"^(eval|generate) (?!.*--limit)", ["--limit", "2"]),
    (r"^(chat|generate) ", ["--max-new-tokens", "8"]),
]
"""A command line begins like this -> what is put behind it: few steps, few rows, built-in bases for published ones."""

LORA = {
    "version": 1, "stage": "sft", "model": {"name": "tiny-llama"},
    "data": {"train": "rows.jsonl", "max_length": 288}, "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
    "train": {"learning_rate": 1e-3, "max_steps": 2, "effective_batch_size": 4, "logging_steps": 1},
    "eval": {"data": "exam.jsonl", "max_new_tokens": 8}, "output": {"dir": "runs/mine"},
}  # fmt: skip
QWEN = LORA | {"model": {"name": "tiny-qwen"}, "adapter": {"method": "lora", "r": 16, "lora_alpha": 32}}
PPO = LORA | {
    "stage": "ppo", "data": {"train": "builtin:tickets/questions_train", "max_length": 256},
    "reward": {"functions": ["rules.py:score"]}, "ppo": {"max_new_tokens": 8}, "eval": None,
}  # fmt: skip
FACTORY = {
    "stage": "sft", "model_name_or_path": "tiny-llama", "dataset": "mine", "dataset_dir": ".",
    "finetuning_type": "lora", "lora_target": "all", "template": "llama3", "output_dir": "saves", "cutoff_len": 256,
}  # fmt: skip
DATASET = {
    "file_name": "my_data.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}  # fmt: skip
TASK = {
    "task": "things", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip
SAMPLES = {
    "tickets_train.jsonl": ["rows.jsonl", "my.jsonl", "my_data.json", "examples.jsonl"],
    "tickets_test.jsonl": ["exam.jsonl", "held_out.jsonl", "zh.jsonl", "questions.jsonl"],
}
"""File of data_templates/ -> what its first rows are called here."""
HEAVY = r"^plan |^merge .*gguf|^export .*--for (llama.cpp|ollama)|^eval .*(--tasks|--quantization)"
"""Takes as long as training."""
RUNS = """
ft sft mine.yaml
ft sft mine.yaml --output runs/b --set train.seed=7
ft merge runs/mine --output merged
cp -r runs/mine runs/a; cp -r runs/mine runs/quickstart
cp -r runs/a/adapter a; cp -r runs/b/adapter b
"""
MORE = """
ft sft qwen.yaml --output runs/sft
ft reward reward_llama.yaml --output runs/reward
ft dpo dpo_llama.yaml --output runs/dpo
mkdir models; ft merge --model tiny-llama --format gguf --output models/SmolLM2-135M-Instruct.Q4_1.gguf
"""
"""For pages that train."""


def files(folder: Path) -> None:
    """What a user of the pages has."""
    for name, recipe in {
        "mine.yaml": LORA, "lora.yaml": LORA, "my.yaml": LORA, "recipe.yaml": LORA, "qwen.yaml": QWEN,
        "train_lora.yaml": FACTORY, "llama_factory.yaml": FACTORY, "my_tasks/things.yaml": TASK,
        "dataset_info.json": {"mine": DATASET},
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        text = json.dumps(recipe) if name.endswith(".json") else yaml.safe_dump(recipe)
        (folder / name).write_text(text, encoding="utf-8")
    for sample, names in SAMPLES.items():
        rows = (ROOT / "data_templates" / sample).read_text("utf-8").splitlines(keepends=True)[:16]
        for name in names:
            text = f"[{','.join(rows)}]" if name.endswith(".json") else "".join(rows)
            (folder / name).write_text(text, encoding="utf-8")
    for name, text in {
        "gsm8k_test.jsonl": '{"question": "What is 1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}\n' * 2,
        "prompts.csv": "prompt\nWho are you?\nWhat is new?\n",
        "questions.txt": "hi\nand now?\n",
        "rules.py": "def score(prompts, completions, **columns):\n    return [len(one) for one in completions]\n",
        "ceval-exam/val/physics_val.csv": "id,question,A,B,C,D,answer,explanation\n0,1加1等于?,1,2,3,4,B,\n",
        "train.sh": "llamafactory-cli train train_lora.yaml learning_rate=1e-4\n",
        "my_tasks/rows.jsonl": '{"text": "one and one is", "answer": "two"}\n' * 2,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    started = Shell(tmp_path_factory.mktemp("shell"), SMALLER)
    yield started
    started.close()


@pytest.fixture(scope="module")
def world(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    files(folder)
    done = shell.run(RUNS, folder)
    assert done.returncode == 0, done.stderr + shell.log.read_text("utf-8")
    return folder


@pytest.fixture(scope="module")
def larger(shell: Shell, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(world, folder, dirs_exist_ok=True)
    done = shell.run(MORE, folder)
    assert done.returncode == 0, done.stderr + shell.log.read_text("utf-8")
    return folder


PRELUDE = """
from transformers import AutoModelForCausalLM
from finetune.resources import BUILTIN_MODELS
base = AutoModelForCausalLM.from_pretrained(BUILTIN_MODELS / "tiny-llama")
"""
"""What a reader of the pages' Python has already."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text); of text what stands right behind another block, as what that one prints."""
    shown = re.sub(r"\n\n```text\n.*?\n```\n", "\n\n", page.read_text("utf-8"), flags=re.DOTALL)
    return re.findall(r"^```(bash|python|yaml|text)\n(.*?)^```$", shown, flags=re.DOTALL | re.MULTILINE)


def lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines(keepends=True)


def elsewhere(line: str) -> list[str]:
    """The entries that keep it from being run."""
    return [key for key in ELSEWHERE if line.startswith(key) or (key in line and key.startswith(("--", "model.")))]


def kept(block: str) -> str:
    if any(elsewhere(line) for line in lines(block)[:1] if line.startswith(("#!", "client ="))):
        return ""
    here = [line for line in lines(block) if "| jq " not in line or shutil.which("jq") is not None]
    return "".join(line for line in here if not elsewhere(line))


def trains(block: str) -> bool:
    return any(re.search(f"{TRAINING}|{HEAVY}", found) for found in re.findall(r"\bft (.+)", kept(block)))


def written(block: str) -> list[str]:
    """The files that its lines say they write."""
    text = re.sub(r"\s#.*", "", kept(block))
    found = re.findall(r"(?:--(?:output|predictions|json|fix|html)|-o|(?<!2)>) ([\w./-]*\w[\w./-]*)", text)
    return [name for name in found if not name.startswith("/dev")]


FILE = re.compile(r"# (\w+\.(?:py|yaml))\n")
"""The first line of a block that is a file of the reader's."""


def run_page(page: Path, slow: bool, shell: Shell, folder: Path) -> None:
    for _, block in blocks(page):
        if name := FILE.match(block):
            (folder / name[1]).write_text(block, encoding="utf-8")
    said = None
    for language, block in blocks(page):
        if language == "text" and said is not None:  # what the block above prints
            assert block == said
        said = None
        if language == "python" and not FILE.match(block) and not elsewhere(block):
            done = shell.run(f"python -c {shlex.quote(PRELUDE + block)}", folder)
            assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        if language != "bash" or not kept(block).strip() or (trains(block) and not slow):
            continue
        for made in re.findall(r"ft recipes (?:new|import \S+ --output) (\S+)", block):
            (folder / made).unlink(missing_ok=True)
        done = shell.run(kept(block), folder)
        said = done.stdout
        assert done.returncode == 0, f"{kept(block)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert [name for name in written(block) if not (folder / name).exists()] == [], done.stdout + done.stderr


def copied(world: Path, folder: Path, page: Path) -> Path:
    shutil.copytree(world, folder, dirs_exist_ok=True)
    if page.name == "cluster.md":
        shutil.rmtree(folder / "runs" / "mine")  # its first job
    if page.name == "ppo.md":
        (folder / "mine.yaml").write_text(yaml.safe_dump(PPO), encoding="utf-8")
    return folder


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


BASH = {page: [block for language, block in blocks(page) if language == "bash"] for page in PAGES}
QUICK = [
    page for page in PAGES
    if any(kept(block).strip() and not trains(block) for block in BASH[page])
    or any(language == "python" and not FILE.match(block) and not elsewhere(block) for language, block in blocks(page))
]  # fmt: skip
SLOW = [page for page in PAGES if any(map(trains, BASH[page]))]


@pytest.mark.parametrize("page", QUICK, ids=name_of)
def test_what_does_not_train(page: Path, shell: Shell, world: Path, tmp_path: Path) -> None:
    run_page(page, False, shell, copied(world, tmp_path / "here", page))


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_whole_pages(page: Path, shell: Shell, larger: Path, tmp_path: Path) -> None:
    run_page(page, True, shell, copied(larger, tmp_path / "here", page))


def test_what_is_left_out_is_still_there() -> None:
    every = [line for page in PAGES for _, block in blocks(page) for line in lines(block)]
    used = {key for line in every for key in elsewhere(line)}
    assert set(ELSEWHERE) - used == set()


def test_targets_are_those_of_the_makefile() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {name for page in PAGES for block in BASH[page] for name in re.findall(r"^make ([\w-]+)", block, re.M)}
    assert {"quickstart", "test"} <= named <= targets
