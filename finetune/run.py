"""The run directory: what a training run leaves behind.

    recipe.yaml  adapter/ | model/  metrics.jsonl  result.json  report.html  loss.png  checkpoints/

`open_run` refuses a directory that already holds results; result.json is written last and atomically, so a directory
without it is unfinished. A lock keeps two processes out of one directory. --overwrite takes only what a run of ours
wrote, known by its recipe.yaml, and keeps it in .replaced/ until the new run is finished.
"""

from __future__ import annotations

import glob
import json
import math
import os
import platform
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from finetune import places
from finetune.errors import Interrupted, Problem, UserError
from finetune.recipe.file import to_yaml
from finetune.recipe.sections import SourceConfig
from finetune.recipe.stages import Recipe
from finetune.terminal.progress import command, shown_path, warn

# Everything a run writes; --overwrite removes these and nothing else.
CONTENTS = (
    "recipe.yaml", "adapter", "model", "metrics.jsonl", "result.json", "report.html", "loss.png", "checkpoints",
    "samples.jsonl", "reward.yaml", "reward", "start", "start.part",
)  # fmt: skip
MARK = "# Written by ft: the recipe of the run in this folder, which --overwrite replaces."
LOCK = ".lock"
ASIDE = ".replaced"  # what --overwrite replaces, until the new run is finished
CHECKPOINT_COMPLETE = "complete"  # written last into a checkpoint: without it the checkpoint is half-written
SUMMED_BELOW = 1 << 26  # files of a checkpoint up to 64 MiB have a checksum; of larger ones the size is known
# What a recipe may name by another path when a run goes on: it is the content that must be the same.
PLACES = (
    "output.dir", "model.name", "model.adapter", "model.tokenizer", "model.chat_template", "data.train", "eval.data",
    "reward.model", "reward.train", "reward.functions",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Replies of PPO's rollouts."""
        return self.path / "samples.jsonl"

    @property
    def reward(self) -> Path:
        """The reward model that `ft ppo` trains first."""
        return self.path / "reward"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def complete_checkpoints(self) -> list[Path]:
        """Newest first."""
        return [path for path in checkpoints_of(self.checkpoints) if (path / CHECKPOINT_COMPLETE).exists()]

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(iter(self.complete_checkpoints()), None)

    def usable_checkpoint(self) -> Path | None:
        """The newest complete checkpoint that can be read; what is wrong with newer ones is said. None without any.

        UserError when there are some and none can be read.
        """
        found = self.complete_checkpoints()
        reasons: list[str] = []
        for path in found:
            if (reason := damage(path)) is None:
                for broken, why in zip(found, reasons, strict=False):
                    warn(f"{broken} is damaged ({why}): going on from {path.name}")
                    (broken / CHECKPOINT_COMPLETE).unlink()  # from now on it is as if half-written
                return path
            reasons.append(reason)
        if found:
            fix = "start again with --overwrite"
            raise UserError(
                [Problem(f"is damaged ({why})", path, fix=fix) for path, why in zip(found, reasons, strict=True)]
            )
        return None

    def append_metrics(self, row: dict[str, Any]) -> None:
        append_lines(self.metrics, [row])

    def read_metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics)

    def forget_after(self, step: int) -> None:
        """Drop the metrics and samples of steps that a resumed run will take again, and lines that a kill cut off."""
        for path in (self.metrics, self.samples):
            if path.exists():
                rows = [row for row in read_lines(path) if row.get("step", 0) <= step]
                write_atomically(path, "".join(map(as_line, rows)))

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.result, {**result, "versions": versions()})


def checkpoints_of(folder: Path) -> list[Path]:
    """Every checkpoint-STEP in it, complete or not, newest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def complete(checkpoint: Path, **known: Any) -> None:
    """Mark a checkpoint in which everything is, with what is in it and what has to be known to go on."""
    places.as_umask(checkpoint)
    files = {str(p.relative_to(checkpoint)): _size(p) for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    files.pop(CHECKPOINT_COMPLETE, None)
    write_json(checkpoint / CHECKPOINT_COMPLETE, {"files": files, **known})


def known_of(checkpoint: Path) -> dict[str, Any]:
    """What `complete` was told; nothing of checkpoints of earlier versions."""
    try:
        found = json.loads((checkpoint / CHECKPOINT_COMPLETE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rotate(folder: Path, keep: int, best: str | None = None) -> None:
    """Keep the newest `keep` complete checkpoints of a folder, and the best one; also half-written ones go.

    To be called when a new one is complete: then there is never a moment without one.
    """
    found = checkpoints_of(folder)
    done = [path for path in found if (path / CHECKPOINT_COMPLETE).exists()]
    for old in found:
        if old not in done[:keep] and (old not in done or old.name != best) and not old.is_symlink():
            shutil.rmtree(old)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a complete checkpoint; None when all of it can be read."""
    files = known_of(checkpoint).get("files")
    if files is None:
        if (checkpoint / CHECKPOINT_COMPLETE).stat().st_size:
            return f"{CHECKPOINT_COMPLETE} cannot be read"
        ours = {"state.json"} if (checkpoint / "state.json").exists() else {"trainer_state.json", "scheduler.pt"}
        files = dict.fromkeys({"optimizer.pt"} | ours | {p.name for p in checkpoint.iterdir() if p.is_file()})
        files.pop(CHECKPOINT_COMPLETE)
        if not any(name.endswith((".safetensors", ".bin")) for name in files):
            return "it holds no weights"
    for name, size in sorted(files.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if size is not None and size != _size(path):
            return f"{name} is not what was written"
        if not _readable(path):
            return f"{name} cannot be read"
    return None


def _size(path: Path) -> list[int]:
    """[bytes, checksum of small files]"""
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes())] if size <= SUMMED_BELOW else [size]


def _readable(path: Path) -> bool:
    """Whether a file is whole, as far as its form tells."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth"):
            zipfile.ZipFile(path).close()  # its directory stands at the end
        elif path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(length := struct.unpack("<Q", file.read(8))[0]))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            return path.stat().st_size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile):
        return False
    return True


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(as_line, rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of our own JSON lines. What a kill or a full disk has cut off is left out.

    A line ends at a newline only: texts may hold U+2028, at which str.splitlines would cut.
    """
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def as_line(row: dict[str, Any]) -> str:
    return json.dumps(strict(row), ensure_ascii=False, allow_nan=False) + "\n"


def strict(value: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomically(path: Path, content: str | bytes) -> None:
    """Whole or not at all. Never through a link: one at `path` is replaced itself."""
    temporary = places.fresh(path)
    try:
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, escaped(json.dumps(strict(value), ensure_ascii=False, indent=2, allow_nan=False)) + "\n")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines, all or none."""
    lines = [json.dumps(strict(row), ensure_ascii=False, allow_nan=False) for row in rows]
    write_atomically(path, "".join(f"{escaped(line)}\n" for line in lines))


def escaped(text: str) -> str:
    """JSON as it is, or in ASCII where it holds halves of surrogate pairs, of rows or of file names."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=2 if "\n" in text else None)
    return text


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "datasets", "tokenizers")
    return {
        "ft": metadata.version("ft-recipes"),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested mappings differ."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(prefix + key)
    return found


def check_output(
    directory: str | Path, overwrite: bool, resume: bool, say: Callable[[str], None] | None = None
) -> None:
    """UserError if results would be lost or written where they must not be. Writes nothing.

    Args:
        say: told when something is there already, which then is no error.
    """
    run = Run(Path(directory).expanduser())
    places.check_folder(run.path, "output.dir")
    check_links(run)
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other", fix="give one of them")
    if resume:
        if run.result.exists():
            raise UserError("this run is finished, there is nothing to resume", path=run.path, fix="use --overwrite")
        if not resumable(run):
            raise UserError("holds no complete checkpoint", path=run.checkpoints, fix="start it again with --overwrite")
    elif overwrite:
        check_ours(run)
    elif (there := taken(run)) is not None and say is not None:
        say(f"{there}; this dry run goes on")
    elif there is not None:
        raise UserError(there)


def taken(run: Run) -> Problem | None:
    """What a run that neither goes on nor overwrites finds in its way."""
    if run.result.exists() and is_ours(run):
        fix = "use --output DIR or --overwrite"
        return Problem("already holds the results of a run", path=run.path, key="output.dir", fix=fix)
    if run.path.exists() and any(path.name != LOCK for path in run.path.iterdir()):
        choices = ["--resume to go on"] if resumable(run) else []
        choices += ["--overwrite to start again"] if is_ours(run) or (run.path / ASIDE).is_dir() else []
        choices += ["--output DIR"]
        return Problem("already holds files", path=run.path, key="output.dir", fix=f"use {', or '.join(choices)}")
    return None


GO_ON = "FT_GO_ON_WITH"
"""Set for a run that is a part of another: the command that goes on with the whole."""


def to_go_on(recipe: Recipe) -> str:
    """The command that goes on with a run."""
    file = shown_path(Path(recipe.output.dir).expanduser() / "recipe.yaml")
    return os.environ.get(GO_ON) or command(recipe.stage, "--recipe", file, "--resume")


def to_start_again(
    stage: str, reference: str, overrides: Sequence[str], output: str | None, resume: bool, overwrite: bool,
    dry_run: bool, recipe: Recipe | None,
) -> str:  # fmt: skip
    """The command of a run that was interrupted before it had a checkpoint, as it can be given now."""
    begun = recipe is not None and not (resume or dry_run) and taken(Run(Path(recipe.output.dir).expanduser()))
    flags = {"--resume": resume, "--overwrite": overwrite or bool(begun), "--dry-run": dry_run}
    given = [part for item in overrides for part in ("--set", item)] + (["--output", output] if output else [])
    again = command(stage, "--recipe", reference, *given, *(name for name, wanted in flags.items() if wanted))
    return os.environ.get(GO_ON) or again


def resumable(run: Run) -> bool:
    return run.last_checkpoint() is not None or run.reward.is_dir()


def is_ours(run: Run) -> bool:
    """Whether a run of ours, finished or not, wrote what is in this directory.

    Its recipe.yaml says so, and names this directory: a copy of it says nothing about the files beside it. A finished
    run may have been moved.
    """
    path = run.path / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        named = Path(values["output"]["dir"]).resolve() == run.path.resolve()
        stage = values["stage"]
    except (OSError, UnicodeError, yaml.YAMLError, TypeError, KeyError, ValueError, RecursionError):
        return False
    result = places.read_json(run.result)
    versions = result.get("versions")
    done = result.get("stage") == stage and isinstance(versions, dict) and "ft" in versions
    return done or (named and MARK in text)


WEIGHTS = ("", ".json", ".safetensors", ".jinja", ".model", ".bin", ".pt")  # what lies in adapter/ and model/


def check_ours(run: Run) -> None:
    """UserError for anything that --overwrite would take and no run of ours wrote."""
    fix = "move it away, or use --output DIR"
    held = [name for name in CONTENTS if os.path.lexists(run.path / name)]
    if held and not is_ours(run):
        what = f"holds files that no run of ft wrote ({', '.join(held[:3])}{' …' if held[3:] else ''})"
        raise UserError(what, path=run.path, key="output.dir", fix="use --output DIR")
    aside = run.path / ASIDE
    if os.path.lexists(aside) and not (aside.is_dir() and {path.name for path in aside.iterdir()} <= set(CONTENTS)):
        raise UserError("is nothing that ft wrote", path=aside, key="output.dir", fix=fix)
    # Conversions of a model are made beside its weights, and are a user's; so are notes.
    for path in (path for folder in (run.adapter, run.model) if folder.is_dir() for path in folder.iterdir()):
        if path.suffix not in WEIGHTS and path.name not in ("README.md", "vocab.txt", "merges.txt"):
            raise UserError("is nothing that a run of ft wrote", path=path, key="output.dir", fix=fix)


def check_links(run: Run) -> None:
    """UserError for a link where a run writes."""
    held = [run.path / name for name in (*CONTENTS, LOCK, ASIDE)]
    for path in (*held, *(path for folder in held if folder.is_dir() for path in folder.rglob("*"))):
        if path.is_symlink():
            what = "is a link, and nothing is written through links"
            raise UserError(what, path=path, key="output.dir", fix="put the file itself there, or use --output DIR")


def check_inputs(recipe: Recipe, reference: Path | None = None) -> None:
    """UserError when something that the run reads is what --overwrite replaces.

    Args:
        reference: the recipe's file. The run's own recipe.yaml may be run again.
    """
    places.check_folder(Path(recipe.output.dir).expanduser(), "output.dir")
    directory = Path(recipe.output.dir).expanduser().resolve()
    going = [directory / name for name in (*CONTENTS, ASIDE)]
    given = [(key, [path, path / "adapter", path / "model"]) for key, path in model_inputs(recipe)]
    given += [(key, paths_of(pattern)) for key, pattern in data_inputs(recipe)]
    if reference is not None and reference.resolve() != directory / "recipe.yaml":
        given.append(("--recipe", [reference]))
    problems = []
    for key, paths in given:
        whole = key in DATA_KEYS and paths[0].is_dir()  # all that is below it is read
        read = {path.resolve() for path in (*paths, *links_in(paths[0], whole)) if os.path.exists(path)}
        inside = any(path.is_relative_to(gone) for path in read for gone in going)
        if inside or directory in read or (whole and read & set(directory.parents)):
            problems.append((str(paths[0]), key))
    if problems:
        fix = "use --output DIR, or move it away"
        raise UserError([Problem("would be deleted by --overwrite", path=p, key=k, fix=fix) for p, k in problems])


DATA_KEYS = ("data.train", "eval.data", "reward.train")


def model_inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """(key, place) of the models, adapters and single files that a recipe may name; places need not exist."""
    for key, text in strings(recipe.model_dump(include={"model", "reward"})):
        text = text.rpartition(":")[0] if key == "reward.functions" else text
        if text and key != "reward.train" and "\0" not in text:
            yield key, Path(text).expanduser()


def data_inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, file, folder or pattern) of all data."""
    for key in DATA_KEYS:
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section, None), name, None)
        for source in value if isinstance(value, list) else [value]:
            text = source.path if isinstance(source, SourceConfig) else source
            if isinstance(text, str) and "\0" not in text:
                yield key, text


def paths_of(pattern: str) -> list[Path]:
    """The pattern itself, and what it matches."""
    path = Path(pattern).expanduser()
    return [path, *(Path(found) for found in glob.glob(str(path), recursive=True) if glob.has_magic(pattern))]


def links_in(folder: Path, deep: bool) -> list[Path]:
    """A folder of links reads what they lead to."""
    return [path for path in folder.glob("**/*" if deep else "*") if path.is_symlink()] if folder.is_dir() else []


def strings(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and lists."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from strings(value, key)


def check_resumable(recipe: Recipe, unknown: Collection[str] = ()) -> None:
    """UserError naming the keys in which `recipe` differs from the one that the unfinished run was started with.

    Keys and sections that are `unknown` so far are not compared.

    Where the checkpoint knows the content of what is read, a path may be another: see `check_unchanged`.
    """
    path = Path(recipe.output.dir).expanduser() / "recipe.yaml"
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        old = None
    if not isinstance(old, dict):
        raise UserError("cannot be read", path=path, fix="start again with --overwrite") from None
    new = yaml.safe_load(to_yaml(recipe))
    if inputs_of(Run(path.parent)):
        old, new = without_places(old), without_places(new)
    keys = [key for key in changed_keys(old, new) if key not in unknown and key.split(".")[0] not in unknown]
    if keys:
        raise UserError(
            [
                Problem("differs from the run to resume", path, key=key, fix="undo the change or use --output DIR")
                for key in keys
            ]
        )


def without_places(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without the paths of what is known by its content; what else a source says stays."""

    def kept(value: Any) -> Any:
        if isinstance(value, list):
            return [kept(item) for item in value]
        return {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else bool(value)

    found = dict(values)
    for place in PLACES:
        section, _, key = place.partition(".")
        if key in (found.get(section) or {}):
            found[section] = {**found[section], key: kept(found[section][key])}
    return found


def inputs_of(run: Run) -> dict[str, str]:
    """{key: digest of its content} of what the unfinished run was started with, as its newest checkpoint says."""
    last = run.last_checkpoint()
    return known_of(last).get("inputs") or {} if last is not None else {}


def check_unchanged(recipe: Recipe, inputs: dict[str, str]) -> None:
    """UserError naming what has another content now than when the unfinished run was started."""
    before = inputs_of(Run(Path(recipe.output.dir).expanduser()))
    values = dict(strings(recipe.model_dump()))
    what, fix = "has another content than when the run to resume was started", "restore it, or use --output DIR"
    problems = [
        Problem(what, path=values.get(key), key=key, fix=fix)
        for key in sorted(before.keys() | inputs.keys() if before else [])
        if before.get(key) != inputs.get(key)
    ]
    if problems:
        raise UserError(problems)


@contextmanager
def open_run(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> Iterator[Run]:
    """Create the directory, lock it, write recipe.yaml. Call after everything that can be checked has been checked.

    What is replaced waits in .replaced/: it goes when the new run is finished, and is put back when that fails before
    it has anything to go on from.
    """
    run = Run(Path(recipe.output.dir).expanduser())
    if overwrite:
        check_inputs(recipe)
    check_output(run.path, overwrite, resume)
    made = not run.path.exists()
    run.path.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(run.path / LOCK, blocking=False).acquire()
    except Timeout:
        raise UserError("another process is writing here", path=run.path, fix="wait, or use --output DIR") from None
    with lock:
        check_output(run.path, overwrite, resume)  # another process may have been here meanwhile
        aside = run.path / ASIDE
        try:
            if overwrite:
                set_aside(run)
            # Also when it goes on: what it reads may lie elsewhere now.
            header = f"# ft {recipe.stage} --recipe recipe.yaml\n{MARK}\n"
            write_atomically(run.path / "recipe.yaml", to_yaml(recipe, header))
            yield run
        except BaseException as error:
            if aside.is_dir() and not resumable(run):
                put_back(run)
            elif aside.is_dir():
                warn(f"what this run replaces is in {aside} until it is finished")
            if made and isinstance(error, UserError) and not resumable(run):
                places.remove(run.path)  # refused: nothing was written
            if isinstance(error, KeyboardInterrupt) and resumable(run):
                raise Interrupted(f"interrupted; go on with {to_go_on(recipe)}") from None
            raise
        if aside.is_dir() and run.result.exists():
            places.remove(aside)
        (run.path / LOCK).unlink(missing_ok=True)


def set_aside(run: Run) -> None:
    """What is there to .replaced/, recipe.yaml last. What never replaced the run that is there already goes."""
    aside = run.path / ASIDE
    complete = (aside / "recipe.yaml").exists()
    for name in sorted(CONTENTS, key=lambda name: name == "recipe.yaml"):
        path = run.path / name
        if complete:
            places.remove(path)
        elif path.exists():
            aside.mkdir(exist_ok=True)
            path.rename(aside / name)


def put_back(run: Run) -> None:
    aside = run.path / ASIDE
    complete = (aside / "recipe.yaml").exists()
    for name in CONTENTS:
        if complete or (aside / name).exists():
            places.remove(run.path / name)
    for path in aside.iterdir():
        path.rename(run.path / path.name)
    aside.rmdir()


def read_recipe(run_path: Path) -> dict[str, Any] | None:
    """The resolved recipe of a run directory, or None if it is not one."""
    path = run_path / "recipe.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
