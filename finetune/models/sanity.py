"""Is what was loaded a language model? A short fixed text, right after loading.

A wrong mapping of weights (q and k mixed up, another kind of rotary embedding, a half-loaded checkpoint, a foreign
tokenizer) raises no error: the model computes, and guesses. Any trained model, whatever its languages, can copy a list
that it has just read; so two lists, English and Chinese, are read three times, and only the repetitions count.

What it does not see: small differences (epsilon, RoPE base) that leave the model fluent.
"""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import UserError
from finetune.models.hardware import input_device
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import warn

LISTS = ("red,lamp,Berlin,A7301,Alice,broken,128\n", "北京,蓝色,水壶,王小明,B9876,金额,250\n")
READINGS = 3
# Of ln(vocabulary). Three forerunners of tiny-llama: 0.08 to 0.23; with gate and up swapped 0.5 to 1.0, random 1.0.
LIMIT = 0.4
SMALL = 20_000_000  # parameters; models below are mostly random ones made for tests, and only warned about


@torch.inference_mode()
def copying_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean loss in nats per token of lists that were read before, begun as the tokenizer begins a text."""
    was_training = model.training
    model.eval()
    device = input_device(model)
    losses = []
    for text in LISTS:
        ids = list(tokenizer(text * READINGS)["input_ids"])
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids = ids[:-1]
        row = torch.tensor([ids], device=device)
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        labels = row[0, 1:].to(logits.device)
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[len(ids) // READINGS :])
    model.train(was_training)
    return float(torch.cat(losses).mean())


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> float | None:
    """The loss, None when switched off. UserError (a warning for small models on auto) when it is that of guessing."""
    if config.sanity_check is False:
        return None
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(i for text in LISTS for i in tokenizer(text)["input_ids"])
    if highest >= rows:
        raise UserError(
            f"the tokenizer has ids up to {highest} at least, the model {rows} embeddings", path=config.name,
            key="model.name", fix="the tokenizer belongs to another model",
        )  # fmt: skip
    guess = math.log(model.config.get_text_config().vocab_size)
    loss = copying_loss(model, tokenizer)
    if loss < LIMIT * guess:
        return loss
    message = (
        f"copies a list it has just read with a loss of {loss:.2f}, guessing has {guess:.2f}: untrained, damaged, or "
        "loaded wrongly (weights, tokenizer or config.json of another model)"
    )
    small = sum(p.numel() for p in model.parameters()) < SMALL
    if config.sanity_check is True or not small:
        fix = "download it again; where that is meant: model.sanity_check: false"
        raise UserError(message, path=config.name, key="model.name", fix=fix)
    warn(f"{config.name} {message}; only a warning for so small a model (model.sanity_check)")
    return loss
