"""`make align`: SFT on noisy answers, then DPO, and a reward model with PPO; one table. Trains every time.

python benchmarks/align.py [--model tiny-llama] [--output runs/align] [--ppo-seeds 1]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

FT = [sys.executable, "-m", "finetune"]
GROUPS = ("answerable", "unanswerable")


def ft(*arguments: Any) -> None:
    """Run a command as a user would."""
    print("$ ft " + " ".join(map(str, arguments)), flush=True)
    subprocess.run([*FT, *map(str, arguments)], check=True)
    print(flush=True)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def share(metrics: dict[str, Any], key: str) -> str:
    low, high = metrics[f"{key}_ci"]
    return f"{metrics[key]:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--output", type=Path, default=Path("runs/align"))
    parser.add_argument("--ppo-seeds", type=int, default=1, help="number of PPO runs")
    args = parser.parse_args()
    folder, model = args.output, ("--set", f"model.name={args.model}", "--overwrite")
    sft, reward = folder / "sft", folder / "reward"
    start = (*model, "--set", f"model.adapter={sft}")
    ft("sft", "--recipe", "align_sft.yaml", *model, "--output", sft)
    ft("dpo", "--recipe", "align_dpo.yaml", *start, "--output", folder / "dpo")
    ft("reward", "--recipe", "align_reward.yaml", *start, "--output", reward)
    runs = {"SFT": sft, "SFT -> DPO": folder / "dpo"}
    for seed in range(args.ppo_seeds):
        name = "SFT -> PPO" + (f", seed {seed}" if args.ppo_seeds > 1 else "")
        runs[name] = folder / f"ppo-{seed}"
        more = ("--set", f"reward.model={reward}", "--set", f"train.seed={seed}")
        ft("ppo", "--recipe", "align_ppo.yaml", *start, *more, "--output", runs[name])
    ft("eval", reward, "--json", folder / "reward.json")
    ft("eval", *runs.values(), "--compare-base", "--reward", reward, "--json", folder / "eval.json")
    drawn = [folder / f"sampled-{seed}.json" for seed in range(3)]
    for seed, path in enumerate(drawn):
        ft("eval", sft, "--temperature", 1, "--seed", seed, "--json", path)

    from rich.console import Console
    from rich.table import Table

    evaluated = read(folder / "eval.json")["runs"]
    n = evaluated[0]["n"]
    table = Table(title=f"{args.model}: held-out questions about tickets, n={n}", title_justify="left")
    for column in ("", "right when answerable", "says so when not", "reward", "KL", "training"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in zip(["base", *runs], evaluated, strict=True):
        metrics, path = result["metrics"], runs.get(name)
        kl = seconds = ""
        if path is not None:
            seconds = f"{read(path / 'result.json')['seconds']:.0f} s"
            rows = [json.loads(line) for line in (path / "metrics.jsonl").open(encoding="utf-8")]
            kl = f"{rows[-1]['kl']:.2f}" if "kl" in rows[-1] else ""
        cells = [share(metrics, f"exact_match/{group}") for group in GROUPS]
        table.add_row(name, *cells, f"{metrics['reward']:+.2f}", kl, seconds)
    Console(width=120).print(table)
    accuracy = read(folder / "reward.json")["runs"][0]["metrics"]
    both = ", ".join(f"{group} {share(accuracy, f'preference_accuracy/{group}')}" for group in GROUPS)
    print(f"reward model, held-out pairs: {share(accuracy, 'preference_accuracy')}; {both}")
    says_so = [read(path)["runs"][0]["metrics"]["exact_match/unanswerable"] for path in drawn]
    print(f"SFT sampled at temperature 1, {len(drawn)} times: says so when not {mean(says_so):.3f}")
    for name, path in runs.items():
        held_out = read(path / "result.json")["eval"]
        if "reward_difference" in held_out:
            low, high = held_out["reward_difference_ci"]
            change = f"{held_out['reward_before']:+.2f} -> {held_out['reward_mean']:+.2f}"
            print(f"{name}: sampled held-out reward {change} ([{low:+.2f}, {high:+.2f}])")


if __name__ == "__main__":
    main()
