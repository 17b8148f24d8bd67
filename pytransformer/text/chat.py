"""Chat templates: a conversation as the one text that a model was tuned on.

A template is a program in Jinja's language that comes with the checkpoint. It is run in Jinja's sandbox, and sees plain data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Stands for the end of what is to be continued while the template is run. Of letters, as templates may strip and escape the text; the space
# shows whether they did strip.
_END, _SPACE = "PYTRANSFORMEREND", " "


def choose(templates: Mapping[str, str], wanted: str | None, has_tools: bool) -> str:
    """The template of that name, or ``wanted`` itself if there is none; by default "tool_use" for tools, otherwise "default".

    Raises:
        ValueError: there is no template to choose.
    """
    if wanted is not None:
        return templates.get(wanted, wanted)
    for name in ("tool_use", "default") if has_tools else ("default",):
        if name in templates:
            return templates[name]
    if templates:
        raise ValueError(f"chat_template must be one of {', '.join(sorted(templates))}: there is no default among them")
    raise ValueError("the tokenizer has no chat template: give one as chat_template, or set tokenizer.chat_template")


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation's text.

    Args:
        template: in Jinja's language.
        messages: with "role" and "content"; what is ``None`` counts as left out.
        tools: JSON schemas of functions.
        documents: with "title" and "text".
        add_generation_prompt: with the start of an answer at the end.
        continue_final_message: the text stops at the end of the last message's content, which the model then goes on with.
        variables: whatever else the template may ask for; special tokens by name are usual.

    Raises:
        TypeError: something that is no plain data (text, numbers, lists, mappings).
        ValueError: no messages, options that exclude each other, or the template refuses the conversation or is faulty.
    """
    import jinja2

    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    if continue_final_message and add_generation_prompt:
        raise ValueError(
            "continue_final_message goes on with the last message, add_generation_prompt starts another: choose one"
        )
    chat = [_message(message, index) for index, message in enumerate(messages)]
    for name, values in (("tools", tools), ("documents", documents)):
        for value in values or ():
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"{name} must be mappings (a function's is its JSON schema), got {type(value).__name__}"
                )
    final = _mark_end(chat) if continue_final_message else ""
    arguments = {
        "messages": chat,
        "tools": _plain(tools, "tools"),
        "documents": _plain(documents, "documents"),
        "add_generation_prompt": add_generation_prompt,
        **_plain(dict(variables or {}), "variables"),
    }
    try:
        text = _compiled(template).render(**arguments)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    except Exception as error:  # of Python itself, such as adding a number to a text
        raise ValueError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error
    return _cut_at_end(text, final) if continue_final_message else text


def _message(message: Any, index: int) -> dict[str, Any]:
    """A message of plain data, its reasoning under the names that templates read it by."""
    if not isinstance(message, Mapping):
        raise TypeError(
            f'messages must be mappings with "role" and "content", got {type(message).__name__} {message!r}'
        )
    plain = {key: _plain(value, f"messages[{index}]") for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any, name: str) -> Any:
    """A copy that holds no objects, whose methods a template could call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):  # numpy's numbers, enumerations: without their methods
            return kind.__str__(value) if kind is str else kind(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, name) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"{name} must hold plain data (text, numbers, lists, mappings), got {type(value).__name__}")


def _mark_end(chat: list[dict[str, Any]]) -> str:
    """Marks the end of the last message's text, and returns that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _END + _SPACE
        return content
    for block in reversed(content or ()):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text: str = block["text"]
            block["text"] = text + _END + _SPACE
            return text
    raise ValueError("continue_final_message needs a last message with text as its content")


def _cut_at_end(text: str, final: str) -> str:
    place = text.rfind(_END)
    if place < 0 or final.strip() not in text:
        raise ValueError("the chat template does not show the last message as it is, so it cannot be continued")
    kept = text[:place]
    # A template that strips messages has stripped the mark's space, and would have stripped the white space before it.
    return kept if text.startswith(_SPACE, place + len(_END)) else kept.rstrip()


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %} … {% endgeneration %}`` marks what the model wrote; here it is what stands inside, a scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Jinja's own escapes what HTML would take for markup.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from error
