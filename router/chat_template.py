"""A conversation to one prompt string, by the model's own chat_template.jinja.

Owns: the sandbox. The template is the model's, never the client's; still it runs immutable, sees only messages and
the model's special tokens, and may write at most MAX_RENDERED_CHARS. Names and filters are those that templates
written for Hugging Face's `apply_chat_template` expect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.core.errors import InvalidRequest, SetupError

MAX_RENDERED_CHARS = 32 << 20


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str], today: Callable[[], datetime]) -> None:
        """`special_tokens`: bos_token, eos_token and the like, by the names templates use. Raises SetupError when the
        template does not compile."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: today().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise SetupError(f"chat_template.jinja does not compile: {e}. Convert the model again.") from None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt, ending where the assistant is to speak. Raises InvalidRequest where the template refuses the
        conversation (roles that must alternate, say)."""
        parts, size = [], 0
        try:
            for part in self._template.generate(messages=list(messages), add_generation_prompt=True, tools=None,
                                                documents=None, **self._special_tokens):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED_CHARS:
                    raise InvalidRequest("messages are too long for the chat template. Send a shorter conversation.",
                                         "messages")
        except jinja2.TemplateError as e:
            raise InvalidRequest(f"the model's chat template refuses these messages: {e}", "messages") from None
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError):
            # The template is the model's and the messages were valid: a shape it was not written for.
            raise InvalidRequest("the model's chat template cannot render these messages. "
                                 "Use the roles system, user and assistant in turn.", "messages") from None
        return "".join(parts)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Jinja's own filter escapes HTML characters; prompts are not HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
