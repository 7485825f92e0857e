"""Measures a training program from within: transformers' Trainer tells of each forward and backward pass.

Every peer trains with that class, and so do we, so that all are measured by the same few lines: processor seconds of
the process (user and system, all threads), the loss, and how many tokens or rows it is of. In the environment:
FT_BENCH_LOG, a file for JSON lines.
"""

import atexit
import importlib.util
import json
import os
import resource
import sys
import time

LOG = os.environ.get("FT_BENCH_LOG")


def tell(event, **more):
    with open(LOG, "a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "cpu": time.process_time(), "wall": time.time(), **more}) + "\n")


def counts(inputs):
    """Label tokens that a loss is taken of, rows, and positions."""
    labels, mask = inputs.get("labels"), inputs.get("completion_mask")
    ids = inputs.get("input_ids")
    trained = None
    if labels is not None and labels.dim() == 2:
        trained = int((labels[:, 1:] != -100).sum())
    elif mask is not None:
        trained = int(mask[:, 1:].sum())
    shape = list(ids.shape) if ids is not None else []
    real = int(inputs["attention_mask"].sum()) if getattr(inputs.get("attention_mask"), "ndim", 0) == 2 else None
    return {"labels": trained, "shape": shape, "real": real}


def of_trainer(module):
    plain = module.Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        found = counts(inputs)
        begun = time.process_time()
        loss = plain(self, model, inputs, *args, **kwargs)
        tell("pass", loss=float(loss), spent=time.process_time() - begun, **found)
        return loss

    module.Trainer.training_step = training_step


def of_log(name, loss):
    def patch(module):
        owner = getattr(module, name)
        plain = owner.log

        def log(self, row, *args, **kwargs):
            if loss in row:
                tell("rollout", loss=float(row[loss]))
            return plain(self, row, *args, **kwargs)

        owner.log = log

    return patch


PATCHES = {
    "transformers.trainer": of_trainer,
    "trl.experimental.ppo.ppo_trainer": of_log("PPOTrainer", "loss/policy_avg"),
    "finetune.rl.ppo": of_log("Ppo", "loss"),
}


class Finder:
    """Patches a module as soon as it is imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        patch = PATCHES.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


@atexit.register
def end():
    if LOG:
        tell("end", peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if LOG:
    sys.meta_path.insert(0, Finder)
