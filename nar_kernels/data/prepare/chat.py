"""Conversations as text, and what the assistant says in it: :class:`Chat`."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nar_kernels.extras import import_extra

Spans = list[tuple[int, int]]

# Around what a template marks as generated: no characters, by the Unicode standard.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class Chat:
    """Renders conversations by a chat template, as transformers does.

    What the assistant says is what the template marks with ``{% generation %}``. Without marks, it
    is what a message of the assistant adds to the text of those before it, which the template must
    begin with the same text.

    Args:
        template: Jinja, run in a sandbox.
        special_tokens: variables for it, such as ``"bos_token"``.

    It is compiled when it is first used: most texts are no conversations.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._source, self._special_tokens = template, special_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return Chat, (self._source, self._special_tokens)

    @cached_property
    def _compiled(self) -> tuple[Any, bool]:
        """The template, and whether it marks what is generated."""
        environment = _environment()
        try:
            template = environment.from_string(self._source)
        except import_extra("jinja2", None).TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template is malformed, in line {error.lineno}: {error.message}"
            ) from error
        return template, environment.has_marks

    def render(
        self, messages: object, *, num_prompt: int = 0, tools: Any = None
    ) -> tuple[str, Spans]:
        """The text of a conversation, and where in it the assistant speaks.

        Args:
            messages: dicts with ``"role"`` and ``"content"``.
            num_prompt: if not 0, all after so many messages counts, and nothing before.
            tools: a list for the template, or None.

        Raises:
            ValueError: the messages are malformed, or the template is, or refuses them.
            ImportError: without jinja2.
        """
        checked = _checked(messages)
        _check_marks(tools, "the list of tools")
        text, marked = self._render(checked, tools)
        if num_prompt:
            return text, [(self._end_of(checked[:num_prompt], text, tools, True), len(text))]
        if self._compiled[1]:
            return text, marked
        spans = []
        for i, message in enumerate(checked):
            if message["role"] == "assistant":
                start = (
                    self._end_of(checked[:i], text, tools, True) if i else self._start(text, tools)
                )
                end = self._end_of(checked[: i + 1], text, tools, False)
                spans.append((start, end))
        return text, spans

    def _start(self, text: str, tools: Any) -> int:
        """Where the assistant speaks that begins a conversation."""
        try:
            return self._end_of([], text, tools, True)
        except ValueError as error:
            raise ValueError(
                "the assistant begins the conversation, and the chat template does not say where "
                "it speaks then: mark that in the template with {% generation %} and "
                "{% endgeneration %}, or begin with a message of another role"
            ) from error

    def _end_of(self, messages: list[dict[str, Any]], text: str, tools: Any, prompts: bool) -> int:
        """How much of the text of a conversation its first messages are, with what prompts the
        assistant to answer, if ``prompts``."""
        prefix, _ = self._render(messages, tools, add_generation_prompt=prompts)
        if not text.startswith(prefix):
            raise ValueError(
                f"the chat template writes the first {len(messages)} messages otherwise when more "
                "follow, so it cannot be said which tokens are the assistant's: mark them in the "
                "template with {% generation %} and {% endgeneration %}, and give conversations as "
                "'messages'"
            )
        return len(prefix)

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool = False
    ) -> tuple[str, Spans]:
        template, has_marks = self._compiled
        try:
            text = template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # of any kind, as of a program
            hint = ""
            if "strftime_now" in str(error):
                hint = " (a corpus must not depend on today's date: write one into the template)"
            raise ValueError(f"the chat template fails: {error}{hint}") from error
        return _unmarked(text) if has_marks else (text, [])


def _environment() -> Any:
    """Jinja with what transformers offers to chat templates, but ``strftime_now``."""
    jinja2, nodes = import_extra("jinja2", None), import_extra("jinja2.nodes", None)

    class Generation(import_extra("jinja2.ext", None).Extension):  # type: ignore[misc]
        """``{% generation %}``: writes marks around what is in it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[Any]:
            next(parser.stream)
            parser.environment.has_marks = True
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opens, closes = (nodes.Output([nodes.TemplateData(mark)]) for mark in (_OPEN, _CLOSE))
            return [opens, *body, closes]

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = import_extra("jinja2.sandbox", None).ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.has_marks = False
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def _unmarked(marked: str) -> tuple[str, Spans]:
    text, *generated = marked.split(_OPEN)
    spans = []
    for part in generated:
        inside, _, after = part.partition(_CLOSE)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + after
    return text, spans


def _checked(messages: object) -> list[dict[str, Any]]:
    """Messages without what is None, which templates expect to be missing."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('its messages are no list like [{"role": "user", "content": "..."}]')
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {i} is not like {{"role": "user", "content": "..."}}')
        present = {name: value for name, value in message.items() if value is not None}
        _check_marks(present, f"message {i}")
        if "content" not in present and "tool_calls" not in present:
            raise ValueError(f"message {i}, of the {message['role']}, has no 'content'")
        checked.append(present)
    return checked


def _check_marks(value: object, what: str) -> None:
    text = json.dumps(value, ensure_ascii=False, default=str)
    if _OPEN in text or _CLOSE in text:
        raise ValueError(f"{what} has U+FDD0 or U+FDD1, which are no characters: drop it")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
