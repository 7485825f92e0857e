"""What a PPO run keeps between rollouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.errors import RunError
from finetune.rl.checkpoint import RunningMoments, State, load_checkpoint, save_checkpoint
from finetune.run.directory import Run


def test_moments_are_those_of_all_scores() -> None:
    moments, seen = RunningMoments(), list[float]()
    assert moments.deviation == 1.0
    for part in ([1.0, 5.0], [2.0], [-7.0, 3.5, 100.0], [0.0]):
        moments.add(part)
        seen += part
        assert moments.mean == pytest.approx(np.mean(seen))
        assert moments.deviation == pytest.approx(np.std(seen))


def kept(run: Run, state: State, weight: torch.nn.Parameter, keep: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    (weight**2).sum().backward()
    optimizer.step()
    save_checkpoint(run, state, {"w": weight}, {"optimizer": optimizer}, keep, {"data.train": "x"})
    return optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    run, weight = Run(tmp_path), torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    state = State(3, 0.07, RunningMoments(4.0, 1.5, 2.0), {"eos_rate": 0.5}, 1, 1, 2, [0.1, 0.2], [1.0], 12.5)
    optimizer = kept(run, state, weight)
    value, momentum = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    drawn = torch.rand(2)
    with torch.no_grad():
        weight.zero_()
    again = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    folder = run.usable_checkpoint()
    assert folder is not None
    assert load_checkpoint(folder, {"w": weight}, {"optimizer": again}) == state
    assert torch.equal(weight, value)
    assert torch.equal(again.state[weight]["momentum_buffer"], momentum)
    assert again.param_groups[0]["lr"] == 0.5
    assert torch.equal(torch.rand(2), drawn), "random numbers go on where they were"


def test_old_ones_go_and_broken_weights_are_not_kept(tmp_path: Path) -> None:
    run, weight = Run(tmp_path), torch.nn.Parameter(torch.ones(2))
    for step in (2, 4, 6):
        kept(run, State(step), weight)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    with torch.no_grad():
        weight[0] = float("nan")
    with pytest.raises(RunError, match=r"not finite at step 8: w"):
        save_checkpoint(run, State(8), {"w": weight}, {}, 2, {})
    assert not (run.checkpoints / "checkpoint-8").exists()
