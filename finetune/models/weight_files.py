"""The weight files of a folder: which of them transformers loads, and whether they are whole."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from finetune.errors import Problem, UserError
from finetune.given_files import AGAIN
from finetune.given_files import mapping as read_json

# Derived while building the network; old checkpoints stored them as well.
DERIVED = re.compile(r"rotary_(pos_)?emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")

# Parts of a checkpoint that read images or sounds.
OTHER_SENSES = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal_projector|embed_vision|embed_audio)[^.]*\.")


def weight_files(folder: str | Path) -> list[Path]:
    """The weight files that transformers would load, safetensors first. UserError where one is not there."""
    folder = Path(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = config.get("transformers_weights")  # one or an index by another name
    for single in (str(named),) if named else ("model.safetensors", "pytorch_model.bin"):
        index = folder / (single if single.endswith(".index.json") else f"{single}.index.json")
        if (folder / single).is_file() and not single.endswith(".json"):
            return [folder / single]
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise UserError("is no index of weights: it has no weight_map", path=index, fix=AGAIN)
            listed = sorted({str(name) for name in names.values()})
            if away := [name for name in listed if Path(name).is_absolute() or ".." in Path(name).parts]:
                raise UserError(f"names a file outside of its folder ({away[0]})", path=index, fix=AGAIN)
            shards = [folder / name for name in listed]
            gone = [shard for shard in shards if not shard.is_file()]
            if gone:
                raise UserError([Problem("named in the index but not there", path, fix=AGAIN) for path in gone])
            return shards
    raise UserError(
        "no model.safetensors, no pytorch_model.bin and no index of either", path=folder,
        fix="give the folder of a complete model",
    )  # fmt: skip


def check_file(path: Path) -> None:
    """UserError unless this is a whole file of weights, from its header (a pickle's from its ends)."""
    with path.open("rb") as file:
        start = file.read(7)
    if not start:
        raise UserError("is empty", path=path, fix=AGAIN)
    if start == b"version":
        raise UserError("is a Git LFS pointer, not the weights", path=path, fix="fetch them with git lfs pull")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return
        except (SafetensorError, OSError) as error:
            raise UserError(f"is cut off or no safetensors file ({error})", path=path, fix=AGAIN) from None
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise UserError("is cut off", path=path, fix=AGAIN)


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a file."""
    check_file(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    else:
        yield from ((n, t) for n, t in read_pickle(path).items() if isinstance(t, torch.Tensor))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a file, from its header."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: tuple(tensor.shape) for name, tensor in read_pickle(path, "meta").items()}


def read_pickle(file: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A .bin file read with weights_only, mapped where possible. UserError if it holds more than weights."""
    try:
        mapped = zipfile.is_zipfile(file)  # files from before torch 1.6 are not
        found = torch.load(file, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = "more than weights: pickled code is never run"
        raise UserError(reason, path=file, fix="save it again as safetensors where it comes from") from error
    except Exception as error:  # bytes that are no pickle end in any kind of error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot be read ({reason})", path=file, fix=AGAIN) from None
    if not isinstance(found, dict):
        raise UserError("holds no mapping of names to weights", path=file, fix=AGAIN)
    return found


def check_loading(info: dict[str, Any], name: str) -> None:
    """transformers only warns about these, and the weights concerned stay random."""
    problems = []
    unexpected = [key for key in info["unexpected_keys"] if not DERIVED.search(key)]
    for kind, keys in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (" …" if len(keys) > 3 else "")
            problems.append(
                Problem(f"{len(keys)} {kind} weights ({shown})", name, fix="the checkpoint is not of this kind")
            )
    if info["mismatched_keys"]:
        first = sorted(info["mismatched_keys"])[0]
        problems.append(Problem(f"misshapen weights ({first})", name, fix="config.json belongs to another checkpoint"))
    if problems:
        raise UserError(problems)
