"""How much batching brings to `ft serve`: 16 requests in parallel against the same ones after each other.

    python benchmarks/serve.py [--model tiny-llama] [--requests 64] [--tokens 64]

Prints tokens per second of both, and their ratio; of several rounds the best of each, in turn, so that what else the
machine does falls on both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--model", default="tiny-llama")
    options.add_argument("--requests", type=int, default=64)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--parallel", type=int, default=16)
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    command = [
        sys.executable,
        "-m",
        "finetune",
        "serve",
        given.model,
        "--port",
        "0",
        "--batch-size",
        str(given.parallel),
    ]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        url = next(word for line in server.stderr for word in line.split() if word.endswith("/v1"))
        drain = ThreadPoolExecutor(1)
        drain.submit(server.stderr.read)
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        name = client.models.list().data[0].id

        def ask(number: int) -> int:
            turns = [{"role": "user", "content": f"My order {number} arrived broken, what now?"}]
            answer = client.chat.completions.create(
                model=name, messages=turns, max_tokens=given.tokens, seed=number, temperature=1.0
            )
            return int(answer.usage.completion_tokens)

        def tokens_per_second(parallel: int) -> float:
            begun = time.perf_counter()
            with ThreadPoolExecutor(parallel) as pool:
                tokens = sum(pool.map(ask, range(given.requests)))
            return tokens / (time.perf_counter() - begun)

        ask(0)
        rounds = [(tokens_per_second(1), tokens_per_second(given.parallel)) for _ in range(given.rounds)]
        one, many = (max(column) for column in zip(*rounds, strict=True))
        print(f"one at a time   {one:7.0f} tokens/s")
        print(f"{given.parallel:2} in parallel  {many:7.0f} tokens/s")
        print(f"ratio           {many / one:7.1f}")
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
