"""Conversations as ids for ChatGLM2, ChatGLM3 and GLM-4 in their own prompt formats, built per segment.

ChatGLM3 and GLM-4: `[gMASK] sop`, then per message `<|role|>` + encode(metadata + newline) + encode(content), each
encoded on its own. Control tokens inside content stay text. A Jinja template cannot do this exactly, so there is none.
ChatGLM2: one text of numbered rounds. Labels follow the published demos, with two differences on purpose: tool output
is never trained (the demo's README says so, its code does not), and a system message keeps its tools (the demo drops
them). Messages: finetune/data/types.py; `reasoning_content` has no place in these formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.types import Message, RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {role: role for role in ("system", "user", "assistant", "observation")} | {"tool": "observation"}
TOOL_PROMPT = "Answer the following questions as best as you can. You have access to the following tools:"
"""ChatGLM3's own words, used where tools come without a system message."""
TOOL_PROMPT_GLM4 = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)


def glm_version(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """2, 3, 4, or None for others: what finetune/models/chatglm/tokenizer.py leaves in tokenizer_config.json."""
    return tokenizer.init_kwargs.get("glm_version")


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a reply: the end of text, the user's turn, a tool's output. ChatGLM2 knows only the first."""
    if glm_version(tokenizer) == 2:
        return [tokenizer.eos_token_id]
    return [tokenizer.eos_token_id, _id(tokenizer, "<|user|>"), _id(tokenizer, "<|observation|>")]


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that closes a sample: ChatGLM3's demo takes </s>, GLM-4's <|user|>."""
    return _id(tokenizer, "<|user|>") if glm_version(tokenizer) == 4 else int(tokenizer.eos_token_id)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """Ids of the conversation so far and of the opening of the assistant's turn."""
    if glm_version(tokenizer) == 2:
        return _prefix(tokenizer) + _encode(tokenizer, _rounds(messages, tools)[0])
    ids = [i for _, segment in _segments(tokenizer, messages, tools) for i in segment]
    return [*_prefix(tokenizer), *ids, _id(tokenizer, "<|assistant|>")]


def encode_weighted(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None,
    train_on: str = "assistant",
) -> tuple[list[int], list[float]]:  # fmt: skip
    """Ids of a whole conversation and the loss weight of each, 0 where there is no loss.

    A token is trained if the token before it belongs to a trained message: the newline after `<|assistant|>` and the
    role that follows the reply are (they tell the model to begin and to stop), `<|assistant|>` itself is not.
    `train_on` is assistant, last or all; a message's own `train` (a flag or weight) goes before it.
    Raises RowProblem for what the format cannot hold.
    """
    wanted = turn_weights(messages, train_on)
    if glm_version(tokenizer) == 2:
        return _encode_rounds(tokenizer, messages, tools, wanted, float(train_on == "all"))
    ids = _prefix(tokenizer)
    carried = [0.0] * len(ids)
    for index, segment in _segments(tokenizer, messages, tools):
        ids += segment
        carried += [wanted[index]] * len(segment)
    return [*ids, end_id(tokenizer)], [0.0, *carried]


def turn_weights(messages: Sequence[Message], train_on: str) -> list[float]:
    """Loss weight of each message. Tool output has none, whatever its `train` says."""
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = {"assistant": set(replies), "last": set(replies[-1:]), "all": set(range(len(messages)))}[train_on]
    return [
        0.0 if ROLES.get(message["role"]) == "observation" else float(message.get("train", index in chosen))
        for index, message in enumerate(messages)
    ]


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [_id(tokenizer, "[gMASK]"), _id(tokenizer, "<sop>" if glm_version(tokenizer) == 4 else "sop")]


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def _segments(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, Any]] | None
) -> Iterator[tuple[int, list[int]]]:
    """(index of the message, ids) per turn of ChatGLM3 or GLM-4; each part is encoded on its own."""
    for index, role, metadata, content in _turns(messages, tools, glm4=glm_version(tokenizer) == 4):
        head = [_id(tokenizer, f"<|{role}|>"), *_encode(tokenizer, f"{metadata}\n")]
        yield index, head + _encode(tokenizer, content)


def _turns(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, glm4: bool
) -> Iterator[tuple[int, str, str, str]]:
    """(index of the message, role, metadata, content) of each turn; tools and tool calls make turns of their own."""
    own = any(message.get("tools") for message in messages)  # else the conversation's stand at its first message
    for index, message in enumerate(messages):
        role, content = ROLES.get(message["role"]), message.get("content") or ""
        if role is None:
            what = f"turn {index + 1}: role {message['role']!r} has no marker in this format"
            raise RowProblem("unknown_role", what, "use system, user, assistant or tool")
        described = message.get("tools") if own else (tools if index == 0 else None)
        if described:
            # Both models know bare descriptions; {"type": "function", "function": …} is OpenAI's wrapping.
            bare = [tool.get("function", tool) for tool in described]
            if glm4:
                yield index, "system", "", TOOL_PROMPT_GLM4 + "".join(map(_glm4_tool, bare))
            else:
                yield index, "system", "", f"{content if role == 'system' else TOOL_PROMPT}\n{_dump(bare)}"
            if role == "system" and not (glm4 and content):
                continue
        calls = message.get("tool_calls") or []
        if content or not calls:
            yield index, role, message.get("metadata") or "", content
        for call in calls:
            arguments = call["function"].get("arguments") or {}
            python = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            text = json.dumps(arguments, ensure_ascii=False) if glm4 else f"```python\ntool_call({python})\n```"
            yield index, role, call["function"]["name"], text


def _glm4_tool(tool: dict[str, Any]) -> str:
    return f"\n\n## {tool['name']}\n\n{_dump(tool)}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


def _dump(tools: Any) -> str:
    return json.dumps(tools, indent=4, ensure_ascii=False)


def _rounds(messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> tuple[str, list[tuple[int, int, int]]]:
    """ChatGLM2's prompt text up to the last `答：`, and (message index, begin, end) of each part of it."""
    if tools or any(message.get("tools") or message.get("tool_calls") for message in messages):
        raise RowProblem("tools", "ChatGLM2's prompt format has no tools", "use ChatGLM3 for data with tools")
    text, spans = "", []
    for index, message in enumerate(messages):
        wanted = ("user", "assistant")[index % 2]
        if message["role"] != wanted:
            what = f"turn {index + 1} is {message['role']}: ChatGLM2's rounds alternate user and assistant"
            raise RowProblem("role_order", what, "put instructions into the user's text; there is no system turn")
        text += f"[Round {index // 2 + 1}]\n\n问：" if wanted == "user" else ""
        spans.append((index, len(text), len(text) + len(message["content"])))
        text += message["content"] + ("\n\n答：" if wanted == "user" else "\n\n")
    if len(messages) % 2 == 0:
        what = "ChatGLM2's prompt ends with the user's turn"
        raise RowProblem("role_order", what, "let the user speak before a reply")
    return text, spans


def _encode_rounds(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[dict[str, Any]] | None,
    wanted: list[float], elsewhere: float,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """As in ChatGLM2's own fine-tuning: the prompt as one text, then the last reply encoded on its own, then `</s>`.

    Earlier replies stand inside the prompt's text; when trained, the tokens wholly inside them are.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise RowProblem("no_reply", "the last turn is not the assistant's", "end the conversation with a reply")
    text, spans = _rounds(messages[:-1], tools)
    prompt = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids = _prefix(tokenizer) + prompt["input_ids"]
    weights = [0.0] * (len(ids) - len(prompt["input_ids"]))
    for begin, end in prompt["offset_mapping"]:
        inside = [wanted[index] for index, first, last in spans if first <= begin and end <= last]
        weights.append(inside[0] if inside else elsewhere)
    reply = [*_encode(tokenizer, messages[-1]["content"]), tokenizer.eos_token_id]
    return ids + reply, weights + [wanted[-1]] * len(reply)
