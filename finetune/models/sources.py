"""Where models and adapters lie: built-in bases, runs, local folders, the Hugging Face hub or ModelScope. No torch.

Hub settings are the hub client's own: HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 uses only what is in the cache.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from safetensors import safe_open

from finetune import hub
from finetune.errors import UserError
from finetune.families import Refused, refused, refused_name
from finetune.given_files import is_address, mapping, odd
from finetune.models import modelscope
from finetune.models.gguf import cache, packaged
from finetune.models.gguf.header import NO_GGUF, is_gguf, refuse_other
from finetune.places import read_json
from finetune.recipe.sections import ModelConfig
from finetune.resources import BUILTIN_MODELS
from finetune.run.directory import not_usable
from finetune.terminal.progress import note

HUB_HELP = "check the name, or download it first and give the folder (offline: HF_HUB_OFFLINE=1 uses the cache)"


def builtin_names() -> list[str]:
    return sorted(path.parent.name for path in BUILTIN_MODELS.glob("*/config.json"))


def locate(model: ModelConfig) -> str:
    """The folder of a built-in base or local model, or the hub id itself. A GGUF file is converted to a folder first.
    UserError if a path does not exist."""
    found = place(model)
    if not isinstance(found, Path):
        if model.gguf_file is not None:
            found = _fetched_gguf(model)
        elif model.source == "modelscope":
            found = modelscope.folder(found, model.revision)
    return str(cache.folder(found)) if isinstance(found, Path) and found.is_file() else str(found)


def place(model: ModelConfig) -> Path | str:
    """The folder or GGUF file of a local model, or the id of one on a hub, of which nothing is downloaded. UserError if
    a path does not exist."""
    name, source = model.name, model.source
    if not name.strip():  # a path without a name is the working directory
        raise UserError(
            "names no model", key="model.name", fix=f"give a folder, a hub id or one of {', '.join(known_names())}"
        )
    if source == "modelscope":
        _refuse_by_name(name)
        return name
    if source is None and name in builtin_names():
        return BUILTIN_MODELS / name
    if source is None and (packed := packaged.file(name)) is not None:
        return packed
    path = Path(name).expanduser()
    if source != "hub" and path.is_dir():
        return _local(path, name) if model.gguf_file is None else _file_in(path, model.gguf_file)
    if source != "hub" and path.is_file():
        return _gguf_file(path, name)
    if is_address(name):
        fix = "of a hub's model give OWNER/NAME; download others, and give the folder"
        raise UserError("is an address, and no model's name", path=name, key="model.name", fix=fix)
    if source != "hub" and (strange := odd(path)) is not None:
        raise UserError(strange[0], path=name, key="model.name", fix="give a model's folder or a GGUF file")
    looks_local = path.is_absolute() or name.startswith((".", "~", "runs/")) or name.endswith(".gguf")
    looks_local |= name.count("/") != 1 or path.parent.is_dir()
    if source == "local" or (source is None and looks_local):
        _refuse_by_name(name)
        fix = f"give a folder, a GGUF file, a hub id (owner/name) or a built-in base ({', '.join(known_names())})"
        raise UserError("no such model", path=name, key="model.name", fix=did_you_mean(name, fix))
    _refuse_by_name(name)
    return name


def is_gguf_base(model: ModelConfig) -> bool:
    found = place(model)
    return model.gguf_file is not None or (isinstance(found, Path) and found.is_file())


def gguf_base(model: ModelConfig) -> Path:
    """The GGUF file of a base that is one, downloaded where it lies on a hub."""
    found = place(model)
    return found if isinstance(found, Path) else _fetched_gguf(model)


def known_names() -> list[str]:
    """Names without a path that load here."""
    return [*builtin_names(), *packaged.installed()]


def find_adapter(reference: str) -> Path | None:
    """The adapter folder of a run directory that is finished, or the folder itself; None where there is none."""
    if not reference:  # would be the working directory
        return None
    path = Path(reference).expanduser()
    held = [path] if not_usable(path) else [path / "adapter", path]
    found = (folder for folder in held if (folder / "adapter_config.json").is_file())
    return next((folder.resolve() for folder in found), None)


def adapter_folder(reference: str, key: str = "adapter") -> Path:
    """As `find_adapter`. UserError where there is none."""
    if (found := find_adapter(reference)) is not None:
        return found
    path = Path(reference).expanduser()
    check_usable(path, key)
    if (path / "model").is_dir():
        raise UserError("is a full fine-tuning: it has no adapter", path=path, fix="give it as --model")
    if reference in builtin_names() or (path / "config.json").is_file():
        raise UserError("is a model, not an adapter", path=reference, key=key, fix="give it as --model")
    if (path / "recipe.yaml").is_file():
        fix = "train it to its end first (--resume goes on from its last checkpoint)"
        raise UserError("is a run that is not finished: it has no adapter yet", path=path, key=key, fix=fix)
    what = "holds no adapter" if path.exists() else "no such run or adapter"
    fix = "give a run directory or a folder with adapter_config.json"
    raise UserError(what, path=path, key=key, fix=did_you_mean(reference, fix, models=False))


def check_usable(path: Path, key: str | None = None) -> None:
    """UserError for a run of ours that is not finished, or whose last check failed."""
    if (found := not_usable(path)) is not None:
        raise UserError(found[0], path=path, key=key, fix=found[1])


def what_is(reference: str) -> Literal["adapter", "model"]:
    """Whether a name or path is an adapter (a run has one) or a model. UserError where it is neither."""
    path = Path(reference).expanduser()
    check_usable(path)
    if find_adapter(reference) is not None:
        return "adapter"
    if (path / "recipe.yaml").is_file() and not (path / "model").is_dir():
        adapter_folder(reference)
    try:
        place(ModelConfig(name=reference))
    except UserError as error:
        if error.problems[0].message not in ("no such model", NO_GGUF):
            raise
        fix = f"give a run, an adapter's folder, a model's, a hub id or a built-in base ({', '.join(known_names())})"
        what = "is neither a run nor an adapter nor a model" if path.exists() else "no such run, adapter or model"
        raise UserError(what, path=reference, fix=did_you_mean(reference, fix)) from None
    return "model"


def did_you_mean(reference: str, otherwise: str, models: bool = True) -> str:
    """The nearest of the folders beside it, of the runs in runs/ and, where a model will do, of the built-in bases;
    `otherwise` where none is near."""
    path = Path(reference).expanduser()
    beside = [path.parent / p.name for p in folders(path.parent)] if path.name else []
    known = {name: name for name in (*builtin_names(), *packaged.PACKAGED) if models and len(path.parts) < 3}
    near_by = [*folders(Path("runs"), "*/*"), *folders(Path("runs")), *beside]  # of one name the last wins
    known |= {place.name.lower(): str(place) for place in near_by if is_ours(place, models)}
    near = difflib.get_close_matches(path.name.lower(), known, n=1)
    return f"did you mean {known[near[0]]}?" if near else otherwise


def folders(where: Path, pattern: str = "*") -> list[Path]:
    try:
        return sorted(p for p in where.glob(pattern) if p.is_dir())
    except OSError:
        return []


def is_ours(path: Path, models: bool) -> bool:
    """Whether a folder is a run or an adapter, or a model."""
    names = ["adapter/adapter_config.json", "adapter_config.json"]
    names += ["config.json", "model/config.json"] if models else []
    return any((path / name).is_file() for name in names)


def base_of(adapter: Path | None) -> str:
    """The base that an adapter names."""
    assert adapter is not None
    said = mapping(adapter / "adapter_config.json").get("base_model_name_or_path")
    identity = adapter / "base_identity.json"
    name = (mapping(identity).get("base") if identity.is_file() else None) or said
    if not name or not isinstance(name, str):
        raise UserError("does not name its base", path=adapter, fix="give it with --model")
    start = adapter.parent / "start"  # a run with a base of its own, which moves with it
    return str(start) if Path(name).name == "start" and start.is_dir() else name


def base_config(adapter: Path, model: str | None = None) -> ModelConfig:
    """The base of an adapter, or the one that is given for it, as far as where it lies goes."""
    if model is not None:
        return ModelConfig(name=model)
    identity = read_json(adapter / "base_identity.json")
    place = {key: identity[key] for key in ("revision", "source", "gguf_file") if isinstance(identity.get(key), str)}
    return ModelConfig.model_validate({"name": base_of(adapter), **place})


def check_there(model: ModelConfig) -> None:
    """UserError when a model is nowhere, cannot be had, or is of a family that cannot be loaded."""
    found = place(model)
    if isinstance(found, Path) and found.is_file():
        cache.check(found)
        return
    if model.source == "modelscope" or model.gguf_file is not None:
        return
    check_family(mapping(config_file(model)), model.name)


def check_family(config: dict[str, Any], name: str) -> None:
    """UserError for what cannot be loaded, and for a config.json that has code fetched from a hub and run."""
    _refuse(refused(config), name)
    if (found := fetched_code(config)) is not None:
        what = f"its config.json asks for {found[0]} {found[1]!r}, which may be code of a hub, and that is never run"
        raise UserError(what, path=name, key="model.name", fix=f"take {found[0]} out of config.json")


# What transformers has itself; whatever else stands there is the name of a kernel that it fetches (library `kernels`).
COMPUTED_BY = {
    "attn_implementation": re.compile(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d)"),
    "experts_implementation": re.compile(r"eager|grouped_mm|batched_mm"),
}


def fetched_code(config: dict[str, Any]) -> tuple[str, Any] | None:
    """(key, value) of an attention or of experts in a config.json, of its parts too, that are not transformers' own."""
    for key, value in config.items():
        known = COMPUTED_BY.get(key.lstrip("_").removesuffix("_internal"))
        if known is not None:
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and not known.fullmatch(str(name)):
                    return key, name
        elif isinstance(value, dict) and (found := fetched_code(value)) is not None:
            return found
    return None


def announce(model: ModelConfig) -> None:
    """Say what will be downloaded, before it is."""
    if isinstance(found := place(model), Path):
        return
    if model.gguf_file is not None:
        if model.source == "modelscope" or not hub.has(found, model.gguf_file, model.revision):
            note(f"downloads {model.gguf_file} of {found} (once)")
    elif model.source == "modelscope":
        if not modelscope.has(found, model.revision):
            note(f"downloads {found} from ModelScope (once)")
    elif hub.fetches(found, model.revision):
        note(f"downloads {found} from {hub.endpoint()} (once)")


def check(model: ModelConfig) -> None:
    """UserError where `source` or `revision` would have no effect on what is read."""
    is_local = model.name in known_names() or Path(model.name).expanduser().exists()
    if model.source == "hub" and Path(model.name).expanduser().exists():
        raise UserError(
            "a local folder has this name, and would be read instead of the hub's", path=model.name,
            key="model.source", fix="rename it or start elsewhere; or leave model.source out to use the folder",
        )  # fmt: skip
    if model.gguf_file is not None:
        _check_gguf_file(model)
    if model.revision is not None and is_local and model.source != "modelscope":
        what = f"is a local {'folder' if Path(place(model)).is_dir() else 'file'}, which has no revisions"
        raise UserError(what, path=model.name, key="model.revision", fix="leave it out")


def _check_gguf_file(model: ModelConfig) -> None:
    """UserError where `gguf_file` would have no effect, or names nothing in a repository or folder."""
    key, file = "model.gguf_file", PurePosixPath(str(model.gguf_file))
    if model.source is None and model.name in known_names():
        raise UserError("is a base that comes with ft or a package", path=model.name, key=key, fix="leave it out")
    if model.source != "hub" and Path(model.name).expanduser().is_file():
        raise UserError("is a file already", path=model.name, key=key, fix="leave it out")
    if file.is_absolute() or ".." in file.parts or not file.parts:
        fix = "give the file's path as the repository or folder has it"
        raise UserError(f"{model.gguf_file!r} is no path in {model.name}", key=key, fix=fix)


def _gguf_file(path: Path, name: str) -> Path:
    if not is_gguf(path):
        refuse_other(path)
    return path.resolve()


def _file_in(folder: Path, file: str) -> Path:
    """A GGUF file of a local folder."""
    if not (folder / file).is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf"))) or "none"
        raise UserError("no such file", path=folder / file, key="model.gguf_file", fix=f"GGUF files there: {there}")
    return _gguf_file(folder / file, file)


def _local(path: Path, name: str) -> Path:
    if (path / "config.json").is_file():
        return path.resolve()
    if (path / "adapter" / "adapter_config.json").is_file() or (path / "adapter_config.json").is_file():
        raise UserError("is an adapter, not a model", path=name, key="model.name", fix="give its base; use --adapter")
    if (path / "model" / "config.json").is_file():  # the run directory of a full fine-tuning
        return (path / "model").resolve()
    if found := sorted(p.name for p in path.glob("*.gguf")):
        what = f"holds no config.json, but GGUF files: {', '.join(found)}"
        raise UserError(what, path=name, key="model.name", fix=f"name one of them: {Path(name) / found[0]}")
    raise UserError("has no config.json", path=name, key="model.name", fix="give the folder of a complete model")


def _refuse_by_name(name: str) -> None:
    """Before anything is downloaded."""
    _refuse(refused_name(name), name)


def _refuse(row: Refused | None, name: str) -> None:
    if row is not None:
        raise UserError(f"{row.name} {row.why}", path=name, key="model.name", fix=row.instead)


def file(model: ModelConfig, filename: str) -> str | None:
    """Local path of one small file; None where the model has none."""
    where = locate(model)
    if Path(where).is_dir():
        return str(Path(where) / filename) if (Path(where) / filename).is_file() else None
    return hub.file(where, filename, hub_revision(model))


def config_file(model: ModelConfig) -> Path:
    """UserError where there is none."""
    path = file(model, "config.json")
    if path is None:
        found = [] if model.source == "modelscope" else hub.files(model.name, model.revision, ".gguf")
        if not found:
            raise UserError("has no config.json", path=model.name, key="model.name", fix=HUB_HELP)
        what = f"holds no config.json, but GGUF files: {', '.join(found[:20])}"
        raise UserError(what, path=model.name, key="model.gguf_file", fix="name one of them with model.gguf_file")
    return Path(path)


def folder(model: ModelConfig) -> Path:
    return config_file(model).parent


def stored_dtype(model: ModelConfig) -> str | None:
    """The dtype that most of the weights on disk have; None where no safetensors header tells."""
    sizes: dict[str, int] = {}
    for path in folder(model).glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_slice(name)
                sizes[stored.get_dtype()] = sizes.get(stored.get_dtype(), 0) + math.prod(stored.get_shape())
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(max(sizes, key=lambda kind: sizes[kind])) if sizes else None


def weights(model: ModelConfig) -> str:
    """What `from_pretrained` is given: like `locate`, with the weights there for ModelScope."""
    if model.source == "modelscope" and model.gguf_file is None:
        return str(modelscope.folder(model.name, model.revision, weights=True))
    return locate(model)


def hub_revision(model: ModelConfig) -> str | None:
    """The revision for the hub's client; ModelScope's own client has already used its."""
    return None if model.source == "modelscope" else model.revision


def commit(model: ModelConfig) -> str | None:
    """The commit of a hub snapshot, else the revision that was asked for."""
    path = folder(model)
    return path.name if path.parent.name == "snapshots" else model.revision


def _fetched_gguf(model: ModelConfig) -> Path:
    """The GGUF file of a repository on a hub, downloaded."""
    name, file = model.name, str(model.gguf_file)
    if model.source == "modelscope":
        found: str | None = str(modelscope.folder(name, model.revision, only=file) / file)
    else:
        found = hub.file(name, file, model.revision)
    if found is None or not Path(found).is_file():
        there = [] if model.source == "modelscope" else hub.files(name, model.revision, ".gguf")
        fix = f"GGUF files there: {', '.join(there[:20])}" if there else "see on its page what it holds"
        raise UserError(f"has no file {file}", path=name, key="model.gguf_file", fix=fix)
    if not is_gguf(Path(found)):
        refuse_other(Path(found))
    return Path(found)
