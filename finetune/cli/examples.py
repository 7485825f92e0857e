"""Examples at the end of each command's help: lines that can be typed as they stand, or with paths of one's own."""

from __future__ import annotations

import typer

EXAMPLES = {
    "": """\
ft recipes list
ft sft quickstart.yaml
ft eval runs/quickstart --compare-base""",
    "pretrain": "ft pretrain pretrain_tiny_llama.yaml --output runs/base",
    "sft": """\
ft sft quickstart.yaml --dry-run
ft sft mine.yaml --set train.learning_rate=1e-4 --set data.train=rows.jsonl --output runs/mine
ft sft runs/mine/recipe.yaml --resume""",
    "reward": "ft reward reward_qwen.yaml --set model.name=tiny-qwen",
    "dpo": "ft dpo dpo_qwen.yaml --set model.name=tiny-qwen --set dpo.loss_type=ipo",
    "kto": "ft kto kto_qwen.yaml --set model.name=tiny-qwen",
    "ppo": """\
ft ppo ppo_qwen.yaml --set model.name=tiny-qwen
ft ppo mine.yaml --set 'reward.functions=[rules.py:score]'""",
    "plan": """\
ft plan lora_chatglm3.yaml --gpu 24GB
ft plan mine.yaml --set model.quantization=int4 --json -""",
    "merge": """\
ft merge runs/mine --output merged
ft merge runs/mine --format gguf --output mine.gguf
ft merge --adapter a:0.7 --adapter b:0.3 --output both""",
    "export": "ft export runs/mine --for vllm --output for-vllm",
    "eval": """\
ft eval runs/mine --compare-base
ft eval runs/mine --data exam.jsonl --metrics bleu,rougeL --json figures.json
ft eval runs/a runs/b --quantization none,int4""",
    "generate": """\
ft generate runs/mine --data questions.jsonl --output answers.jsonl
ft generate runs/mine --data - --output - --temperature 0.7 --n 4 --seed 1""",
    "compare": "ft compare quickstart.yaml --methods lora,bitfit,full --output runs/compare",
    "report": """\
ft report runs/mine --output report.html
ft report runs""",
    "chat": """\
ft chat runs/mine --versus-base
ft chat tiny-llama --temperature 0.7""",
    "serve": """\
ft serve runs/mine --port 8000
ft serve --adapter support=runs/a --adapter sales=runs/b""",
    "doctor": "ft doctor",
    "models list": "ft models list",
    "recipes list": "ft recipes list",
    "recipes show": "ft recipes show quickstart",
    "recipes new": "ft recipes new mine.yaml --data rows.jsonl --model tiny-qwen",
    "recipes import": "ft recipes import llama_factory.yaml --output mine.yaml",
    "recipes schema": "ft recipes schema > ft-recipe.schema.json",
    "recipes explain": """\
ft recipes explain data.packing
ft recipes explain train""",
    "data check": """\
ft data check rows.jsonl --model tiny-llama
ft data check mine.yaml --eval exam.jsonl --fix clean.jsonl""",
    "data preview": "ft data preview quickstart.yaml --limit 2",
    "runs list": """\
ft runs list
ft runs list runs --stage sft --sort metric --reverse --json -""",
    "runs show": "ft runs show runs/mine",
    "runs diff": "ft runs diff runs/a runs/b",
    "runs watch": "ft runs watch runs/mine",
}
"""Command -> lines; "" is ft itself."""


def examples(name: str) -> list[str]:
    return EXAMPLES.get(name, "").splitlines()


def epilog(name: str) -> str | None:
    """What stands below the options."""
    lines = examples(name)
    if not lines:
        return None
    title = "Example:" if len(lines) == 1 else "Examples:"
    return "\n".join(["\b", title, *(f"  {line}" for line in lines)])  # \b: not wrapped anew


def with_examples(app: typer.Typer) -> None:
    """Each command of `app` with its examples."""
    app.info.epilog = epilog("")
    for group, prefix in [(app, ""), *((g.typer_instance, f"{g.name} ") for g in app.registered_groups)]:
        for command in group.registered_commands if group is not None else ():
            command.epilog = epilog(f"{prefix}{command.name}")
