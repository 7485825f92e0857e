"""Pages of docs/ that are made of the program: a page per command, the contents (index.md) and llms.txt.

python tools/docs_pages.py        writes them again (a test says when they are out of date)
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer

from finetune.cli.commands import app
from finetune.cli.examples import examples

DOCS = Path(__file__).parent.parent / "docs"
NAME = "ft"
ABOUT = "Parameter-efficient fine-tuning of open language models from one YAML recipe, on whatever hardware you have."
CONTENTS: dict[str, dict[str, str]] = {
    "Start": {
        "install.md": "pip, CUDA, mirrors, ModelScope, Docker, Windows and macOS, the Tab key",
        "real.md": "a published model fine-tuned on a CPU, with figures",
        "plan.md": "memory, time and what fits, before anything is loaded",
        "footguns.md": "what goes wrong most often, and what is said then",
    },
    "Data": {
        "data.md": "formats, mixing, splits, what is trained, every option",
        "chat.md": "talking to a model in the terminal or through a pipe",
    },
    "Training": {
        "recipe.md": "every key of a recipe: values, default, what it does",
        "methods.md": "LoRA and its kin, bottleneck, IA3, prompts, BitFit, all weights",
        "models.md": "families, what was tested and how, where models come from",
        "quantization.md": "the base in 8 or 4 bits, mixtures of experts included",
        "preference.md": "DPO and its kin, KTO, reward models",
        "ppo.md": "PPO with adapters of one base, reward models and rules",
        "cluster.md": "Slurm, Kubernetes and machines that are taken away",
        "reliability.md": "checkpoints, signals, kills, full disks: what is promised, and the test",
        "import.md": "configs of LLaMA-Factory, axolotl, ms-swift and trl",
    },
    "Looking at it": {
        "evaluation.md": "metrics, intervals, several sets, shots, multiple choice, harness tasks",
        "generate.md": "every row of a file with its prediction",
        "reports.md": "tables of runs, report.html, differences",
        "trackers.md": "tensorboard, wandb, swanlab, trackio, mlflow",
    },
    "Using it": {
        "serving.md": "OpenAI's API over HTTP",
        "export.md": "merging, vLLM, peft, hubs",
        "gguf.md": "from Ollama and llama.cpp, and back",
    },
    "中文": {
        "zh/quickstart.md": "从零到一个合并好的模型",
        "zh/install.md": "安装、CUDA、镜像、ModelScope、Docker、Windows 与 macOS",
        "zh/data.md": "数据格式与选项",
        "zh/methods.md": "适配方法",
        "zh/glossary.md": "FT_LANG=zh，以及帮助与报错的用词",
    },
    "The program": {
        "architecture.md": "rooms of the house, the way of a recipe and of a row",
        "guards.md": "kinds of faults, and where each is guarded",
        "bad_inputs.md": "what is said to input that is wrong",
        "licences.md": "licences of the dependencies",
    },
}
"""Section -> its pages with a phrase each. What stands in none of them is listed last, with its first sentence."""
OTHERS = "More"
COMMANDS = "commands/index.md"
MORE: dict[str, tuple[str, ...]] = {
    "pretrain": ("data.md", "recipe.md"), "sft": ("data.md", "methods.md", "recipe.md"),
    "reward": ("preference.md",), "dpo": ("preference.md",), "kto": ("preference.md",), "ppo": ("ppo.md",),
    "plan": ("plan.md",), "merge": ("export.md", "gguf.md"), "export": ("export.md",), "eval": ("evaluation.md",),
    "generate": ("generate.md",), "compare": ("methods.md",), "report": ("reports.md",), "chat": ("chat.md",),
    "serve": ("serving.md",), "doctor": ("install.md",), "models": ("models.md",),
    "recipes": ("recipe.md", "import.md"), "data": ("data.md",), "runs": ("reports.md",),
}  # fmt: skip
"""Command -> the pages that say more."""
MADE = "<!-- Made by `python tools/docs_pages.py` from finetune/cli/; do not edit. -->"


def tree() -> Any:
    """The commands as click has them."""
    return typer.main.get_command(app)


def cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def code(text: str) -> str:
    return f"`{' '.join(text.split())}`".replace("|", "\\|")


def rows(command: Any, context: Any, kind: str) -> list[str]:
    """A table of the arguments or options."""
    records = [
        param.get_help_record(context) for param in command.params
        if param.param_type_name == kind and not getattr(param, "hidden", False)
    ]  # fmt: skip
    lines = [f"| {code(names)} | {cell(said)} |" for names, said in filter(None, records)]
    return [f"| {kind} | what it does |", "|---|---|", *lines, ""] if lines else []


def described(command: Any, name: str, level: int) -> list[str]:
    """A command: what it does, how it is called, examples, its arguments and options."""
    context = command.make_context(f"{NAME} {name}", [], resilient_parsing=True)
    usage = " ".join([f"{NAME} {name}", *command.collect_usage_pieces(context)])
    shown = ["```bash", *examples(name), "```", ""] if examples(name) else []
    return [
        f"{'#' * level} {NAME} {name}", "", *inspect.cleandoc(command.help or "").splitlines(), "",
        "```text", usage, "```", "", *shown, *rows(command, context, "argument"), *rows(command, context, "option"),
    ]  # fmt: skip


def pages() -> dict[str, str]:
    """Path below docs/ -> text."""
    found: dict[str, str] = {}
    listed = ["# Commands", "", MADE, "", f"`{NAME} COMMAND --help` shows the same in the terminal, and `{NAME} help` "
              "lists them. Of exit codes: 0 done, 2 you can mend it, 1 a failed run or a bug, 130 interrupted.", "",
              "| command | what it does |", "|---|---|"]  # fmt: skip
    for name, command in tree().commands.items():
        listed.append(f"| [`{NAME} {name}`]({name}.md) | {cell(first_sentence(command.help or ''))} |")
        lines = described(command, name, 1) if not hasattr(command, "commands") else []
        if hasattr(command, "commands"):
            lines = [f"# {NAME} {name}", "", command.help or "", ""]
            for inner, one in command.commands.items():
                lines += described(one, f"{name} {inner}", 2)
        links = ", ".join(f"[{title(DOCS / page)}](../{page})" for page in MORE.get(name, ()))
        text = "\n".join([lines[0], "", MADE, *lines[1:], *([f"More: {links}"] if links else [])])
        found[f"commands/{name}.md"] = re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"
    everywhere = [f"| {code(names)} | {cell(said)} |" for names, said in general()]
    listed += ["", "Everywhere:", "", "| option | what it does |", "|---|---|", *everywhere, "", SHELLS]
    return {COMMANDS: "\n".join(listed), **found}


def general() -> list[tuple[str, str]]:
    command = tree()
    context = command.make_context(NAME, [], resilient_parsing=True)
    return [record for param in command.params if (record := param.get_help_record(context))]


SHELLS = """## The Tab key

`ft --install-completion` adds completion to bash, zsh, fish or PowerShell (whichever runs it);
`ft --show-completion` prints the script. It knows commands and options, shipped recipes, runs and adapters below the
folder, keys of `--set` with their values, built-in bases and data, and answers without loading torch.
"""


def title(path: Path) -> str:
    """The first heading of a page, or its name where there is none yet."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else path.stem


def about(path: Path) -> str:
    """The first sentence of a page, without markup."""
    paragraphs = re.split(r"\n\s*\n", re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
    text = next((p for p in paragraphs if not re.match(r"\s*([#|`!<-]|$)", p)), "")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", lambda m: m[1] or "", " ".join(text.split()))
    return first_sentence(plain)


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s|(?<=。)", " ".join(text.split()))[0]


def contents() -> dict[str, list[str]]:
    """Section -> pages that are there, the rest under "More"."""
    made = {"index.md", *pages()}
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - made
    found = {name: [page for page in named if page in there] for name, named in CONTENTS.items()}
    found["Commands"] = [COMMANDS]
    rest = sorted(there - {page for named in found.values() for page in named})
    return found | ({OTHERS: rest} if rest else {})


def listing(prefix: str = "") -> list[str]:
    lines = []
    for section, named in contents().items():
        lines += [f"## {section}", ""]
        for page in named:
            said = CONTENTS.get(section, {}).get(page) or (
                "a page for each" if page == COMMANDS else about(DOCS / page)
            )
            lines.append(f"- [{'Commands' if page == COMMANDS else title(DOCS / page)}]({prefix}{page}): {said}")
        lines.append("")
    return lines


def index() -> str:
    return "\n".join([f"# {NAME}", "", MADE, "", ABOUT, "", "```bash", *examples(""), "```", "", *listing()])


MACHINES = """\
> {about}

- `ft recipes schema` prints the JSON schema of recipes; `ft recipes explain KEY --json -` what a key does, its values
  and its default.
- Every command that prints a table has `--json FILE|-` (`-` is stdout). Training commands write result.json and
  metrics.jsonl into the run directory.
- `ft COMMAND --dry-run` of a training command checks everything and prints the complete recipe. `ft plan` says what it
  needs.
- Exit codes: 0 done, 2 a mistake that can be mended (one line each on stderr: path, row or line, key, fix), 1 a failed
  run or a bug, 130 interrupted with a checkpoint saved (`--resume` goes on).
- Nothing asks questions, and nothing of the user's is overwritten without `--overwrite`.
"""


def llms() -> str:
    """docs/llms.txt, as llmstxt.org describes it."""
    commands = [f"- [{NAME} {name}](commands/{name}.md): {first_sentence(command.help or '')}"
                for name, command in tree().commands.items()]  # fmt: skip
    lines = listing()
    at = lines.index("## Commands")
    lines[at + 2 : at + 3] = commands
    return "\n".join([f"# {NAME}", "", MACHINES.format(about=ABOUT), *lines]).rstrip() + "\n"


def everything() -> dict[str, str]:
    return {**pages(), "index.md": index(), "llms.txt": llms()}


def main() -> None:
    made = pages()
    for folder in {(DOCS / path).parent for path in made}:
        folder.mkdir(exist_ok=True)
    for path, text in made.items():  # first: the contents name them
        (DOCS / path).write_text(text, encoding="utf-8")
    for old in DOCS.glob("commands/*.md"):
        if f"commands/{old.name}" not in made:
            old.unlink()
    for path, text in everything().items():
        (DOCS / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
