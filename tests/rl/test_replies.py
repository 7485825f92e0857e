"""Replies and what is read off them, against the same thing done row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from finetune.adapters.load import apply
from finetune.recipe.adapters import ADAPTERS
from finetune.rl.replies import (
    Replies,
    Sampling,
    Support,
    end_scores,
    hidden_states,
    joined,
    log_probs,
    response_logits,
    sample,
    support,
    together,
    token_values,
)

PROMPTS = [[40, 50, 60, 70, 80], [90], [33, 44, 55]]
REPLIES = [[7, 8, 2], [9, 10, 11, 12], [2]]
STOPS = [2]
SOFT = ["prompt_tuning", "p_tuning", "prefix_tuning"]


@pytest.fixture
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.fixture
def replies() -> Replies:
    return together(PROMPTS, REPLIES, STOPS, 0, "cpu")


def adapted(model: Any, method: str) -> Any:
    torch.manual_seed(3)
    found = apply(model, ADAPTERS[method](num_virtual_tokens=6) if method in SOFT else ADAPTERS[method]())
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return found


@torch.no_grad()
def one_by_one(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(logits, last hidden states) of prompt and reply, without batch, padding or virtual tokens."""
    found = []
    for prompt, reply in zip(PROMPTS, REPLIES, strict=True):
        ids = torch.tensor([prompt + reply])
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        found.append((out.logits[0, -ids.shape[1] :], out.hidden_states[-1][0, -ids.shape[1] :]))
    return found


def test_layout(replies: Replies) -> None:
    assert replies.ids.shape == (3, 8), "the longest row needs no padding"
    assert replies.ids.tolist() == [
        [40, 50, 60, 70, 80, 7, 8, 2], [90, 9, 10, 11, 12, 0, 0, 0], [33, 44, 55, 2, 0, 0, 0, 0],
    ]  # fmt: skip
    assert replies.attention.sum(1).tolist() == [8, 5, 4]
    assert replies.mask.sum(1).tolist() == [3, 4, 1]
    assert replies.ended.tolist() == [True, False, True]
    assert [replies.text_ids(i, STOPS) for i in range(3)] == [[7, 8], [9, 10, 11, 12], []]
    part = replies.rows(torch.tensor([2, 1]))
    assert part.ids[:, :5].tolist() == [[33, 44, 55, 2, 0], [90, 9, 10, 11, 12]]
    assert part.tokens.shape == (2, replies.tokens.shape[1])


@pytest.mark.parametrize("method", [None, "lora", *SOFT])
def test_every_reading_is_that_of_a_row_alone(model: Any, replies: Replies, method: str | None) -> None:
    """Logits, log-probabilities, values and scores: no padding, neighbour or virtual token gets in between."""
    whole = model if method is None else adapted(model, method)
    expected = one_by_one(whole.eval())
    head = torch.nn.Linear(64, 1)
    sampling = Sampling(temperature=0.7, max_new_tokens=8)
    with torch.no_grad():
        logits = response_logits(whole, replies)
        found = log_probs(logits, replies.tokens, sampling)
        values, scores = token_values(whole, head, replies), end_scores(whole, head, replies)
        states = hidden_states(whole, replies)
    for i, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        n, t = len(prompt), len(reply)
        theirs, hidden = expected[i]
        torch.testing.assert_close(states[i, : n + t], hidden, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[i, :t], theirs[n - 1 : n + t - 1], atol=1e-5, rtol=1e-5)
        alone = torch.log_softmax(theirs[n - 1 : n + t - 1].double() / 0.7, -1)[range(t), reply]
        torch.testing.assert_close(found[i, :t].double(), alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[i, :t], head(hidden[n - 1 : n + t - 1])[:, 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scores[i], head(hidden[-1])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", SOFT)
@pytest.mark.parametrize("training", [False, True])
def test_hidden_states_of_soft_prompts_by_hand(model: Any, replies: Replies, method: str, training: bool) -> None:
    """The virtual tokens put in by hand: as embeddings before the text, or as a cache."""
    whole = adapted(model, method)
    soft = whole.eval().get_prompt(batch_size=1)
    whole.train(training)
    with torch.no_grad():
        found = hidden_states(whole, replies)
        for i in range(3):
            n = len(PROMPTS[i]) + len(REPLIES[i])
            ids = replies.ids[i : i + 1, :n]
            network = whole.get_base_model().model
            if method == "prefix_tuning":
                soft = whole.eval().get_prompt(batch_size=1)
                by_hand = network(input_ids=ids, past_key_values=soft).last_hidden_state[0]
            else:
                embedded = torch.cat([soft, network.embed_tokens(ids)], 1)
                by_hand = network(inputs_embeds=embedded).last_hidden_state[0, -n:]
            torch.testing.assert_close(found[i, :n], by_hand, atol=1e-5, rtol=1e-5)


def brute_force(logits: torch.Tensor, sampling: Sampling) -> list[int]:
    """Which tokens top-k and then top-p leave, of one position."""
    p = torch.softmax(logits.double() / sampling.temperature, -1)
    order = sorted(range(len(p)), key=lambda i: -p[i].item())
    if sampling.top_k:
        order = order[: sampling.top_k]
    total, kept, mass = sum(p[i].item() for i in order), [], 0.0
    for i in order:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += p[i].item() / total
    return kept


def at(allowed: Support, row: int, position: int) -> set[int]:
    return set(allowed.ids[row].split(allowed.counts[row].tolist())[position].tolist())


@pytest.mark.parametrize(
    "sampling",
    [Sampling(*drawn, max_new_tokens=4) for drawn in ((1.0, 5), (0.8, 0, 0.6), (1.3, 7, 0.5), (1.0, 1))],
)
def test_truncated_sampling_renormalises(sampling: Sampling) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 20) * 2
    kept = [[brute_force(logits[b, t], sampling) for t in range(4)] for b in range(3)]
    tokens = torch.tensor([[kept[b][t][-1] for t in range(4)] for b in range(3)])  # the unlikeliest that may come
    allowed = support(logits, tokens, sampling)
    assert allowed is not None
    found = log_probs(logits, tokens, sampling, allowed)
    for b in range(3):
        for t in range(4):
            assert at(allowed, b, t) == set(kept[b][t])
            p = torch.softmax(logits[b, t].double()[kept[b][t]] / sampling.temperature, -1)
            assert found[b, t].item() == pytest.approx(p[-1].log().item(), abs=1e-5)
    # The policy moves: the set stays, and what it holds still sums to one.
    moved = logits + torch.randn_like(logits)
    each = torch.stack([log_probs(moved, torch.full((3, 4), k), sampling, allowed) for k in range(20)], -1).exp()
    sums = [[sum(each[b, t, i] for i in at(allowed, b, t)) for t in range(4)] for b in range(3)]
    torch.testing.assert_close(torch.tensor(sums), torch.ones(3, 4))
    # Other rows in another order, and rows of several passes as one.
    index = torch.tensor([2, 0])
    torch.testing.assert_close(log_probs(logits[index], tokens[index], sampling, allowed.rows(index)), found[index])
    parts = [support(logits[i : i + 1], tokens[i : i + 1], sampling) for i in range(3)]
    torch.testing.assert_close(log_probs(logits, tokens, sampling, joined(parts)), found)


def test_a_token_outside_of_the_set_is_let_in() -> None:
    """Rounding may have sampled what is just outside by the second reckoning: its ratio must be finite."""
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    token = torch.tensor([[3]])
    allowed = support(logits, token, Sampling(top_k=2, max_new_tokens=1))
    assert allowed is not None
    assert at(allowed, 0, 0) == {0, 1, 3}
    assert torch.isfinite(log_probs(logits, token, Sampling(top_k=2, max_new_tokens=1), allowed)).all()
    assert support(logits, token, Sampling(max_new_tokens=1)) is None


@pytest.mark.parametrize(
    "sampling",
    [Sampling(*drawn, max_new_tokens=1) for drawn in ((), (0.5,), (1.0, 4), (1.0, 0, 0.6), (0.7, 9, 0.8))],
)
def test_samples_come_from_the_distribution(model: Any, sampling: Sampling) -> None:
    """Frequencies of the first token against the probabilities of those that temperature, top-k and top-p leave."""
    torch.manual_seed(0)
    n = 3000
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # as it is drawn, all tokens are about equally likely at any temperature
        logits = model(torch.tensor([[40, 50, 60]])).logits[0, -1]
    kept = brute_force(logits, sampling)
    p = torch.zeros(len(logits)).index_put((torch.tensor(kept),), (logits[kept] / sampling.temperature).softmax(-1))
    found = sample(model, [[40, 50, 60]] * n, sampling, STOPS, 0, n)
    seen = torch.bincount(found.tokens[:, 0], minlength=len(p)) / n
    assert seen[p == 0].sum() == 0
    assert ((seen - p).abs() <= 5 * (p / n).sqrt() + 1 / n).all()


def test_only_the_recipe_says_how_to_sample(model: Any) -> None:
    """A repetition penalty of generation_config.json would make the sampled another distribution than the learned."""
    sampling = Sampling(max_new_tokens=6)

    def drawn() -> list[list[int]]:
        torch.manual_seed(5)
        return sample(model, PROMPTS, sampling, STOPS, 0, 2).tokens.tolist()

    plain, asked = drawn(), GenerationConfig(repetition_penalty=5.0, top_k=3, temperature=0.1, do_sample=True)
    model.generation_config = asked
    assert drawn() == plain
    assert model.generation_config is asked


@pytest.mark.parametrize("method", [None, *SOFT])
def test_generation_with_padding_is_that_of_a_row_alone(model: Any, method: str | None) -> None:
    whole = model if method is None else adapted(model, method)
    together_, alone = (sample(whole, PROMPTS, Sampling(top_k=1, max_new_tokens=5), STOPS, 0, size) for size in (3, 1))
    assert torch.equal(together_.ids, alone.ids)
    assert not whole.training
