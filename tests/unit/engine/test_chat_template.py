# SPDX-License-Identifier: Apache-2.0
"""Chat templates: transformers' results on well-behaved ones, an error and no harm from the others."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fakes import tiny_tokenizers as tiny
from wavetrain_engine.errors import CheckpointError, RequestError
from wavetrain_engine.text.chat_template import ChatTemplate
from wavetrain_engine.text.template_worker import TemplateRenderer, answer

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Wie heißt du? 😀"},
    {"role": "assistant", "content": "Ich heiße 'T'."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATES = {
    "plain": tiny.CHAT_TEMPLATE,
    "trimmed": "\n  {% for m in messages %}\n    {% if loop.first %}\n {{ m.role }}\n   {% endif %}\n  {% endfor %}\n",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ tools | tojson }}",
    "controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "methods": "{{ messages[0]['content'].strip().upper() }}{{ messages|map(attribute='role')|join(',') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "variables": "{{ enable_thinking }} {{ undefined_one is defined }} {{ bos_token }}{{ eos_token }}",
}


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    """One whose source each test gives; its time limit is short."""
    made = ChatTemplate({"default": ""}, {"bos_token": "<s>"}, timeout_s=0.5, max_chars=100_000)
    yield made
    made.close()


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("adds_prompt", [True, False])
def test_renders_as_transformers(tmp_path: Path, source: str, adds_prompt: bool) -> None:
    tiny.byte_level(tmp_path, chat_template=source)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        MESSAGES, tools=TOOLS, add_generation_prompt=adds_prompt, tokenize=False, enable_thinking=True
    )
    variables = {"messages": MESSAGES, "tools": TOOLS, "add_generation_prompt": adds_prompt, "enable_thinking": True}
    variables |= {"bos_token": "<s>", "eos_token": "</s>"}
    reply = answer(TemplateRenderer(), {"source": source, "variables": variables, "max_chars": 10_000})
    assert reply == {"text": expected}


def test_loads_from_either_file(tmp_path: Path) -> None:
    tiny.byte_level(tmp_path)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate.load(tmp_path, named)
    assert template is not None
    assert template.render(MESSAGES[1:2]) == "<s><|user|>\nWie heißt du? 😀</s>\n<|assistant|>\n"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}!", encoding="utf-8")
    of_file = ChatTemplate.load(tmp_path, named)
    assert of_file is not None
    assert of_file.render(MESSAGES) == "</s>!"
    template.close()
    of_file.close()


def test_named_templates(tmp_path: Path) -> None:
    sources = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tiny.byte_level(tmp_path, chat_template=sources)
    template = ChatTemplate.load(tmp_path, {})
    assert template is not None
    assert (template.render([]), template.render([], tools=TOOLS)) == ("plain", "with tools")
    template.close()


@pytest.mark.parametrize("value", [5, [{"name": "x", "template": "y"}], [{"name": "default"}], ["x"]])
def test_bad_declarations_are_checkpoint_errors(tmp_path: Path, value: Any) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.load(tmp_path, {})


def test_no_template_is_none(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, {}) is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{% if %}", "is not valid: line 1"),
        ("{{ messages[7].content.strip() }}", "fails on these messages: UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "fails on these messages: SecurityError"),
        ("{{ messages.append(1) }}", "fails on these messages: SecurityError"),
        ("{{ cycler.__init__.__globals__ }}", "fails on these messages: SecurityError"),
        ("{{ 'x' * 200000 }}", "too much text"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails on these messages: OverflowError"),
    ],
)
def test_bad_templates_are_errors(template: ChatTemplate, source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        template.render(MESSAGES, source=source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(200) }}",
        "{{ 7 ** (10 ** 9) }}",
        "{{ 'x' * (10 ** 11) }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    ],
    ids=["loops", "recursion", "power", "memory", "nesting"],
)
def test_endless_templates_end(template: ChatTemplate, source: str) -> None:
    started_s = time.monotonic()
    with pytest.raises(RequestError, match=r"took longer than|too much text|fails on these messages"):
        template.render(MESSAGES, source=source)
    assert time.monotonic() - started_s < 20
    assert template.render(MESSAGES, source="still {{ 'here' }}") == "still here"


def test_messages_must_be_json(template: ChatTemplate) -> None:
    with pytest.raises(RequestError, match="must be JSON values"):
        template.render([{"role": "user", "content": object()}])


def test_the_checkpoints_own_broken_template_is_its_fault() -> None:
    broken = ChatTemplate({"default": "{% if %}"}, {})
    with pytest.raises(CheckpointError, match="is not valid"):
        broken.render(MESSAGES)
    broken.close()
    broken.close()
