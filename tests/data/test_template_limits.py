# ruff: noqa: E501  (a template a line reads best)
"""A template that comes with a model may neither run for ever nor fill the memory, and reaches nothing of Python."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_tokenizer
from jinja2 import TemplateSyntaxError

from finetune.data import template_limits, templates
from finetune.data.types import RowProblem
from finetune.errors import RunError, UserError
from finetune.evaluation import harness
from finetune.models.gguf import vocabulary

MESSAGES = [{"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"}]
ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    "a loop that writes nothing": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[[[[1]*99]*99]*99]*99] recursive %}{{ loop(x) if x is iterable }}{% endfor %}",
    "a filter's rounds": "{% for a in range(99999)|map('string')|list %}{% for b in range(99999)|select %}"
    "{% endfor %}{% endfor %}",
}
LARGE = {
    "times": "{{ 'a' * 10000000000 }}",
    "times, reversed": "{{ 10000000000 * 'a' }}",
    "a list times": "{{ [0] * 10000000000 }}",
    "power": "{{ 10 ** 99999 }}",
    "digits": "{% set n = namespace(x=99999) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "center": "{{ 'a'|center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "a keyword": "{{ 'a'|indent(width=10000000000) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (9999999999, 1) }}",
    "format filter": "{{ '%9999999999d'|format(1) }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format, nested": "{{ '{:{w}}'.format(1, w=9999) }}",
    "doubled": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "plus": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "replace": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 99999 %}{{ x|replace('a', x) }}",
    "replace by map": "{% set x = 'a' * 99999 %}{{ [x]|map('replace', 'a', x)|list }}",
    "join": "{% set x = 'a' * 99999 %}{{ x.join(range(99999)) }}",
    "join filter": "{% set x = 'a' * 99999 %}{{ (range(99999)|list)|join(x) }}",
    "set blocks": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% endfor %}{{ n.x }}",
    "fixed text": "{% for a in range(9999) %}" + "a" * 99_999 + "{% endfor %}",
    "fixed text in a macro": "{% macro f() %}{% for a in range(9999) %}" + "a" * 99_999 + "{% endfor %}{% endmacro %}{{ f() }}",
    "the template": "a" * (1 << 20) + "b",
}  # fmt: skip
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ messages.__init__.__globals__ }}",
    "attr": "{{ ''|attr('__class__') }}",
    "format": "{{ '{0.__class__}'.format('') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "changed rows": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
}


def rendered(text: str) -> str:
    return templates.render(text, MESSAGES, None, {})


@pytest.mark.parametrize("name", ENDLESS)
def test_no_rendering_is_endless(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    with pytest.raises(RowProblem, match=r"the chat template is stopped: it(s loops take more than|.* takes longer)"):
        rendered(ENDLESS[name])


@pytest.mark.parametrize("name", LARGE)
def test_no_rendering_fills_the_memory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(template_limits, "LARGEST_TEXT", 1 << 20)
    monkeypatch.setattr(template_limits, "MOST_ITEMS", 100_000)
    with pytest.raises((RowProblem, TemplateSyntaxError), match=r"the chat template is stopped: it |larger than 1 MiB"):
        rendered(LARGE[name])


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_of_python_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        text = rendered(ESCAPES[name])
    except RowProblem:
        text = ""
    assert text == ""  # what is unsafe is undefined, which is written as nothing
    assert not (tmp_path / "pwned").exists()


def test_a_model_with_such_a_template_is_refused_by_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import make_tokenizer

    monkeypatch.setattr(template_limits, "SECONDS", 0.1)
    tokenizer: Any = make_tokenizer()
    tokenizer.template_file = "x/chat_template.jinja"
    with pytest.raises(UserError, match=r"x/chat_template\.jinja: model\.chat_template: the chat template is stopped"):
        templates.check(ENDLESS["loops in loops"], tokenizer, "x")
    with pytest.raises(UserError, match="nested too deeply"):
        templates.check("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", tokenizer, "x")


def test_what_is_counted_changes_nothing() -> None:
    """Filters, tests, loops and calls as transformers itself renders them."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    text = (
        "{%- macro show(m, i=0) -%}{{ m.role|upper ~ ': ' + m['content'].strip()|replace('a', 'b') }}{{ i }}{%- endmacro -%}"
        "{% for m in messages[::-1] if m.role != 'system' %}{{ loop.index ~ '/' ~ loop.length }}{{ show(m, i=loop.index0) }}"
        "{% else %}none{% endfor %}{% set ns = namespace(n=0) %}{% for x in [1, [2, [3]]] recursive %}"
        "{{ loop(x) if x is iterable else x }}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n * 2 }}{{ 'x' * 3 }}{{ 7 % 4 }}"
        "{{ '%s-%d' % ('a', 1) }}{{ '{}'.format(3) }}{{ missing is defined }}{{ missing|default('d') }}{{ missing }}"
        "{{ {'a': [1, 2]}|tojson(indent=1) }}{{ [3, 1]|sort|join(',') }}{{ ','.join(['p', 'q']) }}{{ 'u1' in messages[0].content }}"
        "{% filter upper %}abc{% endfilter %}{% call(x) show_all() %}{{ x }}{% endcall %}{{ messages|map(attribute='role')|list }}"
    ).replace("{% call(x) show_all() %}{{ x }}{% endcall %}", "{% set b %}in {{ 1 }}{% endset %}{{ b }}")  # fmt: skip
    given = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": False}
    assert rendered(text) == _compile_jinja_template(text).render(**given)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral_trimming"])
def test_a_prompt_is_that_of_transformers(name: str, goes_on: bool) -> None:
    texts = {
        "chatml": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "llama3": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        "mistral_trimming": "{% for m in messages %}({{ m['content']|trim }}){% endfor %}",
    }
    tokenizer = make_tokenizer()
    tokenizer.chat_template = texts[name]
    chat = [{"role": "user", "content": "what is "}, {"role": "assistant", "content": "it is  "}][: 1 + goes_on]
    theirs = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
    )
    assert templates.asked(texts[name], chat, dict(tokenizer.special_tokens_map), goes_on) == theirs


def test_the_harness_renders_within_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would render it without."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    calm = "{% if messages|length > 2 %}" + ENDLESS["loops in loops"] + "{% endif %}x"
    encoder = SimpleNamespace(template=calm, tokenizer=SimpleNamespace(special_tokens_map={}), thinking=None)
    given: Any = SimpleNamespace(chat_template_args={})
    ask = harness.adapter_of(encoder).apply_chat_template  # type: ignore[arg-type]
    assert ask(given, MESSAGES) == "x"
    with pytest.raises(RunError, match="the chat template is stopped"):
        ask(given, [*MESSAGES, *MESSAGES])


def test_a_gguf_file_is_made_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations are written by the function that is handed over, and by nothing else."""
    seen: list[Any] = []

    def render(chat: list[dict[str, str]], prompt: bool) -> str | None:
        seen.append((len(chat), prompt))
        return None if len(chat) > 1 else "<s>a"

    tokenizer = make_tokenizer()
    tokenizer.chat_template = ENDLESS["loops in loops"]
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: pytest.fail("rendered without limits"))
    assert set(vocabulary.chats_of(tokenizer, render)) == {"<s>a"}
    assert {*seen} == {(1, True), (3, True)}
