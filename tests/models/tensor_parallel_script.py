"""One of two processes of torchrun: each type of network shared out over both, and beside it in one piece.

    torchrun … tensor_parallel_script.py FOLDER TYPE …

FOLDER/found.json: {type: {method: how far loss and gradients of two passes are apart, or why it was refused}}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest

import families_tiny as tiny
import torch

from finetune import ranks
from finetune.adapters.load import apply
from finetune.errors import UserError
from finetune.models import loading, tensor_parallel
from finetune.models.weight_files import read_json
from finetune.recipe.adapters import Adapter, FullAdapter, LoraAdapter
from finetune.recipe.sections import ModelConfig

METHODS: tuple[Adapter, ...] = (LoraAdapter(r=4), FullAdapter(method="full"))


def learnt(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of two passes, and their gradients together."""
    model.train()
    loss = torch.zeros(())
    for seed in range(2):
        ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(seed))
        one = model(input_ids=ids, labels=ids).loss
        one.backward()
        loss = loss + one.detach()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss, {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def compared(folder: Path, method: Adapter) -> dict[str, float]:
    model = ModelConfig(name=str(folder), sanity_check=False)
    full = method.method == "full"
    tensor_parallel.check(loading.skeleton(model), read_json(folder / "config.json"), folder.name, 2, full)

    def adapted(network: Any) -> Any:
        torch.manual_seed(4)
        return apply(network, method)

    whole = adapted(loading.load_model(model, torch.float32))
    network = loading.load_model(model, torch.float32, **tensor_parallel.options())
    if full:
        parts = adapted(network)
    else:
        parts = tensor_parallel.with_adapter(network, adapted, loading.without_weights(model, torch.float32))
    values, start = dict(parts.named_parameters()), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if not full and parameter.requires_grad:  # B is zero at first, and A's gradient with it
                assert torch.equal(parameter, getattr(values[name], "full_tensor", lambda name=name: values[name])())
                parameter.copy_(torch.randn(parameter.shape, generator=start) * 0.1)
                tensor_parallel.put(values[name], parameter)
    (loss, grads), (found, theirs) = learnt(whole), learnt(parts)
    assert grads.keys() == theirs.keys()
    apart = max(float((grads[n] - theirs[n]).abs().max() / grads[n].abs().max().clamp(min=1e-3)) for n in grads)
    return {"loss": float((loss - found).abs()), "gradients": apart}


def run(folder: Path, kinds: list[str]) -> None:
    os.environ[ranks.KIND] = "tp"
    ranks.join()
    found: dict[str, Any] = {}
    for kind in kinds:
        if ranks.first():
            config = tiny.shrunk(kind)
            dropouts = [key for key in config.to_dict() if key.endswith(("dropout", "pdrop"))]
            for key in dropouts:
                setattr(config, key, 0.0)
            tiny.write_config(folder / kind, config)
        ranks.barrier()
        found[kind] = {}
        for method in METHODS:
            try:
                found[kind][method.method] = compared(folder / kind, method)
            except UserError as error:
                found[kind][method.method] = str(error)
    if ranks.first():
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
