"""Renders a model's chat template (Jinja), in a sandbox since templates arrive with downloaded files.

Templates are written against the environment that Hugging Face `transformers` gives them: trimmed blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that leaves non-ASCII text alone, and `{% generation %}` blocks.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; it prints its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    helpers = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source, globals=helpers)


def render_chat(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Renders `messages` with the template `source`.

    Args:
      messages: each with "role" (system, user, assistant) and "content".
      add_generation_prompt: end with the words that open the assistant's turn.
      special_tokens: names the template may use, such as bos_token and eos_token.

    Raises:
      ValueError: a message lacks its role or content, or the template is malformed or refuses the messages.
    """
    if not messages:
        raise ValueError("messages: got an empty sequence, wanted at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(
                f"messages[{number}]: got {message!r}, wanted a mapping with role and content"
            )
    try:
        return _compile(source).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **(special_tokens or {}),
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"chat template: got {error}, wanted a template that renders") from None
