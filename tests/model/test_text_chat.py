"""Chat templates give the text that transformers gives for the same folder."""

from __future__ import annotations

import enum
import json
from datetime import datetime

import numpy as np
import pytest
from transformers import AutoTokenizer

from pytransformer.text import Tokenizer
from pytransformer.text.chat import render

from .text_folders import write

MARKED = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

BRACKETED = """{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% set messages = messages[1:] %}
{% else %}
{% set system = '' %}
{% endif %}
{{ bos_token if bos_token is defined else '' }}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
    {% else %}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""

HEADED = """{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}
{%- set ns = namespace(calls=0, last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}{% set ns.last = messages | length - 1 - loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
    {{- tools[0] | tojson(indent=2) }}
{%- endif %}
{%- if documents %}{%- for document in documents %}{{- document['title'] + ': ' + document.text + '\\n' }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'debug' %}{% continue %}{% endif %}
    {%- if message.content is string %}{% set text = message.content %}
    {%- else %}{% set text = message.content | map(attribute='text') | join('') %}{% endif %}
    {{- '[' ~ message.role ~ ':' ~ ns.last ~ (message.name is defined) ~ ']' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {{- text }}
    {%- for call in message.tool_calls or [] %}
        {%- set ns.calls = ns.calls + 1 %}
        {{- ns.calls ~ call.function.name ~ (call.function.arguments | tojson(sort_keys=true)) }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""

TRACKED = """{% set kept = 'outside' %}
{% for message in messages %}
{% if message['role'] == 'assistant' %}
A: {% generation %}{% set kept = 'inside' %}{{ message['content'] }}{{ kept }}{{ loop.index }}{% endgeneration %}{{ kept }}

{% else %}
Q: {{ message['content'] }}
{% endif %}
{% endfor %}
{{ kept }}"""

TEMPLATES = {"marked": MARKED, "bracketed": BRACKETED, "headed": HEADED, "tracked": TRACKED}
TALK = [
    {"role": "user", "content": " Is 1 < 2 & 'a' > \"b\"? <|im_end|> "},
    {"role": "assistant", "content": "Yes: naïve 🙂\n"},
    {"role": "user", "content": "Why?  "},
]
TALKS = {
    "plain": TALK,
    "system": [{"role": "system", "content": "Be short."}, *TALK],
    "answered": TALK[:2],
    "tools": [
        {"role": "user", "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Paris?"}]},
        {"role": "debug", "content": "left out"},
        {
            "role": "assistant", "content": "", "thinking": "I must ask.", "name": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": {"town": "Paris", "days": 2, "at": [1.5, True]}}}],
        },
        {"role": "tool", "content": '{"sun": "<yes>"}'},
    ],
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "It's <b>'here'</b> – ü", "parameters": {"required": []}},
}


class Role(str, enum.Enum):
    USER = "user"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write("byte BPE", tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def both(folder):
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


# Only one of the templates knows tools.
@pytest.mark.parametrize(
    ("template", "talk"), [(name, talk) for name in TEMPLATES for talk in TALKS if talk != "tools" or name == "headed"]
)
def test_the_text_is_that_of_transformers(both, template, talk):
    ours, theirs = both
    for options in (
        {},
        {"add_generation_prompt": True},
        {"tools": [TOOL, TOOL], "documents": [{"title": "T", "text": "x < y"}], "enable_thinking": False, "add_generation_prompt": True},
        {"eos_token": "<END>"},
    ):  # fmt: skip
        options = {"chat_template": TEMPLATES[template], **options}
        if template == "bracketed" and talk == "system":
            options["bos_token"] = "<s>"
        expected = theirs.apply_chat_template(TALKS[talk], tokenize=False, **options)
        assert ours.apply_chat_template(TALKS[talk], tokenize=False, **options) == expected
        assert dict(ours.apply_chat_template(TALKS[talk], **options)) == dict(
            theirs.apply_chat_template(TALKS[talk], **options)
        )


def test_batches_tensors_and_bare_ids(both):
    ours, theirs = both
    options = {"chat_template": MARKED, "add_generation_prompt": True}
    for talk in (TALK, [TALK, TALKS["system"]]):
        given = {**options, "return_tensors": "pt", "padding": True}
        expected, got = theirs.apply_chat_template(talk, **given), ours.apply_chat_template(talk, **given)
        assert all((got[name] == expected[name]).all() for name in expected) and set(got) == set(expected)
        assert ours.apply_chat_template(talk, return_dict=False, **options) == theirs.apply_chat_template(
            talk, return_dict=False, **options
        )
    short = ours.apply_chat_template(TALK, truncation=True, max_length=5, return_dict=False, **options)
    assert short == theirs.apply_chat_template(TALK, truncation=True, max_length=5, return_dict=False, **options)
    assert ours.special_tokens_in(TALK[0]["content"]) == ["<|im_end|>"] and ours.special_tokens_in("<im_end>") == []


@pytest.mark.parametrize("template", ["marked", "bracketed", "headed"])
def test_the_last_message_can_be_continued(both, template):
    ours, theirs = both
    for content in ("Well, ", "a\n", "b", [{"type": "text", "text": "in "}, {"type": "text", "text": "parts "}]):
        if template != "headed" and not isinstance(content, str):
            continue
        talk = [TALK[0], {"role": "assistant", "content": content}]
        options = {"chat_template": TEMPLATES[template], "continue_final_message": True, "tokenize": False}
        assert ours.apply_chat_template(talk, **options) == theirs.apply_chat_template(talk, **options)
        assert talk[-1]["content"] is content


def test_templates_are_found_where_folders_keep_them(folder, tmp_path):
    """A file, several files, in tokenizer_config.json as text or by name."""
    theirs = AutoTokenizer.from_pretrained(folder)
    for index, (template, as_files) in enumerate(
        [(MARKED, True), (MARKED, False), ({"default": MARKED, "tool_use": HEADED}, True), ({"default": MARKED, "rag": HEADED}, False)]
    ):  # fmt: skip
        theirs.chat_template = template
        place = tmp_path / str(index)
        theirs.save_pretrained(place, save_jinja_files=as_files)
        ours, again = Tokenizer.load(place), AutoTokenizer.from_pretrained(place)
        assert ours.chat_template == again.chat_template == template
        for options in ({}, {"tools": [TOOL]}, *([{"chat_template": "rag"}] if "rag" in template else [])):
            expected = again.apply_chat_template(TALK, tokenize=False, **options)
            assert ours.apply_chat_template(TALK, tokenize=False, **options) == expected
        ours.save(place / "copy")
        assert AutoTokenizer.from_pretrained(place / "copy").chat_template == template
        ours.chat_template = TRACKED
        ours.save(place / "changed")
        for changed in (AutoTokenizer.from_pretrained(place / "changed"), Tokenizer.load(place / "changed")):
            assert changed.chat_template == TRACKED
    ours.chat_template = {"rag": HEADED}
    with pytest.raises(ValueError, match="chat_template must be one of rag"):
        ours.apply_chat_template(TALK)
    ours.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ours.apply_chat_template(TALK)


def test_plain_data_of_other_types_is_what_it_stands_for():
    messages = [
        {"role": Role.USER, "content": np.float64(1.5)},
        {"role": "n", "content": np.int64(3)},
        {"role": "t", "content": (1, "a")},
    ]
    assert (
        render("{{ messages | map(attribute='content') | list | tojson }}{{ messages[0].role }}", messages)
        == '[1.5, 3, [1, "a"]]user'
    )
    assert render("{{ strftime_now('%Y') }}{{ x }}", TALK, variables={"x": 1}) == f"{datetime.now().year}1"
    assert json.loads(render("{{ documents | tojson }}", TALK, documents=[{"a": None}])) == [{"a": None}]


@pytest.mark.parametrize(
    ("template", "messages", "options", "error", "message"),
    [
        (MARKED, [], {}, ValueError, "at least one message"),
        (MARKED, ["text"], {}, TypeError, "messages must be mappings .* got str 'text'"),
        (MARKED, [{"role": "user", "content": object()}], {}, TypeError, r"messages\[0\] must hold plain data .* got object"),
        (MARKED, TALK, {"tools": [print]}, TypeError, "tools must be mappings"),
        (MARKED, TALK, {"add_generation_prompt": True, "continue_final_message": True}, ValueError, "choose one"),
        (MARKED, [{"role": "user"}], {"continue_final_message": True}, ValueError, "needs a last message with text"),
        ("nothing", TALK, {"continue_final_message": True}, ValueError, "cannot be continued"),
        (BRACKETED, TALK[1:], {}, ValueError, "refuses the conversation: user and assistant must alternate"),
        ("{{ messages[0].content.missing.more }}", TALK, {}, ValueError, "refuses the conversation: .*missing"),
        ("{% for %}", TALK, {}, ValueError, "no Jinja template: line 1"),
        ("{{ ''.__class__.__mro__ }}", TALK, {}, ValueError, "refuses the conversation: .*unsafe"),
        ("{{ messages.append(1) }}", TALK, {}, ValueError, "refuses the conversation: .*'append'.*unsafe"),
    ],
)  # fmt: skip
def test_wrong_conversations_and_templates_are_refused(template, messages, options, error, message):
    with pytest.raises(error, match=message):
        render(template, messages, **options)
