"""`make bench`: ft beside what people would pick instead, on the same work, in interleaved pairs.

    python benchmarks/peers/compare.py [--only sft,smollm2,packed,defaults,dpo,dpo-defaults,ppo,ppo-defaults]
        [--pairs 10] [--folder DIR] [--cuda]

Makes the workload and an environment per peer, runs every contestant in turn, and writes benchmarks/RESULTS.md, where
the tables of what is not in DIR stay as they are. A run that is there already is not repeated: the command goes on
where it was stopped.

Measured are processor seconds (user and system) of an epoch after the first, in one thread, which other work on the
machine leaves as they are, within some percent. `hook/sitecustomize.py` takes them, in the same way for everybody. With
`--cuda` everybody runs on the GPU, and it is seconds on the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contestants
from contestants import DPO, EPOCHS, LENGTH, PPO, SFT, Places

HERE = Path(__file__).parent
RESULTS = {"cpu": HERE.parent / "RESULTS.md", "wall": HERE.parent / "RESULTS-cuda.md"}
"""By the clock."""
Runs = dict[int, dict[str, Any] | None]
"""By number, those of one contestant; None for one that failed. Runs of one number followed each other."""
CLOCK = "cpu"
"""Of the hook's events: cpu or wall."""
T_95 = [12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]  # Student's, of 1 to 9 degrees of freedom
VENVS = {"trl": "trl", "llamafactory": "llamafactory", "ms-swift": "ms-swift", "axolotl": "axolotl", "trl112": "trl"}
BATCH = {"sft": 8, "smollm2": 4, "packed": 8, "defaults": 8, "dpo": 4, "dpo-defaults": 4, "ppo": 4,
         "ppo-defaults": 4}  # fmt: skip
OWN = """
Their own: ft bfloat16 where that is timed as faster, as here, and activations kept; trl bfloat16 and activations
recomputed; LLaMA-Factory and ms-swift float32 and activations recomputed. That pays time for memory: of it ft needs
the most. axolotl takes float16 where it finds no GPU with bfloat16, and processors are slow in it: one pair."""
NOTES = {
    "defaults": OWN,
    "dpo-defaults": OWN,
    "dpo": """
ft scores each pair with the reference once, before the first step, trl and LLaMA-Factory in every step; an epoch after
the first has none of it. `python benchmarks/peers/same_order.py` measures it, and compares the losses of ft with trl's
over batches in trl's order: they are the same.""",
}
"""What has to be known beside a table."""
ONCE = {("defaults", "axolotl"), ("dpo-defaults", "axolotl")}
"""Forty times as slow as the others: one pair."""
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("SFT, equal settings, no packing", SFT),
    "smollm2": (
        "SFT, equal settings, no packing, SmolLM2-135M's shape, 12 of the chats, batch 4",
        {k: SFT[k] for k in ("ft", "bare trl script", "LLaMA-Factory", "ms-swift")},
    ),
    "packed": (
        f"SFT, equal settings, packed into rows of {LENGTH}",
        {k: SFT[k] for k in ("ft", "trl CLI", "LLaMA-Factory")},
    ),
    "defaults": ("SFT, each tool's own defaults", SFT),
    "dpo": ("DPO, equal settings", DPO),
    "dpo-defaults": ("DPO, each tool's own precision, checkpointing and attention", DPO),
    "ppo": ("PPO, equal settings", PPO),
    "ppo-defaults": ("PPO, each tool's own precision and checkpointing", PPO),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(TASKS))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    parser.add_argument("--report", action="store_true", help="measure nothing more")
    parser.add_argument("--contestants", default="", help="only these, by name, and ft")
    parser.add_argument("--cuda", action="store_true", help="on the GPU, by the clock")
    given = parser.parse_args()
    global CLOCK
    CLOCK = "wall" if given.cuda else "cpu"
    folder = given.folder.resolve()
    if not given.report:
        workload(folder)
        for number in range(given.pairs):
            for task in given.only.split(","):
                for name in TASKS[task][1]:
                    if number and (task, name) in ONCE:
                        continue
                    if not given.contestants or name in ("ft", *given.contestants.split(",")):
                        measured(folder, task, name, number)
    found = {task: results(folder, task) for task in TASKS}
    RESULTS[CLOCK].write_text(report(folder, found), encoding="utf-8")
    if other := [f"{name} ({task})" for task, runs in found.items() for name in unequal(runs)]:
        raise SystemExit(f"no comparison of equals: {', '.join(other)} train another number of label tokens than ft")


def workload(folder: Path) -> None:
    """Rows, base, a reward model, and an environment for each peer."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "load" / "workload.json").exists():
        run([sys.executable, str(HERE / "workload.py"), str(folder / "load")], {}, folder / "workload.log")
    for name in VENVS:
        if (folder / "venvs" / name).exists():
            continue
        print(f"installing {name}", flush=True)
        place = folder / "venvs" / name
        python = str(place / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        run([python, "-m", "pip", "install", "-r", str(HERE / f"requirements-{name}.txt")], {}, folder / f"{name}.log")
        if name == "llamafactory":  # pip takes torchvision and torchaudio of CUDA, with which nothing can be imported
            run([python, "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio"], {}, folder / f"{name}.log")
            stub = next(place.glob("lib/python*/site-packages")) / "torchaudio"
            stub.mkdir(exist_ok=True)
            (stub / "__init__.py").touch()
        if name == "axolotl":  # what it pins cannot be resolved without CUDA
            names = ["axolotl==0.19.0", "torchao==0.17.0", "liger-kernel==0.8.1", "bitsandbytes==0.50.2"]
            run([python, "-m", "pip", "install", "--no-deps", *names], {}, folder / f"{name}.log")
    if not (folder / "load" / "reward" / "result.json").exists():
        place = Places(folder / "load", folder / "venvs", folder / "load", 4)
        command, more = contestants.ft("reward")(place)
        run(command, more, folder / "reward.log")


def run(command: list[str], more: dict[str, str], log: Path, hook: Path | None = None) -> int:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        **({"CUDA_VISIBLE_DEVICES": ""} if CLOCK == "cpu" else {}),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", **more,
    }  # fmt: skip
    ours = str(HERE.parent.parent) if command[0] == sys.executable else ""
    environment["PYTHONPATH"] = os.pathsep.join(part for part in (hook and str(HERE / "hook"), ours) if part)
    if hook is not None:
        environment["FT_BENCH_LOG"] = str(hook)
    with log.open("a", encoding="utf-8") as file:
        return subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def measured(folder: Path, task: str, name: str, number: int) -> None:
    """One run of one contestant, unless it is there."""
    work = folder / "results" / task / name.replace(" ", "_") / str(number)
    if (work / "events.jsonl").exists() and (work / "done").exists():
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    load = folder / "load"
    place = Places(
        load / "few" if task == "smollm2" else load, folder / "venvs", work, BATCH[task], task == "packed",
        "defaults" in task, CLOCK == "wall", str(load / "base-135m") if task == "smollm2" else None,
    )  # fmt: skip
    command, more = TASKS[task][1][name](place)
    code = run(command, more, work / "log.txt", work / "events.jsonl")
    (work / "done").write_text(str(code), encoding="utf-8")
    shutil.rmtree(work / "out", ignore_errors=True)
    shutil.rmtree(work / "prepared", ignore_errors=True)
    found = figures(work, task)
    print(f"{task} {number} {name}: {found if found else f'failed with {code}, see {work}/log.txt'}", flush=True)


def figures(work: Path, task: str) -> dict[str, Any] | None:
    """Of a run that went through: seconds of its last epoch (PPO: of a rollout after the first), what it trained on."""
    if (work / "done").read_text() != "0" or not (work / "events.jsonl").exists():
        return None
    events = [json.loads(line) for line in (work / "events.jsonl").read_text().splitlines()]
    peak = max((e["peak_mb"] for e in events if e["event"] == "end"), default=0.0)  # of a program and its launcher
    wanted = [e for e in events if e["event"] == ("rollout" if task.startswith("ppo") else "pass")]
    if task.startswith("ppo"):
        part = wanted[1:]
        if len(wanted) < 2:
            return None
        seconds = (part[-1][CLOCK] - wanted[0][CLOCK]) / len(part)
        return {"seconds": seconds, "rollouts": len(wanted), "peak_mb": peak, "loss": wanted[-1]["loss"]}
    if wanted and work.parent.name == "ft":  # the longest rows go through once before the first step
        wanted = wanted[1:]
    steps = len(wanted) // EPOCHS
    if not steps or len(wanted) % EPOCHS:
        return None
    part = wanted[steps:]
    return {
        "seconds": part[-1][CLOCK] - wanted[steps - 1][CLOCK], "inside": sum(e["spent"] for e in part), "steps": steps,
        "labels": sum(e["labels"] or 0 for e in part), "positions": sum(math.prod(e["shape"]) for e in part),
        "peak_mb": peak, "first": wanted[0]["cpu"], "losses": [e["loss"] for e in wanted],
        "tokens": sum(e.get("real") or 0 for e in part),
    }  # fmt: skip


def results(folder: Path, task: str) -> dict[str, Runs]:
    """By contestant, its runs."""
    found: dict[str, Runs] = {}
    for name in TASKS[task][1]:
        place = folder / "results" / task / name.replace(" ", "_")
        runs = sorted((p for p in place.glob("*") if (p / "done").exists()), key=lambda p: int(p.name))
        if runs:
            found[name] = {int(run.name): figures(run, task) for run in runs}
    return found


def ratio(theirs: Runs, ours: Runs) -> tuple[float, float, float, int] | None:
    """(mean, 95% interval, pairs) of theirs / ours, in logarithms, as ratios are symmetrical there."""
    both = [(theirs[n], ours[n]) for n in theirs.keys() & ours.keys()]
    pairs = [math.log(t["seconds"] / o["seconds"]) for t, o in both if t and o]
    if not pairs:
        return None
    mean = statistics.fmean(pairs)
    if len(pairs) == 1:
        return math.exp(mean), float("nan"), float("nan"), 1
    half = (T_95[len(pairs) - 2] if len(pairs) <= 10 else 2.0) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(pairs)


def report(folder: Path, found: dict[str, Any]) -> str:
    about = json.loads((folder / "load" / "workload.json").read_text(encoding="utf-8"))
    measure = "processor seconds (user and system) of one thread" if CLOCK == "cpu" else "seconds by the clock"
    head = f"""# Side by side

`make bench` writes this page (`python benchmarks/peers/compare.py`). Every figure is {measure}:
other work on the machine moves them by up to a third, but all alike, as every contestant runs under the same
conditions, in turn, and a ratio is of runs that followed each other. Ratios above 1: ft needs less. In brackets the 95%
interval of the mean ratio over n pairs; one pair has none, and a difference of a tenth is noise then. Positions are
tokens with their padding. Outside is the share of an epoch that is spent neither in the forward nor in the backward
pass: ft writes a checkpoint at the end of each epoch, the others were told to write none. A loss is that of the first
step and the mean of the last epoch's.
"""
    lines = [
        head,
        f"Base: a Llama of {about['parameters'] / 1e6:.1f}M parameters with random weights, vocabulary 6,144. SFT: "
        f"{about['chats']} chats of {about['median']:,} tokens in the median and {about['longest']:,} at most, "
        f"batch 8. DPO: 32 pairs, batch 4. PPO: 16 prompts "
        "a rollout with at most 48 tokens each, 2 passes of 4 minibatches. What all are told stands in",
        "[peers/contestants.py](peers/contestants.py): LoRA r 8 on all linear layers, float32, AdamW at constant 1e-3,",
        "no gradient checkpointing, seed 42; `defaults` leaves each its own precision, checkpointing and attention.",
        "",
        f"Machine: {machine()}.", "",
        "| contestant | version |", "|---|---|", *versions(folder), "",
    ]  # fmt: skip
    page = RESULTS[CLOCK]
    before = page.read_text(encoding="utf-8").split("\n## ") if page.is_file() else []
    for task, (title, _) in TASKS.items():
        if runs := found[task]:
            command = f"`python benchmarks/peers/compare.py --only {task}`"
            lines += [f"## {title}", "", command, "", *table(task, runs), NOTES.get(task, ""), ""]
        else:
            lines += [f"## {section.rstrip()}\n" for section in before if section.startswith(f"{title}\n")]
    titles = ("# ", "GPU\n", *(f"{title}\n" for title, _ in TASKS.values()))
    lines += [f"## {section.rstrip()}\n" for section in before if not section.startswith(titles)]  # of other commands
    if CLOCK == "cpu":
        lines += ["## GPU", "", "Not run: no GPU was at hand (`--cuda` is for such a machine, and untried).", ""]
    return "\n".join(lines)


def table(task: str, runs: dict[str, Runs]) -> list[str]:
    ours = runs.get("ft", {})
    unit = ("CPU-s" if CLOCK == "cpu" else "s") + (" a rollout" if task.startswith("ppo") else " an epoch")
    lines = [
        f"| | {unit} | against ft | n | label tokens | positions | loss, first → last epoch | outside | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, listed in runs.items():
        good = [run for run in listed.values() if run]
        if not good:
            lines.append(f"| {name} | does not run | | {len(listed)} | | | | | |")
            continue
        seconds = statistics.median(run["seconds"] for run in good)
        compared = ratio(listed, ours)
        against = "1"
        if name != "ft":
            interval = (
                "" if compared is None else "one pair" if compared[3] == 1 else f"{compared[1]:.2f}–{compared[2]:.2f}"
            )
            against = "" if compared is None else f"**{compared[0]:.2f}** ({interval})"
        count = len(good) if name == "ft" or compared is None else compared[3]
        losses = good[-1].get("losses") or [good[-1]["loss"]]
        last = statistics.fmean(losses[len(losses) // EPOCHS :])
        shown = f"{losses[0]:.4f} → {last:.4f}" if len(losses) > 1 else f"{losses[0]:.4f}"
        outside = [1 - run["inside"] / run["seconds"] for run in good if "inside" in run]
        apart = f"{statistics.median(outside):.1%}" if outside else ""
        peak = statistics.median(run["peak_mb"] or 0 for run in good)
        trained, positions = (
            f"{good[-1].get(key) or 0:,}" if good[-1].get(key) else "" for key in ("labels", "positions")
        )
        if name == "ft" and task.startswith("dpo"):  # the batch is cut to its tokens after it was counted
            positions = f"≤ {good[-1]['tokens']:,}"
        cells = [name, f"{seconds:.2f}", against, count, trained, positions, shown, apart, f"{peak:,.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if not task.startswith("ppo"):
        other = unequal(runs)
        said = f"Not the same label tokens as ft: {', '.join(other)}." if other else "All train the same label tokens."
        lines += ["", said]
    return lines


def unequal(runs: dict[str, Runs]) -> list[str]:
    """Contestants that train another number of label tokens in an epoch than ft."""
    labels = {name: {run.get("labels") for run in listed.values() if run} for name, listed in runs.items()}
    return [name for name, counts in labels.items() if counts and counts != labels.get("ft")]


def machine() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return f"{name or platform.processor()}, {os.cpu_count()} cores, shared; one thread; {platform.system()}"


def versions(folder: Path) -> list[str]:
    ours = ", ".join(f"{name} {version(name)}" for name in ("trl", "torch", "transformers", "peft"))
    lines = [f"| ft | this checkout, {ours} |"]
    for name, package in VENVS.items():
        python = folder / "venvs" / name / "bin" / "python"
        if python.exists():
            wanted = [package, "torch", "transformers", "peft"]
            code = (
                f"from importlib.metadata import version; print(*(p + ' ' + version(p) for p in {wanted!r}), sep=', ')"
            )
            said = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False).stdout
            lines.append(f"| {name} | {said.strip()} |")
    return lines


if __name__ == "__main__":
    main()
