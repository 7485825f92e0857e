"""Commands that are killed at every rename and fsync and at random moments, and go on as a user goes on.

    python tests/run/kill_drill.py FOLDER [--only sft] [--points 12] [--random 30] [--seed 1] [--part 1/4]

Everything is imported once; each run is a process forked from here, which kills itself with SIGKILL before or after its
N-th rename, replace, fsync, unlink or rmdir below FOLDER. After every kill:

    kept        a checkpoint that was complete once is complete still, or a newer one is; none is damaged
    unfinished  nothing looks finished that is not: result.json, an adapter, a merged model, a report
    the same    the command that goes on ends with the weights, losses and reports of a run that was never killed
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "run")]
WATCHED = ("replace", "rename", "fsync", "unlink", "rmdir")
REAL = {name: getattr(os, name) for name in (*WATCHED, "remove")}
MORE = ("dpo, start: merge", "sft on a GGUF file", "compare")
"""Only where they are named."""
Words = list[str]


@dataclass
class Drill:
    """A command, what goes on after a kill, and what must hold."""

    name: str
    folder: Path
    command: Words
    goes_on: Callable[[], list[Words]]
    """The commands to try after a kill, in this order, until one does not refuse (exit 2); [] when all is done."""
    check: Callable[[], list[str]]
    """What is wrong right after a kill."""
    outcome: Callable[[], Any]
    """What must be the same in the end."""

    def clean(self, stock: Path) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(stock, self.folder)


# --- in the process that is killed ---


def place_of(name: str, arguments: tuple[Any, ...], more: dict[str, Any]) -> str:
    """What an operation is on; of fsync the file behind the number."""
    given = arguments[0]
    if name == "fsync":
        number = given if isinstance(given, int) else given.fileno()
        return os.readlink(f"/proc/self/fd/{number}")
    text = os.fsdecode(given)
    if more.get("dir_fd") is not None:
        text = os.path.join(os.readlink(f"/proc/self/fd/{more['dir_fd']}"), text)
    return os.path.abspath(text)


def hooked(folder: Path, at: int | None, after: bool, log: int) -> None:
    """Count operations below `folder`, write each into `log`, and die at the `at`-th."""
    count = 0

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            try:
                place = place_of(name, arguments, more)
            except OSError:
                return real(*arguments, **more)
            if not place.startswith(str(folder)):
                return real(*arguments, **more)
            count += 1
            os.write(log, f"{name} {os.path.relpath(place, folder)}\n".encode())
            if count == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*arguments, **more)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    for name in WATCHED:
        setattr(os, name, wrapped(name, getattr(os, name)))
    os.remove = os.unlink


def part(*arguments: str, module: str = "finetune", shown: bool = False) -> tuple[int, str]:
    """In the place of `child.run`: a part of a command forked from it, which imports nothing anew and is not killed."""
    pid = os.fork()
    if not pid:
        for name, real in REAL.items():
            setattr(os, name, real)
        if module == "finetune":
            os.environ["FT_LAUNCH_PID"] = str(os.getppid())
            run_as_ft([*arguments])
        import runpy

        code = 1
        try:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return ended(pid), ""


def run_as_ft(words: Words) -> None:
    """This process becomes `ft …`, and ends."""
    code = 1
    try:
        sys.argv = ["ft", *words]
        from finetune import child
        from finetune.cli import main

        child.run = part
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(str(end.code or 0))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def start(words: Words, folder: Path, at: int | None = None, after: bool = False, log: Path | None = None) -> int:
    """The pid of a process that runs `ft …`; what it says goes to FOLDER.said."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    said = os.open(f"{folder}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if log is not None:
        hooked(folder, at, after, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    run_as_ft(words)
    return 0


def ended(pid: int) -> int:
    """The exit code, when nothing of it is running: a part of a killed command saves a checkpoint before it ends."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    end = time.monotonic() + 60
    with suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(pid, 0)
            time.sleep(0.01)
        raise SystemExit(f"parts of {pid} are running a minute after it ended")
    return code


# --- after a kill ---


def went_on(drill: Drill) -> list[str]:
    """What is wrong with going on, and with where that ends."""
    for words in drill.goes_on():
        code = ended(start(words, drill.folder))
        if code == 2:
            continue
        if code:
            said = Path(f"{drill.folder}.said").read_text()[-600:]
            return [f"ft {' '.join(words)} ended with {code}: {said}"]
        return []
    tried = drill.goes_on()
    said = Path(f"{drill.folder}.said").read_text()[-600:] if tried else ""
    return [f"every way to go on was refused: {said}"] if tried else []


def examined(drill: Drill, whole: Any) -> list[str]:
    """After a kill: what is wrong now, with going on, and with the end."""
    problems = drill.check() or went_on(drill) or drill.check()
    if not problems:
        now = drill.outcome()
        if now != whole:
            keys = [key for key in whole if now.get(key) != whole[key]] if isinstance(whole, dict) else []
            problems = [f"the end is another: {keys}"]
    return problems


def points_of(drill: Drill, stock: Path) -> tuple[list[str], float, Any]:
    """(the operations of a run that is not killed, its seconds, its outcome)."""
    log = Path(f"{drill.folder}.log")
    drill.clean(stock)
    begun = time.perf_counter()
    code = ended(start(drill.command, drill.folder, log=log))
    if code:
        raise SystemExit(f"{drill.name} without a kill ended with {code}: {Path(f'{drill.folder}.said').read_text()}")
    return log.read_text().splitlines(), time.perf_counter() - begun, drill.outcome()


def run(
    drill: Drill, stock: Path, points: int | None, moments: int, seed: int, part: tuple[int, int] = (1, 1)
) -> dict[str, Any]:
    """All of one drill, or its `part` (number, of how many). `points`: how many operations at most; each is killed
    before and after, or, when not all are taken, before or after."""
    draw = random.Random(f"{seed} {drill.name}")
    operations, seconds, whole = points_of(drill, stock)
    kills = [(n, after) for n in range(1, len(operations) + 1) for after in (False, True)]
    if points is not None and points < len(kills):
        kills = sorted(draw.sample(kills, points))
    shares = [draw.uniform(0, 1) for _ in range(moments)]
    kills, shares = kills[part[0] - 1 :: part[1]], shares[part[0] - 1 :: part[1]]
    found: list[str] = []
    missed = 0
    for number, after in kills:
        drill.clean(stock)
        code = ended(start(drill.command, drill.folder, number, after, Path(f"{drill.folder}.log")))
        where = (
            f"{drill.name}: {'after' if after else 'before'} {number} of {len(operations)} ({operations[number - 1]})"
        )
        if code != -signal.SIGKILL:  # another order of files in a folder may make it shorter
            missed += 1
            found += [f"{where}: ended with {code}"] if code else []
            continue
        found += [f"{where}: {problem}" for problem in examined(drill, whole)]
    for share in shares:
        drill.clean(stock)
        moment = share * seconds
        pid = start(drill.command, drill.folder, log=Path(f"{drill.folder}.log"))
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        where = f"{drill.name}: after {moment:.3f} of {seconds:.3f} s"
        found += [f"{where}: {problem}" for problem in examined(drill, whole)]
    return {
        "drill": drill.name, "operations": len(operations), "kills": len(kills) - missed, "moments": len(shares),
        "problems": found, "seconds": round(seconds, 2),
    }  # fmt: skip


# --- the commands ---


def weights(folder: Path) -> dict[str, str]:
    import xxhash
    from conftest import tensors

    return {key: xxhash.xxh3_128_hexdigest(t.contiguous().numpy().tobytes()) for key, t in tensors(folder).items()}


def training(name: str, folder: Path, recipe: dict[str, Any], stage: str, *flags: str) -> Drill:
    """A drill of `ft STAGE`; its run directory is FOLDER/run. With `flags` there is a finished run already."""
    from finetune.errors import UserError
    from finetune.models.sources import adapter_folder
    from finetune.run.checkpoints import damage
    from finetune.run.directory import Run, resumable

    found, path = Run(folder / "run"), str(folder / f"{name}.yaml")
    timed = ("tokens_per_second", "peak_memory_gb")

    def goes_on() -> list[Words]:
        again = [flag for flag in flags if flag not in ("--overwrite", "--resume")]
        if found.result.exists():
            steps = json.loads(found.result.read_text())["steps"]
            done = not flags or f"train.max_steps={steps}" in flags  # only what it replaced was still to go
            return [] if done else [[stage, path, *flags]]
        if resumable(found):
            return [[stage, path, "--resume", *again]]
        return [[stage, path], [stage, path, "--overwrite"]]

    def check() -> list[str]:
        problems = [f"{c.name} is damaged: {why}" for c in found.complete_checkpoints() if (why := damage(c))]
        log = Path(f"{folder}.log").read_text().splitlines()
        marked = [line for line in log[:-1] if line.startswith("replace run/checkpoints/") and "/complete." in line]
        if marked and not found.complete_checkpoints():
            problems.append("a complete checkpoint was there, and none is now")
        if found.result.exists():
            try:
                if json.loads(found.result.read_text())["status"] != "done":
                    problems.append("result.json does not say done")
                weights(found.adapter)
                adapter_folder(str(found.path))
            except (ValueError, KeyError, OSError, UserError) as error:
                problems.append(f"looks finished and is not: {error!r}")
        else:
            try:
                adapter_folder(str(found.path))
                problems.append("its adapter can be used, and it is not finished")
            except UserError:
                pass
        return problems

    def outcome() -> dict[str, Any]:
        rows = [{k: v for k, v in row.items() if k not in timed} for row in found.read_metrics()]
        result = json.loads(found.result.read_text())
        kept = {key: result[key] for key in ("status", "steps", "epochs", "train_loss", "eval")}
        passing = (".lock", ".replaced")
        names = sorted(
            p.name for p in found.path.iterdir() if p.name not in passing and p.suffix not in (".part", ".old")
        )
        return {"weights": weights(found.adapter), "rows": rows, "result": kept, "left": names}

    (folder.parent / "stock" / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return Drill(name, folder, [stage, path, *flags], goes_on, check, outcome)


def recipes(base: Path, folder: Path) -> dict[str, dict[str, Any]]:
    common: dict[str, Any] = {
        "version": 1, "model": {"name": str(base), "dtype": "float32"},
        "adapter": {"method": "lora", "r": 2, "lora_dropout": 0.1}, "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    train = {"effective_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1, "save_total_limit": 1}
    sft = {
        **common, "stage": "sft",
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64, "eval_split": 4},
        "train": {**train, "max_steps": 3, "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True},
    }  # fmt: skip
    ppo = {
        **common, "stage": "ppo", "data": {"train": str(folder / "prompts.jsonl"), "max_length": 32},
        "train": {**train, "max_steps": 2, "save_steps": 1, "lr_scheduler_type": "constant", "warmup_steps": 0},
        "ppo": {"max_new_tokens": 4, "num_mini_batches": 2, "missing_eos_penalty": 0.0},
        "reward": {"functions": [f"{folder / 'rule.py'}:score"]},
    }  # fmt: skip
    ppo["adapter"] = {"method": "lora", "r": 2}
    dpo = {
        **common, "stage": "dpo", "adapter": {"method": "adalora", "init_r": 4, "target_r": 2, "deltaT": 1},
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 64},
        "train": {**train, "max_steps": 3, "save_steps": 1},
    }  # fmt: skip
    on_first = {
        **dpo, "model": {**common["model"], "adapter": str(folder / "first")}, "dpo": {"start": "merge"},
        "adapter": {"method": "lora", "r": 2},
    }  # fmt: skip
    on_gguf = {**sft, "model": {"name": str(folder / "a base.gguf"), "dtype": "float32", "sanity_check": False}}
    compared = {**sft, "train": {**train, "max_steps": 2}}
    return {"sft": sft, "dpo": dpo, "ppo": ppo, "on_first": on_first, "on_gguf": on_gguf, "compared": compared}


def build(base: Path, place: Path, only: list[str]) -> list[tuple[Drill, Path]]:
    """The drills, each with a folder of what is there before its command."""
    from conftest import write_rows

    stock, folder = place / "stock", place / "drill"
    stock.mkdir(parents=True)
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} {i * 7 % 10}"}]}
        for i in range(20)
    ]
    write_rows(stock / "rows.jsonl", rows)
    write_rows(stock / "prompts.jsonl", [{"prompt": f"say {i * 37 % 100}"} for i in range(16)])
    letters = "sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text))"
    rule = f"def score(prompts, completions, **columns):\n    return [{letters} for text in completions]\n"
    (stock / "rule.py").write_text(rule)
    given = {name: json.loads(json.dumps(values)) for name, values in recipes(base, folder).items()}
    write_rows(
        stock / "pairs.jsonl", [{"prompt": f"say {i}", "chosen": f"{i} yes", "rejected": "no"} for i in range(16)]
    )
    sft, dpo, ppo = (training(name, folder, given[name], name) for name in ("sft", "dpo", "ppo"))
    found = [(sft, stock), (dpo, stock), (ppo, stock)]
    # What follows needs a finished run.
    finished = place / "finished"
    sft.clean(stock)
    if ended(start(sft.command, folder)):
        raise SystemExit(Path(f"{folder}.said").read_text())
    shutil.copytree(folder, finished)
    again = training("sft", folder, given["sft"], "sft", "--overwrite")
    again.name = "sft --overwrite"
    longer = training("sft", folder, given["sft"], "sft", "--resume", "--set", "train.max_steps=5")
    longer.name = "sft, more steps"
    found += [(again, finished), (longer, finished)]
    merged, report, answers = folder / "merged", folder / "report.json", folder / "answers.jsonl"
    Path(f"{folder}.log").touch()

    def merge_check() -> list[str]:
        if not merged.exists():
            return []
        try:
            json.loads((merged / "merge.json").read_text())
            return [] if weights(merged) else ["no weights"]
        except (OSError, ValueError) as error:
            return [f"the merged model looks whole and is not: {error!r}"]

    def report_check() -> list[str]:
        try:
            return [] if not report.exists() or json.loads(report.read_text()) else ["an empty report"]
        except ValueError:
            return ["half a report"]

    run = str(folder / "run")
    merging = ["merge", run, "--output", str(merged)]
    evaluating = ["eval", run, "--data", str(folder / "rows.jsonl"), "--limit", "4", "--json", str(report)]
    writing = ["generate", run, "--data", str(folder / "rows.jsonl"), "--output", str(answers)]
    found += [
        (Drill("merge", folder, merging, lambda: [] if merged.exists() else [merging], merge_check,
               lambda: weights(merged)), finished),
        (Drill("merge --overwrite", folder, [*merging, "--overwrite"],
               lambda: [[*merging, "--overwrite"]], merge_check, lambda: weights(merged)), place / "merged"),
        (Drill("eval", folder, evaluating, lambda: [evaluating], report_check, lambda: stable(report)), finished),
        (Drill("generate", folder, writing,
               lambda: [[*writing, "--resume"], writing], lambda: [], lambda: answers.read_text()), finished),
    ]  # fmt: skip
    found += more(given, stock, finished, place, only)
    if not only or "merge --overwrite" in only:
        shutil.rmtree(folder)
        shutil.copytree(finished, folder)
        if ended(start(merging, folder)):
            raise SystemExit(Path(f"{folder}.said").read_text())
        shutil.copytree(folder, place / "merged")
    return [(drill, what) for drill, what in found if not only or drill.name in only]


def more(given: dict[str, Any], stock: Path, finished: Path, place: Path, only: list[str]) -> list[tuple[Drill, Path]]:
    """Those of MORE that are named."""
    folder, found = place / "drill", list[tuple[Drill, Path]]()
    names = dict(zip(MORE, ("on_first", "on_gguf", "compared"), strict=True))
    for name in only:
        if name not in names:
            continue
        where = place / names[name]
        shutil.copytree(finished if name == MORE[0] else stock, where)
        if name == MORE[0]:
            (where / "run").rename(where / "first")
        if name == MORE[1]:
            sys.path.append(str(ROOT / "tests" / "models"))
            import gguf_tiny

            gguf_tiny.write(where / "a base.gguf")
        (where / f"{names[name]}.yaml").write_text(json.dumps(given[names[name]]), encoding="utf-8")
        if name != MORE[2]:
            drill = training(names[name], folder, given[names[name]], "dpo" if name == MORE[0] else "sft")
        else:
            result = folder / "c" / "compare.json"
            words = [
                "compare",
                str(folder / "compared.yaml"),
                "--methods",
                "lora,bitfit",
                "--output",
                str(folder / "c"),
            ]
            drill = Drill(
                name, folder, words, lambda result=result, words=words: [] if result.exists() else [words], lambda: [],
                lambda result=result: stable(result),
            )  # fmt: skip
        drill.name = name
        found.append((drill, where))
    return found


def stable(report: Path) -> Any:
    """A report without what the clock says."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            clock = ("seconds", "per_second", "date", "time", "memory", "overhead", "backward_share")
            return {k: kept(v) for k, v in value.items() if not any(word in k for word in clock)}
        return [kept(item) for item in value] if isinstance(value, list) else value

    return kept(json.loads(report.read_text()))


def warm() -> None:
    """Everything that is slow to import, before the first fork; garbage is not looked for in it."""
    import gc
    import importlib

    from conftest import shorten
    from matplotlib import pyplot  # noqa: F401

    from finetune.terminal import noise

    noise.silence()
    noise.silence_bars()
    for name in ("sft", "dpo", "ppo", "merge", "evaluate", "generate"):
        importlib.import_module(f"finetune.commands.{name}")
    shorten(setattr)
    gc.collect()
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help=f"also {', '.join(MORE)}, which take long")
    parser.add_argument("--points", type=int)
    parser.add_argument("--random", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="1/1", help="2/6: the second of six parts of every drill")
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", COLUMNS="200")
    warm()
    print(f"seed {given.seed}", flush=True)
    number, of = map(int, given.part.split("/"))
    wrong = 0
    for drill, stock in build(given.base, given.folder.resolve(), given.only):
        found = run(drill, stock, given.points, given.random, given.seed, (number, of))
        wrong += len(found["problems"])
        print(json.dumps(found), flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
