"""Rows of any lengths as one row without padding, on CPUs: attention goes document by document.

A GPU has kernels for that (varlen flash attention). On a CPU transformers' sdpa makes one mask over everything that
stands in a row, and pays for its square; here each document is a call of sdpa by itself, and everything else of a
network costs what its real tokens do. Registered as an attention function of transformers under `NAME`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from finetune import ranks

NAME = "sdpa_documents"
ROUNDED = 1e-5  # of the largest logit, in float32
LENGTHS = (13, 5, 8)
"""Of the documents that are tried."""


def attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """sdpa, of each document by itself where positions say that there are several in a row.

    Args:
        query, key, value: [B, heads, T, width]; position_ids: [B or 1, T], which begin anew with each document, or, in
            one that goes on from the beginning of the document before it, behind what they share.
    """
    listed = None
    if attention_mask is None and more.get("position_bias") is None and query.shape[2] == key.shape[2]:
        listed = documents(position_ids, query.shape[0], query.shape[2])
    if listed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    runs = [(length, shared, len([*same])) for (length, shared), same in groupby(listed)]  # alike ones go together
    wide = [length * count for length, _, count in runs]
    # `split`, whose backward pass is one `cat`: that of a slice is as large as what it was taken from.
    parts = (x.transpose(1, 2).flatten(0, 1).split(wide) for x in (query, key, value))
    found: list[torch.Tensor] = []
    whole: tuple[torch.Tensor, ...] = ()
    for (length, shared, count), q, k, v in zip(runs, *parts, strict=True):
        if not shared:
            whole = (k[-length:], v[-length:])
        for some in [(q, k, v)] if not shared else zip(*(x.split(length) for x in (q, k, v)), strict=True):
            mask = None
            if shared:
                some = (some[0], *(torch.cat([a[:shared], b]) for a, b in zip(whole, some[1:], strict=True)))
                mask = torch.ones(length, shared + length, dtype=torch.bool, device=q.device).tril(shared)[None, None]
            rows = (x.unflatten(0, (1 if shared else count, -1)).transpose(1, 2) for x in some)
            found.append(sdpa_attention_forward(module, *rows, mask, **more)[0].flatten(0, 1))
    return torch.cat(found).unflatten(0, (query.shape[0], query.shape[2])), None


def documents(position_ids: torch.Tensor | None, rows: int, width: int) -> list[tuple[int, int]] | None:
    """Of each document (its tokens here, how many of the document before it come first), row after row; None where each
    row is one, or positions do not say."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != width:
        return None
    begins = torch.diff(position_ids, dim=1) != 1
    if not begins.any():
        return None
    first = torch.ones(len(begins), 1, dtype=torch.bool, device=begins.device)
    starts = torch.cat([first, begins], 1).expand(rows, -1).flatten().nonzero().flatten()
    ends = torch.cat([starts[1:], starts.new_tensor([rows * width])])
    at = position_ids.expand(rows, -1).flatten()[starts]
    found, last = [], 0
    for start, length, position in zip(starts.tolist(), (ends - starts).tolist(), at.tolist(), strict=True):
        shared = position if start % width and position <= last else 0
        last = last if shared else length
        found.append((length, shared))
    return found


def masks(*args: Any, **more: Any) -> torch.Tensor | None:
    """sdpa's masks, and none where only documents are told apart."""
    told_apart = not more.get("allow_is_causal_skip", True) and not more.get("use_vmap", False)
    if told_apart and more.get("attention_mask") is None and more["q_length"] == more["kv_length"] > 1:
        return None
    return sdpa_mask(*args, **more)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, masks)


def network_of(model: Any) -> Any:
    """Without an adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def used(model: Any) -> bool:
    """Whether documents may stand side by side in a row, told apart by their positions."""
    return bool(network_of(model).config._attn_implementation == NAME)


def use(model: Any) -> bool:
    """Lets a model attend document by document where that computes the same, found by trying.

    Not on GPUs, with another attention than sdpa, with layers that see a window of a text only (what stands in one row
    would be longer than that), and with what is computed of a row as a whole. Three short texts show none of these.
    """
    network = network_of(model)
    config = network.config
    if network.device.type != "cpu" or config._attn_implementation != "sdpa" or has_windows(config):
        return False
    if stretches(config) or begins_at_a_mark(model):
        return False
    network.set_attn_implementation(NAME)
    if config._attn_implementation == NAME and ranks.of_all(lambda: alike(model)):  # others may have no weights
        return True
    network.set_attn_implementation("sdpa")
    return False


def has_windows(config: Any) -> bool:
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windows = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return bool(windows or getattr(text, "attention_chunk_size", None) or kinds != {"full_attention"})


def stretches(config: Any) -> bool:
    """Whether the width of a row, padding included, decides how fast positions turn (dynamic NTK)."""
    told = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [told, *(part for part in told.values() if isinstance(part, dict))]  # some have one for each kind of layer
    return any("dynamic" in str(kind.get("rope_type")) for kind in kinds)


def begins_at_a_mark(model: Any) -> bool:
    """Whether an adapter works from the last of its marks in a row on (aLoRA): in a row of several texts, only in the
    last of them."""
    configs = getattr(model, "peft_config", {}).values()
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


@torch.no_grad()
def alike(model: Any) -> bool:
    """Whether documents in one row have the logits, or the scores, that each has in a row of its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    device = model.get_input_embeddings().weight.device
    rows = [torch.arange(start, start + length, device=device) % 250 + 3 for start, length in enumerate(LENGTHS)]
    positions = torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]
    try:
        # As in training: what is trained is float32, also on a bfloat16 base.
        with torch.autocast(device.type, model.dtype, enabled=model.dtype != torch.float32):
            found = model(input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False).logits
            together = found.flatten(0, -2)
            alone = torch.cat([model(input_ids=row[None], use_cache=False).logits.flatten(0, -2) for row in rows])
    except (RuntimeError, ValueError, TypeError):  # a network that takes no positions, or no row without a mask
        return False
    finally:
        for module in training:
            module.training = True
    if together.shape != alone.shape:  # virtual tokens
        return False
    allowed = (ROUNDED if alone.dtype == torch.float32 else 0.02) * float(alone.abs().max())
    return float((together - alone).abs().max()) <= allowed
