"""How fast the data check is, and how much memory it needs.

    python benchmarks/data_check.py [--rows 1000000] [--token-rows 100000] [--json FILE]

Structural: every check that needs no tokenizer, on one core; peak memory at a tenth of the rows and at all of them.
Token level: reading, checking, templating, label masks and encoding, against the tokenizer's own encode_batch on the
finished texts, both in this run on the same rows. Goals: 50,000 rows/s, 60 % of encode_batch, memory that does not
grow with the rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ZH = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说"


def word(r: random.Random) -> str:
    return "".join(r.choice("etaoinshrdlucmfwypvbgk") for _ in range(r.randint(2, 9)))


def write_rows(path: Path, count: int) -> None:
    """Conversations of one or two rounds, a third of them Chinese, about 150 characters."""
    r = random.Random(0)
    words = [word(r) for _ in range(3000)]

    def text(chinese: bool) -> str:
        if chinese:
            return "".join(r.choices(ZH, k=r.randint(10, 50)))
        return " ".join(r.choices(words, k=r.randint(4, 18)))

    with path.open("w", encoding="utf-8") as out:
        for i in range(count):
            chinese, turns = i % 3 == 0, []
            for _ in range(1 + (i % 5 == 0)):
                turns += [{"role": "user", "content": text(chinese)}, {"role": "assistant", "content": text(chinese)}]
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def make_tokenizer(path: Path) -> Any:
    """A byte-level BPE of 8,000 tokens with ChatML, learned on the first rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with path.open(encoding="utf-8") as rows:
        lines = [next(rows) for _ in range(2000)]
    texts = [turn["content"] for line in lines for turn in json.loads(line)["messages"]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def structural(path: str, rows: int, out: Any) -> None:
    """In a process of its own, so that the peak memory is that of the check."""
    from finetune.data import audit
    from finetune.recipe.sections import DataConfig

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    report = audit.check(DataConfig(train=path, max_samples=rows))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.put({"rows": report.rows, "rows_per_s": round(rows / wall), "rows_per_cpu_s": round(rows / cpu),
             "peak_memory_mb": round(peak / 1024), "grown_mb": round((peak - base) / 1024)})  # fmt: skip


def token_level(path: Path, rows: int) -> dict[str, float]:
    from finetune.data import audit, chat
    from finetune.data.samples import read_samples
    from finetune.recipe.sections import DataConfig

    tokenizer = make_tokenizer(path)
    encoder = chat.make_encoder(tokenizer)
    config = DataConfig(train=str(path), max_samples=rows)
    wall, cpu = time.perf_counter(), time.process_time()
    report = audit.check(config, encoder)
    check_wall, check_cpu = time.perf_counter() - wall, time.process_time() - cpu
    texts = [encoder.plan(item.sample).text for item in read_samples(str(path), config)]
    backend = tokenizer.backend_tokenizer
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(texts), audit.BATCH):
        backend.encode_batch(texts[start : start + audit.BATCH], add_special_tokens=False)
    alone_wall, alone_cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "rows": report.rows,
        "check_rows_per_s": round(rows / check_wall),
        "encode_batch_rows_per_s": round(rows / alone_wall),
        "share_of_encode_batch": round(alone_wall / check_wall, 3),
        "share_of_encode_batch_cpu": round(alone_cpu / check_cpu, 3),
        "tokens_per_row": round(report.counts["tokens"] / rows, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--token-rows", type=int, default=100_000)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"structural": []}
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, max(arguments.rows, arguments.token_rows))
        for rows in (arguments.rows // 10, arguments.rows):
            queue = spawn.Queue()
            process = spawn.Process(target=structural, args=(str(path), rows, queue))
            process.start()
            result["structural"].append(queue.get())
            process.join()
            print("structural ", result["structural"][-1], flush=True)
        result["token_level"] = token_level(path, arguments.token_rows)
        print("token level", result["token_level"])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    slow = result["structural"][-1]["rows_per_s"] < 50_000 or result["token_level"]["share_of_encode_batch"] < 0.6
    sys.exit(1 if slow else 0)


if __name__ == "__main__":
    main()
