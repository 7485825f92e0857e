"""What a trainer needs to be one of several processes: its rows, the figures of all, and one set of files.

In one process all of it is transformers' own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from finetune import ranks
from finetune.errors import UserError
from finetune.models import tensor_parallel
from finetune.training import sharded
from finetune.training.sampler import SharedBatches, Spared


class Several:
    """Mixed in before a transformers Trainer."""

    optimizer: Any
    model: Any
    args: Any
    accelerator: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    _get_train_sampler: Callable[..., Sampler[int]]
    predicting = False
    """Whether a batch of held-out rows is at work."""
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int

    def create_accelerator_and_postprocess(self) -> None:
        if sharded.in_parts() and self.args.device.type == "cpu":
            # accelerate 1.15 shards where it knows a GPU's kind of group (`AcceleratorState`), and on CPUs goes on
            # without a word with whole weights in every process. torch shards there as well.
            self.args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if sharded.gathers() and not self.accelerator.is_fsdp2:
            what = f"accelerate does not share out the weights on {self.args.device.type}"
            raise UserError(what, key="--launch", fix="use ddp")

    def get_train_dataloader(self) -> Any:
        if ranks.shares() == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        return shared_loader(self, self.train_dataset, self._get_train_sampler(), self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if ranks.shares() == 1:
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return shared_loader(self, rows, SequentialSampler(rows), self.args.eval_batch_size)

    def _get_num_items_in_batch(self, batches: list[Any], device: torch.device) -> Any:
        """Trained tokens of a step in all processes, spare rows left out; held-out batches are means of their own."""
        if ranks.count() > 1 and self.predicting:
            return None
        names = ("labels", "shift_labels")
        counted = [
            {n: torch.full_like(v, -100) if n in names and "spare" in batch else v for n, v in batch.items()}
            for batch in batches
        ]
        return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """trl's means, over the passes of all processes."""
        own = self._metrics["train" if self.model.training else "eval"]
        if ranks.count() > 1 and self.model.training:
            own.update(ranks.lists(own))
            if "num_tokens" in own:
                own["num_tokens"] = [ranks.total(self._total_train_tokens)]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Those who compute together draw the same, whoever wrote the checkpoint."""
        super()._load_rng_state(checkpoint)  # type: ignore[misc]
        if ranks.side_by_side():
            torch.set_rng_state(ranks.from_first(torch.get_rng_state))
            if self.args.device.type == "cuda":
                torch.cuda.set_rng_state(ranks.from_first(torch.cuda.get_rng_state))

    def _save_rng_state(self, output_dir: str) -> None:
        """The first process writes those of all: beside it nobody writes into a checkpoint."""
        if ranks.count() == 1:
            return super()._save_rng_state(output_dir)  # type: ignore[misc]
        with tempfile.TemporaryDirectory() as scratch:
            super()._save_rng_state(scratch)  # type: ignore[misc]
            files = ranks.every({file.name: file.read_bytes() for file in Path(scratch).iterdir()})
        if ranks.first():
            for name, content in (item for each in files for item in each.items()):
                (Path(output_dir) / name).write_bytes(content)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not sharded.in_parts():
            return super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        weights = sharded.trained(self.model)
        if ranks.first():
            with tensor_parallel.alone(self.model):
                self._save(output_dir, state_dict=weights)  # type: ignore[attr-defined]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharded.in_parts():
            return super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        state = sharded.optimizer_state(self.optimizer)
        if ranks.first():
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not sharded.in_parts() or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        kept = [torch.load(Path(checkpoint) / f"{name}.pt", weights_only=True) for name in ("optimizer", "scheduler")]
        sharded.load_optimizer(self.optimizer, kept[0])
        self.lr_scheduler.load_state_dict(kept[1])


def in_turn(each: Sequence[list[Any]]) -> list[Any]:
    """Batches as one process would see them: the first of each, then the second, …"""
    longest = max(map(len, each))
    return [batches[number] for number in range(longest) for batches in each if number < len(batches)]


def shared_loader(trainer: Any, rows: Any, order: Sampler[int], size: int) -> Any:
    """This process's batches of `rows`, of which spare ones say so; accelerate deals them out."""

    def collated(picked: list[dict[str, Any]]) -> dict[str, Any]:
        spare = [row.pop("spare", False) for row in picked]
        batch: dict[str, Any] = trainer.data_collator(picked)
        return {**batch, "spare": True} if any(spare) else batch

    batches = SharedBatches(order, size, ranks.shares())
    pin = trainer.args.dataloader_pin_memory and trainer.args.device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(Spared(rows), batch_sampler=batches, collate_fn=collated, pin_memory=pin)  # type: ignore[arg-type]
    return trainer.accelerator.prepare(loader)


@contextmanager
def own_figures(accelerator: Any) -> Iterator[None]:
    """trl gathers the figures of every pass from all processes, row by row, which must be as many in each. Here each
    keeps its own: `Several.log` and `evaluation_loop` bring them together, once."""
    if ranks.count() == 1:
        yield
        return
    names = ("gather", "gather_for_metrics")
    for name in names:
        setattr(accelerator, name, lambda value, *_, **__: value)
    try:
        yield
    finally:
        for name in names:
            delattr(accelerator, name)
