"""What scores replies: reward models and Python rules. Shared by `ft ppo` and `ft eval --reward`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune.base import Base
from finetune.data.encoder import Encoder, cut, scored_end, scored_ids
from finetune.data.prompts import Prompt
from finetune.data.types import Conversation, RowProblem, attempted
from finetune.errors import RunError, UserError
from finetune.evaluation.likelihood import by_length, right_pad
from finetune.families import ENCODER, refused
from finetune.models import adapter_files, attach, loading, sources
from finetune.models.config import read_config
from finetune.models.hardware import input_device
from finetune.models.identity import configs_of
from finetune.models.score_head import with_score_head
from finetune.models.weight_files import check_loading, read_json
from finetune.python_files import kept_running, load_function
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.run.directory import read_recipe

Scorer = Callable[[Sequence[Prompt], Sequence[str]], list[float]]


def load_rule(spec: str) -> Scorer:
    """A function of a Python file: function(prompts, completions, **columns) -> list of numbers.

    It is called with lists: prompts (what was asked last), completions (the replies' texts) and, by keyword, messages
    (the whole conversation before the reply), reference (the row's own answer or None) and every column that all rows
    have. UserError when there is no such function.
    """
    function = load_function(spec, "reward.functions", "rule")
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def score(prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        shared = set.intersection(*(set(p.columns) for p in prompts)) - {"prompts", "completions", "messages"}
        columns = {key: [p.columns[key] for p in prompts] for key in sorted(shared) if key.isidentifier()}
        columns["messages"] = [p.messages for p in prompts]
        columns = {key: values for key, values in columns.items() if takes_all or key in parameters}
        try:
            with kept_running():
                values = function(prompts=[p.text for p in prompts], completions=list(replies), **columns)
                return checked(values, len(replies), spec)  # inside: it may be computed as it is read
        except (RunError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit is no Exception, and a run must not end as if it were done
            raise RunError(f"{spec} failed: {type(error).__name__}: {error}") from error

    return score


def checked(values: Any, n: int, source: str) -> list[float]:
    """Scores as floats; RunError when there are too few, or one is no finite number."""
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        raise RunError(f"{source} returned {type(values).__name__}: a list of numbers is wanted") from None
    if len(numbers) != n:
        raise RunError(f"{source} returned {len(numbers)} scores for {n} replies")
    bad = next((i for i, v in enumerate(numbers) if not math.isfinite(v)), None)
    if bad is not None:
        raise RunError(f"{source} gave reply {bad + 1} of {n} the score {numbers[bad]}")
    return numbers


def answered(prompts: Sequence[Prompt], replies: Sequence[str]) -> list[Conversation]:
    """Each prompt with its reply. An empty reply is no turn to encode; a blank one is scored in its place."""
    return [
        Conversation([*p.messages, {"role": "assistant", "content": reply or " "}], p.tools)
        for p, reply in zip(prompts, replies, strict=True)
    ]


def scored_reply(encoder: Encoder, conversation: Conversation, limit: int | None = None) -> list[int]:
    """A conversation that ends with a reply as a reward model reads it: as `ft reward` reads its pairs, with `limit`
    cut to so many tokens.

    That is the text with the end of turn, also of a reply that was cut off: without it the score would stand at a token
    where none was ever trained. What the template cannot write is put behind the prompt as it is.
    """
    found = attempted(encoder.encode, conversation, "last")
    if not isinstance(found, RowProblem):
        found = cut(encoder.tokenizer, found, limit)
        if not found.trained:  # nothing of the reply is left
            return found.input_ids
        return scored_ids(found, encoder.separator)
    *before, reply = conversation.messages
    ids = encoder.tokenizer.encode(str(reply["content"]), add_special_tokens=False)
    end = scored_end(encoder)
    return [*encoder.prompt_ids(before, conversation.tools), *ids, *([] if end is None else [end])][:limit]


def is_reward_run(path: str) -> bool:
    recipe = read_recipe(Path(path)) if Path(path).is_dir() else None
    return recipe is not None and recipe.get("stage") == "reward"


@torch.inference_mode()
def score_rows(
    model: Any, rows: Sequence[list[int]], pad: int, batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[float]:  # fmt: skip
    """Scores of token ids, each read at its last token."""
    model.eval()
    device = input_device(model)
    scores = [0.0] * len(rows)
    for batch in by_length([len(row) for row in rows], batch_size):
        ids, mask = right_pad([rows[i] for i in batch], pad, device)
        for row, value in zip(batch, model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist(), strict=True):
            scores[row] = value
        on_batch(len(batch))
    return scores


@dataclass
class RewardModel:
    """A reward model of its own, with its own tokenizer and template."""

    name: str
    model: Any
    tokenizer: Any
    encoder: Encoder | None
    """None for encoders (BERT and its kin), which have no chat template and read a prompt and a reply as two texts."""

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, machine: Hardware) -> RewardModel:
        """From a run directory, an adapter folder, or a sequence-classification checkpoint."""
        check_model(path)
        adapter = sources.find_adapter(path)
        if adapter is not None:
            base = Base.open(configs_of(adapter)[1], adapter)
            scored = with_score_head(loading.load_model(base.model, dtype, machine), base.model.name)
            model = attach.attach_adapter(scored, adapter, base.model)
            return cls(path, model, base.tokenizer, base.asking(None))
        source = checkpoint_of(path)
        model = classifier(source, dtype, machine)
        if reads_pairs(config_of(source)):
            return cls(path, model, AutoTokenizer.from_pretrained(sources.locate(source)), None)
        base = Base.open(source)
        model.config.pad_token_id = base.tokenizer.pad_token_id  # how transformers finds where a row ends
        return cls(path, model, base.tokenizer, base.encoder)

    def score(self, prompts: Sequence[Prompt], replies: Sequence[str]) -> list[float]:
        return self.scores(answered(prompts, replies))

    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        if self.encoder is None:
            found = score_pairs(self.model, self.tokenizer, conversations)
        else:
            rows = [scored_reply(self.encoder, c) for c in conversations]
            found = score_rows(self.model, rows, self.tokenizer.pad_token_id)
        return checked(found, len(conversations), self.name)


@torch.inference_mode()
def score_pairs(model: Any, tokenizer: Any, conversations: Sequence[Conversation], batch_size: int = 32) -> list[float]:
    """Scores of an encoder, which reads all that was said before, and the reply; cut where its positions end."""
    model.eval()
    texts = [[str(m["content"]) for m in c.messages] for c in conversations]
    pairs = [("\n".join(turns[:-1]), turns[-1]) for turns in texts]
    # RoBERTa counts its positions from behind the padding's id.
    positions = getattr(model.config, "max_position_embeddings", 512) - (tokenizer.pad_token_id or 0) - 1
    longest = min(tokenizer.model_max_length, positions)
    scores: list[float] = []
    for start in range(0, len(pairs), batch_size):
        asked, replies = zip(*pairs[start : start + batch_size], strict=True)
        batch = tokenizer(
            list(asked), list(replies), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        scores += model(**batch.to(input_device(model))).logits[:, 0].tolist()
    return scores


def checkpoint_of(path: str) -> ModelConfig:
    """Of a fully trained run, or a model by itself. UserError for a path to nowhere."""
    folder = Path(path) / "model"
    model = ModelConfig(name=str(folder) if folder.is_dir() else path, sanity_check=False)
    try:
        sources.locate(model)
    except UserError as error:
        raise UserError([replace(problem, key="reward.model") for problem in error.problems]) from None
    return model


def check_model(path: str) -> None:
    """UserError for what is no reward model, from its small files."""
    adapter = sources.find_adapter(path)
    if adapter is not None:
        if adapter_files.described(adapter).get("task_type") != "SEQ_CLS":
            raise UserError("has no score head", path=adapter, key="reward", fix="give a run of `ft reward`")
        return
    config = config_of(checkpoint_of(path))
    outputs = config.get("num_labels", len(config.get("id2label", "12")))
    if outputs != 1:
        raise UserError(f"has {outputs} outputs", path=path, key="reward.model", fix="use a model with num_labels 1")


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json of a sequence-classification model: of a causal base, or of an encoder."""
    path = sources.file(model, "config.json")
    if path is not None:
        found = read_json(Path(path))
        if reads_pairs(found):
            return found
    return read_config(model)


def reads_pairs(config: dict[str, Any]) -> bool:
    return refused(config) is ENCODER


def classifier(config: ModelConfig, dtype: torch.dtype, machine: Hardware) -> Any:
    """A stored sequence-classification model."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            sources.locate(config), dtype=dtype, trust_remote_code=False, output_loading_info=True,
            **({} if machine.device == "cpu" else {"device_map": {"": torch.accelerator.current_device_index()}}),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(
            str(error).splitlines()[0], path=config.name, key="reward.model", fix="check the name"
        ) from None
    check_loading(info, config.name)
    return model
