"""One of several processes of torchrun: runs command lines of `ft` one after another, and notes what it took part in.

    torchrun … ranks_script.py FOLDER        FOLDER/commands.json: [[ddp, fsdp or tp, words of ft …], …]

FOLDER/seen.RANK.json: [{"code": …, "rows": numbers of the rows that it was given, "loads": how often it read data,
"reads": how often it read weights, "shares": of the frozen and of the trained weights that lay here}, …]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import ranks
from finetune.cli import main
from finetune.data import audit
from finetune.models import loading
from finetune.training import sampler, sharded


@contextmanager
def replies(file: Path, recorded: bool) -> Iterator[None]:
    """PPO's replies are written to a file, or read from it: rollout by rollout, by their prompts."""
    from finetune.evaluation.generation import decode
    from finetune.rl.replies import together
    from finetune.rl.rollout import Collector

    sampled, rollouts = Collector.answer, json.loads(file.read_text()) if recorded else []

    def answer(self: Any, prompts: Any, on_batch: Any = None) -> Any:
        if recorded:
            known = rollouts.pop(0)
            written = [known[str(p.ids)] for p in prompts]
            found = together([p.ids for p in prompts], written, self.stops, self.pad, self.models.device)
            torch.manual_seed(7)  # for the order of the minibatches
            listed = [found.text_ids(i, self.stops) for i in range(len(found))]
            return found, [decode(self.encoder, ids, self.stops) for ids in listed]
        found, texts = sampled(self, prompts)
        written = [ids[kept.bool()].tolist() for ids, kept in zip(found.tokens, found.mask, strict=True)]
        rollouts.append({str(p.ids): ids for p, ids in zip(prompts, written, strict=True)})
        file.write_text(json.dumps(rollouts))
        torch.manual_seed(7)
        return found, texts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Collector, "answer", answer)
        yield


def run(folder: Path) -> None:
    rows: list[int] = []
    loads: list[str] = []
    given, read = sampler.Spared.__getitem__, audit.Audit.__init__
    patch = pytest.MonkeyPatch()
    patch.setattr(sampler.Spared, "__getitem__", lambda self, number: (rows.append(number), given(self, number))[1])
    patch.setattr(audit.Audit, "__init__", lambda self, *a, **k: (loads.append(""), read(self, *a, **k))[1])
    patch.setattr(ranks.os, "devnull", str(folder / f"said.{ranks.rank()}"))  # where others than the first are heard
    patch.setattr(ranks, "leave", lambda: None)  # the next command meets the same processes
    together = sharded.bring_together

    def counted(model: Any) -> None:
        """How much of the frozen and of the trained weights lies here."""
        sharded.back_in_parts(model)
        for trained in (False, True):
            tensors = [p for p in model.parameters() if p.requires_grad is trained]
            here = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in tensors)
            shares.append(here / max(1, sum(p.numel() for p in tensors)))
        together(model)

    shares: list[float] = []
    reads: list[str] = []
    load = loading.load_model
    patch.setattr(loading, "load_model", lambda *a, **k: (reads.append(""), load(*a, **k))[1])
    patch.setattr(sharded, "bring_together", counted)
    seen = []
    for kind, *words in json.loads((folder / "commands.json").read_text()):
        shares.clear()
        rows.clear()
        loads.clear()
        reads.clear()
        os.environ[ranks.KIND] = kind
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # what accelerate leaves behind
        sys.argv = ["ft", *words]
        code = 0
        try:
            if words[0] == "ppo":
                with replies(folder / "replies.json", recorded=True):
                    main()
            else:
                main()
        except SystemExit as ended:
            code = int(str(ended.code or 0))
        seen.append({"code": code, "rows": list(rows), "loads": len(loads), "reads": len(reads), "shares": [*shares]})
    (folder / f"seen.{ranks.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
