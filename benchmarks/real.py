"""`make real`: a published chat model learns the tickets on a CPU, is merged, quantized and aligned; tables at the end.

python benchmarks/real.py [--only sft,merge,quantization,dpo,ppo] [--output runs/real] [--rows 60] [--model BASE]
python benchmarks/real.py --base FOLDER|FILE --data ROWS      held-out loss of another base before and after a short SFT

Trains what is asked for every time; parts that are left out keep the figures of their last run in --output.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

FT = [sys.executable, "-m", "finetune"]
TEMPLATES = Path(__file__).parent.parent / "data_templates"
PARTS = ("sft", "merge", "quantization", "dpo", "ppo")
GROUPS = ("English", "Chinese")
SHOTS, LONGEST = 3, 128


class Folder:
    """Where the runs lie, and what was measured of them: figures.json, kept from one call to the next."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        path.mkdir(parents=True, exist_ok=True)
        self.figures = figures_in(path)
        if self.figures.get("model") != model:  # those of another are none of this one
            self.figures = {}
        self.figures |= {"model": model, "machine": f"{platform.machine()}, {threads()} threads"}

    def ft(self, name: str, *arguments: Any) -> None:
        """Run a command as a user would, and keep its seconds under `name`."""
        print("$ ft " + " ".join(map(str, arguments)), flush=True)
        begun = time.perf_counter()
        subprocess.run([*FT, *map(str, arguments)], check=True)
        self.figures.setdefault("seconds", {})[name] = round(time.perf_counter() - begun)
        print(flush=True)

    def keep(self, **figures: Any) -> None:
        self.figures |= figures
        text = json.dumps(self.figures, indent=1, ensure_ascii=False)
        (self.path / "figures.json").write_text(text + "\n", encoding="utf-8")

    def measured(self, name: str, *arguments: Any) -> list[dict[str, Any]]:
        """The metrics of `ft eval`, one of each model."""
        out = self.path / f"{name}.json"
        self.ft(name, "eval", *arguments, "--show", 0, "--json", out)
        return [{"name": run["name"], "n": run["n"], **run["metrics"]} for run in read(out)["runs"]]

    def recipe(self, name: str, model: Any, data: Any, dtype: str) -> Path:
        """A recipe of a model without a run, which says how it is evaluated."""
        values = {
            "version": 1, "stage": "sft", "model": {"name": str(model), "dtype": dtype},
            "data": {"train": "builtin:tickets/train"}, "eval": {"data": str(data), "max_new_tokens": LONGEST},
            "output": {"dir": str(self.path / name)},
        }  # fmt: skip
        path = self.path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path


def figures_in(path: Path) -> dict[str, Any]:
    """The figures of earlier calls."""
    found: dict[str, Any] = read(path / "figures.json") if (path / "figures.json").exists() else {}
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def threads() -> int:
    import torch

    return torch.get_num_threads()


def language(row: dict[str, Any]) -> str:
    return GROUPS[not row["messages"][0]["content"].splitlines()[0].isascii()]


def held_out(count: int, shots: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` held-out tickets of each language, after `shots` training tickets of the same, drawn for each row."""
    known: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for row in rows_of(TEMPLATES / "tickets_train.jsonl"):
        known[language(row)].append(row)
    draw, taken = random.Random(seed), dict.fromkeys(GROUPS, 0)
    for row in rows_of(TEMPLATES / "tickets_test.jsonl"):
        group = language(row)
        if taken[group] < count:
            taken[group] += 1
            shown = [turn for other in draw.sample(known[group], shots) for turn in other["messages"]]
            yield {"messages": [*shown, *row["messages"]], "group": group}


def write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# --- the parts ---


def sft(here: Folder, count: int) -> None:
    """Base without and with three tickets to look at, and tuned."""
    run = here.path / "sft"
    here.ft("sft", "sft", "--recipe", "smollm2_sft.yaml", *base(here), "--output", run)
    zero = write(here.path / "tickets.jsonl", held_out(count, 0))
    few = write(here.path / "tickets_three_shot.jsonl", held_out(max(1, count // 2), SHOTS))  # long: half of them
    before, after = here.measured("sft-eval", run, "--compare-base", "--data", zero)
    three = here.measured("three-shot-eval", "--recipe", here.recipe("base", here.model, few, "float32"))
    shown = {"base": before, "base, three-shot": three[0], "SFT": after}
    here.keep(tickets={**here.figures.get("tickets", {}), **shown}, sft=trained(run))


def merge(here: Folder, count: int) -> None:
    """The merged model's logits beside base + adapter."""
    here.ft("merge", "merge", "--adapter", here.path / "sft", "--output", here.path / "merged", "--overwrite")
    here.keep(merge=read(here.path / "merged" / "merge.json"))


def quantization(here: Folder, count: int) -> None:
    """Evaluation of the merged model in bfloat16, in 8 and in 4 bits: a third of the rows."""
    data = write(here.path / "tickets_few.jsonl", held_out(max(1, count // 3), 0))
    recipe = here.recipe("merged-bf16", here.path / "merged", data, "bfloat16")
    found = here.measured("quantization-eval", "--recipe", recipe, "--quantization", "none,int8,int4")
    names = [f"merged, {kind}" for kind in ("bfloat16", "int8", "int4")]
    here.keep(tickets={**here.figures.get("tickets", {}), **dict(zip(names, found, strict=True))})


def dpo(here: Folder, count: int) -> None:
    here.ft("dpo", "dpo", "--recipe", "smollm2_dpo.yaml", *start(here), "--output", here.path / "dpo")
    questions(here, count, "SFT", "sft")
    questions(here, count, "SFT -> DPO", "dpo")


def ppo(here: Folder, count: int) -> None:
    """With a reward model of the same pairs; at the end what it thinks of all answers."""
    reward = here.path / "reward"
    here.ft("reward", "reward", "--recipe", "smollm2_reward.yaml", *start(here), "--output", reward)
    here.keep(reward=here.measured("reward-eval", reward, "--limit", 2 * count)[0])
    more = ("--set", f"reward.model={reward}", "--output", here.path / "ppo")
    here.ft("ppo", "ppo", "--recipe", "smollm2_ppo.yaml", *start(here), *more)
    questions(here, count, "SFT -> PPO", "ppo")


def questions(here: Folder, count: int, name: str, run: str) -> None:
    """Answers to held-out questions, and of `sft` those of the base."""
    path = here.path / run
    alone = ("--compare-base",) if run == "sft" else ()
    found = here.measured(
        f"{run}-questions", path, *alone, "--data", "builtin:tickets/questions_test", "--limit", 2 * count
    )
    kept = here.figures.get("questions", {}) | {name: {**found[-1], **trained(path)}}
    here.keep(questions=({"base": found[0]} if alone else {}) | kept)


def trained(run: Path) -> dict[str, Any]:
    """Of a run: seconds, peak memory and, of PPO, how far it went."""
    result, rows = read(run / "result.json"), rows_of(run / "metrics.jsonl")
    found = {"seconds": result["seconds"], "steps": result["steps"], "peak_memory_gb": rows[-1].get("peak_memory_gb")}
    if "kl" in rows[-1]:
        found["kl"] = rows[-1]["kl"]
    held = result.get("eval") or {}
    return found | {key: held[key] for key in ("reward_before", "reward_mean", "reward_difference_ci") if key in held}


def base(here: Folder) -> tuple[str, ...]:
    return ("--set", f"model.name={here.model}", "--overwrite")


def start(here: Folder) -> tuple[str, ...]:
    return (*base(here), "--set", f"model.adapter={here.path / 'sft'}")


# --- another base ---


def another(path: Path, model: str, data: str) -> None:
    """Held-out loss before and after a few dozen updates of short rows."""
    here = Folder(path, model)
    settings = (
        "data.eval_split=64", "data.max_length=192", "data.on_error=drop", "data.on_overlong=drop",
        "data.max_dropped=0.9", "data.max_samples=600", "eval.data=null", "train.effective_batch_size=8",
        "train.max_steps=40", "train.learning_rate=5.0e-4", f"data.train={data}",
    )  # fmt: skip
    run = path / "sft"
    here.ft("sft", "sft", "--recipe", "smollm2_sft.yaml", *base(here), *(w for s in settings for w in ("--set", s)),
            "--output", run)  # fmt: skip
    before, after = here.measured("eval", run, "--compare-base", "--limit", 32)
    here.keep(before=before["loss"], before_ci=before["loss_ci"], after=after["loss"], after_ci=after["loss_ci"],
              n=after["n"], sft=trained(run))  # fmt: skip
    print(f"{model}: held-out loss {share(before, 'loss')} -> {share(after, 'loss')}, n={after['n']}, "
          f"{trained(run)['seconds']:.0f} s, peak {trained(run)['peak_memory_gb']} GB")  # fmt: skip


# --- tables ---


def share(metrics: dict[str, Any], key: str) -> str:
    if key not in metrics:
        return "–"
    low, high = metrics.get(f"{key}_ci", (None, None))
    return f"{metrics[key]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")


def table(columns: list[str], rows: list[list[str]]) -> None:
    for cells in (columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cells) + " |")
    print()


def report(figures: dict[str, Any]) -> None:
    """Markdown of everything that is known."""
    print(f"{figures['model']}, {figures['machine']}\n")
    if tickets := figures.get("tickets"):
        rows = [
            [name, str(m["n"] // 2), *(share(m, f"exact_match/{group}") for group in GROUPS),
             share(m, "field_accuracy"), f"{m['loss']:.3f}", f"{m['weights_gb']:.2f} GB",
             f"{m['tokens_per_second']:.0f}"]
            for name, m in tickets.items()
        ]  # fmt: skip
        exact = [f"exact match, {group} [95%]" for group in GROUPS]
        table(["held-out tickets", "rows each", *exact, "fields right", "loss", "weights", "tokens/s"], rows)
    if answers := figures.get("questions"):
        kinds = ("answerable", "unanswerable")
        rows = [
            [name, *(share(m, f"exact_match/{kind}") for kind in kinds), f"{m['kl']:.2f}" if "kl" in m else "",
             f"{m['seconds']:.0f} s, {m['steps']} steps" if "seconds" in m else ""]
            for name, m in answers.items()
        ]  # fmt: skip
        n = next(iter(answers.values()))["n"]
        table([f"held-out questions, n={n}", "right when answerable", "says so when not", "KL", "training"], rows)
    if reward := figures.get("reward"):
        print(f"reward model, held-out pairs: {share(reward, 'preference_accuracy')}, n={reward['n']}")
    for name, m in figures.get("questions", {}).items():
        if "reward_difference_ci" in m:
            low, high = m["reward_difference_ci"]
            print(f"{name}: sampled held-out reward {m['reward_before']:+.2f} -> {m['reward_mean']:+.2f} "
                  f"([{low:+.2f}, {high:+.2f}])")  # fmt: skip
    if found := figures.get("merge"):
        print(f"merged and unmerged logits differ by {found['max_logit_diff']:.3g} ({found['dtype']})")
    if "sft" in figures:
        print(f"SFT: {figures['sft']['seconds']:.0f} s, peak {figures['sft']['peak_memory_gb']} GB")
    print("whole commands: " + ", ".join(f"{name} {value} s" for name, value in figures.get("seconds", {}).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, in this order: " + ",".join(PARTS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--output", type=Path, help="runs/real, of --base runs/real-base")
    parser.add_argument("--rows", type=int, default=60, help="held-out tickets of each language")
    parser.add_argument("--base", help="another base: only its held-out loss, on --data")
    parser.add_argument("--data", help="training rows of --base")
    args = parser.parse_args()
    if (args.base is None) != (args.data is None):
        parser.error("--base and --data go together")
    if args.base is not None:
        return another(args.output or Path("runs/real-base"), args.base, args.data)
    output = args.output or Path("runs/real")
    parts = [part.strip() for part in args.only.split(",")]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))} (of {', '.join(PARTS)})")
    needs = {"merge": "sft", "dpo": "sft", "ppo": "sft", "quantization": "merged"}
    for part in parts:
        made = needs.get(part)
        first = "merge" if made == "merged" else made
        if (
            made
            and first not in parts
            and not ((output / made).exists() and figures_in(output).get("model", args.model) == args.model)
        ):
            parser.error(f"{part} needs {output / made} of {args.model}: run the part {first} first")
    here = Folder(output, args.model)
    run = {"sft": sft, "merge": merge, "quantization": quantization, "dpo": dpo, "ppo": ppo}
    for part in PARTS:
        if part in parts:
            run[part](here, args.rows)
    report(here.figures)


if __name__ == "__main__":
    main()
