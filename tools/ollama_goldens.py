"""What Go's text/template renders of our Ollama templates: writes tests/fixtures/ollama/goldens.json.

python tools/ollama_goldens.py      # wants a Go toolchain; the tests read the result and want none
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from finetune.data import templates
from finetune.data.types import RowProblem
from finetune.models.gguf.turns import PLAIN, SHAPES, Message, Render, learned

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "fixtures" / "ollama" / "goldens.json"
PROGRAM = ROOT / "tools" / "ollama_template" / "main.go"
SHIPPED = ROOT / "data_templates" / "chat_templates"
BUILTIN = ROOT / "finetune" / "builtin" / "bases"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are {{ kind }}.<|im_end|>\n' }}{% endif %}"
)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
OTHERS = {
    "roles in bars": TURNS + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "a default system turn": DEFAULT
    + CHATML
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
"""Ways of writing a conversation that no shipped template has: Zephyr's, and SmolLM2's with braces in its words."""


def renderer(template: str) -> Render:
    def render(messages: list[Message], prompt: bool, tools: Any = None) -> str | None:
        try:
            return templates.render(template, messages, tools, SPECIAL, prompt)
        except RowProblem:
            return None

    return render


def chat_templates() -> dict[str, str]:
    files = [*sorted(SHIPPED.glob("*.jinja")), *sorted(BUILTIN.glob("*/chat_template.jinja"))]
    named = {f.stem if f.parent == SHIPPED else f.parent.name: f.read_text(encoding="utf-8") for f in files}
    return named | OTHERS


def conversations() -> dict[str, list[Message]]:
    """Those of which the roles and texts say everything."""
    every = PLAIN | {name: given["messages"] for name, given in SHAPES.items() if not given.get("tools")}
    return {name: found for name, found in every.items() if all(m.keys() <= {"role", "content"} for m in found)}


def main() -> None:
    every = {name: learned(renderer(template)) for name, template in chat_templates().items()}
    known = {name: turns for name, turns in every.items() if turns is not None}
    tasks = [{"template": turns.go(), "conversations": list(conversations().values())} for turns in known.values()]
    done = subprocess.run(
        ["go", "run", str(PROGRAM)], input=json.dumps(tasks), text=True, stdout=subprocess.PIPE, check=True
    )
    rendered = json.loads(done.stdout)
    found = {
        name: {"go": turns.go(), "rendered": dict(zip(conversations(), texts, strict=True))}
        for (name, turns), texts in zip(known.items(), rendered, strict=True)
    }
    GOLDENS.parent.mkdir(parents=True, exist_ok=True)
    GOLDENS.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} templates, {sum(len(row['rendered']) for row in found.values())} conversations: {GOLDENS}")


if __name__ == "__main__":
    main()
