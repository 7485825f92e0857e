"""Write rows of the world's tasks as JSON lines.

python -m finetune.builtin.world --write data_templates                       the shipped files, byte for byte
python -m finetune.builtin.world --rows 300 --seed 7 --phrasing unseen --output unseen.jsonl
python -m finetune.builtin.world --task pairs --rows 1000 --seed 7 --split train --output pairs.jsonl
"""

import argparse
import json
from pathlib import Path
from typing import Any

from finetune.builtin.world.questions import pairs, questions
from finetune.builtin.world.tickets import tickets

# tickets: extraction as JSON; questions: one value, or "not stated"; pairs: preferences between answers to questions.
TASKS = {"tickets": tickets, "questions": questions, "pairs": pairs}
# The file -> its task and the arguments of the task's function.
SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "tickets_train.jsonl": ("tickets", {"seed": 0, "n": 2000, "split": "train"}),
    "tickets_test.jsonl": ("tickets", {"seed": 1, "n": 300, "split": "test"}),
    "tickets_questions_train.jsonl": ("questions", {"seed": 0, "n": 2000, "split": "train"}),
    "tickets_questions_test.jsonl": ("questions", {"seed": 1, "n": 300, "split": "test"}),
    "tickets_pairs_train.jsonl": ("pairs", {"seed": 0, "n": 3000, "split": "train"}),
    "tickets_pairs_test.jsonl": ("pairs", {"seed": 1, "n": 300, "split": "test"}),
}


def shipped(name: str) -> list[dict[str, Any]]:
    task, arguments = SHIPPED[name]
    return TASKS[task](**arguments)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.builtin.world", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the shipped files into this folder")
    parser.add_argument("--output", type=Path, help="write other rows into this file")
    parser.add_argument("--task", choices=tuple(TASKS), default="tickets")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7, help="the shipped files use 0 (train) and 1 (test)")
    parser.add_argument("--split", choices=("train", "test", "real"), default="test", help="real: real English names")
    parser.add_argument("--phrasing", choices=("seen", "unseen"), default="seen", help="unseen: held-out templates")
    args = parser.parse_args()
    if not args.write and not args.output:
        parser.error("give --write FOLDER or --output FILE")
    if args.phrasing == "unseen" and args.task != "tickets":
        parser.error("--phrasing unseen: unseen templates tell complete tickets, questions need partial ones")
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        for name in SHIPPED:
            (args.write / name).write_text(jsonl(shipped(name)), encoding="utf-8", newline="\n")
    if args.output:
        options = {"phrasing": args.phrasing} if args.task == "tickets" else {}
        rows = TASKS[args.task](args.seed, args.rows, args.split, **options)
        args.output.write_text(jsonl(rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
