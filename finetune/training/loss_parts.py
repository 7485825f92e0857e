"""What trl makes of a model that not every model has, found by trying; and which positions it scores.

trl 1.16 computes a loss past the model's own forward. From the last hidden states and the head's weight it makes
log-probabilities (`add_fused_lm_head`), and knows five ways of scaling them by name; a network that does something else
in between (a projection before the head, a factor of its own) would learn by another loss than its own, without an
error. And it adds the balancing loss of experts to every model whose config could have some.

Of several processes the first one tries: the others may have no weights yet (`sharded.read_once`).
"""

from __future__ import annotations

from typing import Any

import torch
from trl.trainer import utils

LIMIT = 0.05  # nats, and of the mean log-probability: bfloat16 rounds 0.01; a factor or layer left out changes 1 to 10


def score_trained_positions() -> None:
    """trl 1.16 runs prompt and padding through the head, too, wherever Triton does not run: some devices compile anew
    for every shape, it says (`compact` in `add_fused_lm_head`). CPUs and Apple's GPUs do not. The test is the only
    thing in that module that asks for Triton; kernels ask for it elsewhere."""
    utils._use_triton = lambda device: device.type in ("cuda", "xpu", "cpu", "mps")


@torch.no_grad()
def scores_are_its_own(model: Any) -> bool:
    """Whether the log-probabilities that trl computes are those of the model's logits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = base.training
    base.eval()
    try:
        ids = torch.arange(3, 35, device=base.get_input_embeddings().weight.device)[None]
        with torch.autocast(ids.device.type, base.dtype, enabled=base.dtype != torch.float32):
            logits = base(input_ids=ids, use_cache=False).logits.float()[:, :-1]
            fused = base(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.float()
    finally:
        base.train(was_training)
    own = logits.log_softmax(-1).gather(-1, ids[:, 1:, None].to(logits.device))[..., 0]
    return bool((own - fused.to(own.device)).abs().mean() < LIMIT * (1 + own.abs().mean()))


@torch.no_grad()
def balances(model: Any) -> bool:
    """Whether trl can compute the balancing loss that the model's config asks for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.config.get_text_config()
    if not getattr(text, "router_aux_loss_coef", 0.0) or not hasattr(text, "output_router_logits"):
        return True
    if not hasattr(text, "num_experts") or not hasattr(text, "num_experts_per_tok"):
        return False  # of another name: trl 1.16 reads these two
    ids = torch.arange(3, 5, device=base.get_input_embeddings().weight.device)[None]
    with torch.autocast(ids.device.type, base.dtype, enabled=base.dtype != torch.float32):
        found = base.base_model(input_ids=ids, use_cache=False, output_router_logits=True)
    return bool(getattr(found, "router_logits", None))
