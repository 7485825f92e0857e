"""Which layers a method works on, found in the model itself, so that every family has sensible defaults. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from torch import nn

ATTENTION_OUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
MLP_OUT = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "w2", "fc_out")
KEY_VALUE = (("k_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",), ("Wqkv",), ("key", "value"))


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(full name, module) of every decoder block: the one list with num_hidden_layers members."""
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UserError(f"no list of {count} blocks in {type(model).__name__}", key="adapter.method", fix="use lora")
    seeing = tuple(f"{name}." for name in towers(model))
    name, found = next((n, m) for n, m in lists if not n.startswith(seeing))
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]


def towers(model: nn.Module) -> list[str]:
    """Full names of what reads images and sounds beside the text, in a model that has such parts."""
    whole: Any = model
    if whole.config.get_text_config() is whole.config:
        return []
    text, heads = whole.get_decoder(), (whole.get_output_embeddings(), getattr(whole, "score", None))
    inside = {id(m) for m in (*text.modules(), *heads)}
    around = [n for n, m in model.named_modules() if any(id(part) in inside for part in m.modules())]
    return [n for n, m in model.named_modules() if n and id(m) not in inside and n not in around]


def of_text(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(full name, module) of all modules but `towers`: no text reaches those, and what is trained there never moves."""
    away = {*towers(model)}
    return [(name, module) for name, module in model.named_modules() if name and name not in away]


def is_linear(module: nn.Module) -> bool:
    """Quantized ones, too: bitsandbytes' layers are subclasses."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def is_adaptable(module: nn.Module) -> bool:
    """What LoRA and its kin have a layer for."""
    from torch import nn

    return is_linear(module) or isinstance(module, nn.Embedding)


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and bool([*module.parameters(recurse=False)])


def as_pattern(names: list[str]) -> str:
    """One regular expression for full names that differ in numbers."""
    return "|".join(sorted({re.sub(r"\\\.\d+\\\.", r"\.\\d+\.", re.escape(name)) for name in names}))


def linear_names(model: nn.Module) -> str:
    names = {n.rpartition(".")[2] for n, m in of_text(model) if is_linear(m)}
    return ", ".join(sorted(names)) or "none"


def linears(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside the blocks, but for those where an adapter would be passed over; of the
    whole model, but for its head, where the blocks are no one list."""
    passed, head = set(passed_over(model)), model.get_output_embeddings()  # type: ignore[operator]
    try:
        parts = blocks(model)
    except UserError:
        parts = [("", model)]
    named = [(f"{name}.{n}".removeprefix("."), m) for name, part in parts for n, m in part.named_modules()]
    return [name for name, module in named if is_linear(module) and module is not head and name not in passed]


def passed_over(model: nn.Module) -> list[str]:
    """Full names of modules on which an adapter would be passed over, or that give something else than a product:

    mixers of Mamba, known by their A and D    transformers gives their weights to kernels, past the layer (peft refuses
                                               some of them for some of the types)
    indexers of sparse attention               they choose positions, and no gradient comes back from a choice
    AltUp of Gemma 3n, routers, grouped layers their weights are read past the layer, or they are subclasses of
                                               nn.Linear that return a tuple or several products
    parts beside the text                      no text reaches what reads images and sounds
    """
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.endswith(("Indexer", "AltUp", "Router", "GroupedLinear")):
            found += [name] if is_linear(module) else []
            found += [f"{name}.{n}" for n, m in module.named_modules() if n and is_linear(m)]
        elif {"A_log", "D"} <= dict(module.named_parameters(recurse=False)).keys():
            found += [f"{name}.{n}" for n in ("x_proj", "dt_proj", "out_proj") if hasattr(module, n)]
    return [*found, *towers(model)]


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in of_text(model) if is_norm(module)]


def _child(parent: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in dict(parent.named_children())), None)


def sublayers(model: nn.Module) -> list[tuple[str, str]]:
    """(attention's output projection, MLP) of every block, full names. UserError where a block has other parts."""
    found = []
    for name, block in blocks(model):
        attention = next((n for n, _ in block.named_children() if "attn" in n or "attention" in n), None)
        out = _child(getattr(block, attention), ATTENTION_OUT) if attention else None
        mlp = _child(block, MLP)
        if out is None or mlp is None:
            parts = ", ".join(n for n, _ in block.named_children())
            raise UserError(
                f"no place for bottleneck adapters in {type(block).__name__} ({parts})",
                key="adapter.method", fix="use lora or ia3",
            )  # fmt: skip
        found.append((f"{name}.{attention}.{out}", f"{name}.{mlp}"))
    return found


def keys_values_and_mlp(model: nn.Module) -> tuple[list[str], list[str]]:
    """Short names of (keys and values, the MLP's last layer), IA3's places. UserError where they have other names."""
    _, block = blocks(model)[0]
    names = {n.rpartition(".")[2] for n, m in block.named_modules() if is_linear(m)}
    attention = next((list(group) for group in KEY_VALUE if names.issuperset(group)), None)
    mlp = next((name for name in MLP_OUT if name in names), None)
    if attention is None or mlp is None:
        raise UserError(
            "no keys, values and MLP with known names", key="adapter.target_modules",
            fix=f"name them, of {linear_names(model)}",
        )  # fmt: skip
    return attention, [mlp]


def find(
    model: nn.Module, wanted: str | list[str], key: str = "adapter.target_modules",
    accept: Callable[[nn.Module], bool] = lambda module: True,
) -> list[str]:  # fmt: skip
    """Full names of the modules that `wanted` (names, or one regular expression) means.

    UserError for a name that matches no module (peft is content if any one of a list matches), and for a module that
    is nothing for the method.
    """
    names = [name for name, _ in of_text(model)]
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return linears(model)
    if isinstance(wanted, str):
        try:
            found = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise UserError(f"{wanted!r} is no regular expression ({error})", key=key, fix="or give a list") from None
        missing = [] if found else [wanted]
    else:
        hits = {w: [n for n in names if n == w or n.endswith("." + w)] for w in wanted}
        missing = [w for w in wanted if not hits[w]] or ([] if wanted else ["an empty list"])
        found = [name for name in names if any(name in hit for hit in hits.values())]
    if missing:
        where = " that text goes through" if towers(model) else ""
        what = f"matches no module{where}: {', '.join(missing)}"
        raise UserError(what, key=key, fix=f"there are {linear_names(model)}")
    wrong = next((name for name in found if not accept(model.get_submodule(name))), None)
    if wrong is not None:
        kind = type(model.get_submodule(wrong)).__name__
        raise UserError(f"{wrong} is {kind}: not for this method", key=key, fix=f"there are {linear_names(model)}")
    return found


def final_norm(model: nn.Module) -> str:
    """Full name of the norm after the last block: the first behind the blocks, as Gemma 3n and 4 have another, of what
    goes into them, behind it; else the last before them. UserError where none with weights is known."""
    names, listed = [name for name, _ in model.named_modules()], blocks(model)
    inside = tuple(f"{name}." for name, _ in listed)
    found = [name for name in norms(model) if not name.startswith(inside)]
    behind = [name for name in found if names.index(name) > names.index(listed[-1][0])]
    if not found:
        what = f"no norm with weights after the blocks of {type(model).__name__}"
        raise UserError(what, key="adapter.norm", fix="set it to false")
    return behind[0] if behind else found[-1]


def head_name(model: nn.Module) -> str:
    """Full name of the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is head)


def leaves_with_weights(module: nn.Module, name: str) -> list[str]:
    """Full names of the modules at or below `name` that hold parameters themselves; what is inside of one (the
    projections of attention with sinks of its own) goes with it."""
    if [*module.parameters(recurse=False)]:
        return [name]
    return [leaf for n, child in module.named_children() for leaf in leaves_with_weights(child, f"{name}.{n}")]
