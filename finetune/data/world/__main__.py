"""Write ticket rows as JSON lines.

python -m finetune.data.world --write data_templates                       the shipped files, byte for byte
python -m finetune.data.world --rows 300 --seed 7 --phrasing unseen --output unseen.jsonl
"""

import argparse
import json
from pathlib import Path
from typing import Any

from finetune.data.world.tickets import tickets

SHIPPED: dict[str, dict[str, Any]] = {
    "tickets_train.jsonl": {"seed": 0, "n": 2000, "split": "train"},
    "tickets_test.jsonl": {"seed": 1, "n": 300, "split": "test"},
}


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune.data.world", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the shipped files into this folder")
    parser.add_argument("--output", type=Path, help="write other rows into this file")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7, help="the shipped files use 0 (train) and 1 (test)")
    parser.add_argument("--split", choices=("train", "test", "real"), default="test", help="real: real English names")
    parser.add_argument("--phrasing", choices=("seen", "unseen"), default="seen", help="unseen: held-out templates")
    args = parser.parse_args()
    if not args.write and not args.output:
        parser.error("give --write FOLDER or --output FILE")
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        for name, options in SHIPPED.items():
            (args.write / name).write_text(jsonl(tickets(**options)), encoding="utf-8", newline="\n")
    if args.output:
        rows = tickets(args.seed, args.rows, args.split, args.phrasing)
        args.output.write_text(jsonl(rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
