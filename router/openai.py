"""OpenAI's request bodies, checked: JSON bytes in, a `Call` out, or an InvalidRequest that names the field.

Every field OpenAI documents for text is in one table below: checked, accepted as harmless, or known and not built yet
(then its neutral value is accepted: tools [], echo false). Any other field is an error that names the nearest known
one, so that a typo is never silently the default. Ranges of sampling parameters are core's, the prompt's length and n
are generation.py's: gRPC shares them.

Not OpenAI's: top_k, min_p, repetition_penalty, ignore_eos, stop_token_ids (the Python client sends them with
`extra_body`).
"""

from __future__ import annotations

import difflib
import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from baton.core.errors import InvalidRequest, NotSupported
from baton.core.request import MAX_TOP_LOGPROBS, SamplingParams
from baton.router.generation import ChatMessage, GenerateCall, Prompt, shown

DEFAULT_COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions, as OpenAI documents it. A chat may use what its context leaves."""
MAX_METADATA_PAIRS = 16


class Endpoint(enum.StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


@dataclass(frozen=True, slots=True)
class Call:
    """A well-formed request. `generate` still has to pass Generation.prepare."""

    model: str
    generate: GenerateCall
    stream: bool
    include_usage: bool


Check = Callable[[Any, str], Any]
"""(value, field name) -> the value to use. Raises InvalidRequest. Never called with None: null means absent."""


# ---- checks ------------------------------------------------------------------------------------------------------


def wrong(name: str, value: object, rule: str) -> InvalidRequest:
    kind = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
            type(None): "null"}[type(value)]
    return InvalidRequest(f"{name} is {'an' if kind[0] in 'aio' else 'a'} {kind} ({shown(value)}); it must be {rule}.",
                          name)


def integer(value: Any, name: str) -> int:
    if type(value) is int and value.bit_length() <= 64:  # bool is an int to Python, and not to anybody else
        return value
    if type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    raise wrong(name, value, "an integer of at most 64 bits")


def number(value: Any, name: str) -> float:
    if type(value) is int and abs(value) < 2**53 or type(value) is float:
        return float(value)
    raise wrong(name, value, "a number of moderate size")


def boolean(value: Any, name: str) -> bool:
    if type(value) is bool:
        return value
    raise wrong(name, value, "true or false")


def string(value: Any, name: str) -> str:
    if type(value) is not str:
        raise wrong(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequest(f"{name} holds half a surrogate pair at character {e.start}, which is no Unicode text. "
                             "Send the whole character.", name) from None
    return value


def array(value: Any, name: str) -> list[Any]:
    if type(value) is list:
        return value
    raise wrong(name, value, "an array")


def an_object(value: Any, name: str) -> dict[str, Any]:
    if type(value) is dict:
        return value
    raise wrong(name, value, "an object")


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    return tuple(integer(v, f"{name}[{i}]") for i, v in enumerate(array(value, name)))


def stops(value: Any, name: str) -> tuple[str, ...]:
    if type(value) is str:
        return (string(value, name),)
    if type(value) is list:
        return tuple(string(v, f"{name}[{i}]") for i, v in enumerate(value))
    raise wrong(name, value, "a string or an array of strings")


def stream_options(value: Any, name: str) -> bool:
    """-> include_usage."""
    options = an_object(value, name)
    known(options, ("include_usage", "include_obfuscation"), f"{name}.")
    checked = {k: boolean(v, f"{name}.{k}") for k, v in options.items() if v is not None}
    return bool(checked.get("include_usage", False))


def metadata(value: Any, name: str) -> None:
    pairs = an_object(value, name)
    if len(pairs) > MAX_METADATA_PAIRS:
        raise InvalidRequest(f"{name} has {len(pairs)} pairs; {MAX_METADATA_PAIRS} are allowed.", name)
    for key, text in pairs.items():
        string(text, f"{name}.{shown(key)}")


def biases(value: Any, name: str) -> tuple[tuple[int, float], ...]:
    """An object from token ids, which JSON has as strings, to numbers."""
    found = []
    for key, bias in an_object(value, name).items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key):
            raise InvalidRequest(f"{name} names {shown(key)}, which is no token id. Send ids as strings of digits.",
                                 name)
        found.append((int(key), number(bias, f"{name}.{key}")))
    return tuple(found)


def only(*neutral: Any) -> Check:
    """A feature that is not built: these values ask for nothing and are accepted."""

    def check(value: Any, name: str) -> None:
        if not any(type(value) is type(n) and value == n for n in neutral):
            hint = f" Leave it out, or send {json.dumps(neutral[0])}." if neutral else " Leave it out."
            raise NotSupported(f"{name} is not supported yet.{hint}", name)

    return check


def prompt(value: Any, name: str) -> str | tuple[int, ...]:
    if type(value) is str:
        return string(value, name)
    items = array(value, name) if type(value) is list else None
    if items is None:
        raise wrong(name, value, "a string or an array of token ids")
    if not items:
        raise InvalidRequest(f"{name} is empty. Send some text, or token ids.", name)
    if any(type(item) in (str, list) for item in items):
        if len(items) > 1:
            raise NotSupported(f"{name} holds {len(items)} prompts; several prompts in one request are not supported "
                               "yet. Send one request for each.", name)
        return prompt(items[0], name) if type(items[0]) is str else token_ids(items[0], name)
    return token_ids(items, name)


def messages(value: Any, name: str) -> tuple[ChatMessage, ...]:
    items = array(value, name)
    if not items:
        raise InvalidRequest(f"{name} is empty. Send at least one message.", name)
    return tuple(_message(item, f"{name}[{i}]") for i, item in enumerate(items))


ROLES = ("system", "developer", "user", "assistant")
MESSAGE_FIELDS: dict[str, Check] = {
    "role": string, "content": lambda value, _: value, "name": string, "refusal": only(), "audio": only(),
    "tool_calls": only([]), "tool_call_id": only(), "function_call": only(),
}


def _message(value: Any, where: str) -> ChatMessage:
    fields = an_object(value, where)
    role = fields.get("role")
    if role in ("tool", "function"):
        raise NotSupported(f"{where}.role {role!r} is not supported yet.", f"{where}.role")
    if type(role) is not str or role not in ROLES:
        raise InvalidRequest(f"{where}.role is {shown(role)}; it must be one of {', '.join(ROLES)}.", f"{where}.role")
    known(fields, MESSAGE_FIELDS, f"{where}.")
    checked = {k: MESSAGE_FIELDS[k](v, f"{where}.{k}") for k, v in fields.items() if v is not None}
    return ChatMessage(role, _content(checked.get("content"), f"{where}.content"), checked.get("name"))


def _content(value: Any, where: str) -> str:
    """A string, or text parts, which are joined with line feeds."""
    if type(value) is str:
        return string(value, where)
    if type(value) is not list or not value:
        raise wrong(where, value, "a string or an array of text parts")
    return "\n".join(_text_part(part, f"{where}[{i}]") for i, part in enumerate(value))


def _text_part(value: Any, where: str) -> str:
    part = an_object(value, where)
    kind = part.get("type")
    if kind in ("image_url", "input_audio", "file", "video_url", "refusal"):
        raise NotSupported(f"{where}.type {kind!r} is not supported yet: this server reads text only.", f"{where}.type")
    if kind != "text":
        raise InvalidRequest(f"{where}.type is {shown(kind)}; it must be 'text'.", f"{where}.type")
    known(part, ("type", "text"), f"{where}.")
    return string(part.get("text"), f"{where}.text")


# ---- the table ---------------------------------------------------------------------------------------------------


def harmless(check: Check) -> Check:
    """Accepted and not used: it changes nothing about the answer. Its type is checked all the same."""
    return check


BOTH: dict[str, Check] = {
    "model": string,
    "stream": boolean, "stream_options": stream_options,
    "temperature": number, "top_p": number, "seed": integer, "stop": stops, "max_tokens": integer,
    "top_k": integer, "min_p": number, "ignore_eos": boolean, "stop_token_ids": token_ids,
    "user": harmless(string), "metadata": harmless(metadata), "store": harmless(boolean),
    "n": integer, "presence_penalty": number, "frequency_penalty": number, "repetition_penalty": number,
    "logit_bias": biases, "min_tokens": only(0), "priority": integer,
}
TABLE: dict[Endpoint, dict[str, Check]] = {
    Endpoint.CHAT: BOTH | {
        "messages": messages, "logprobs": boolean, "max_completion_tokens": integer,
        "safety_identifier": harmless(string), "prompt_cache_key": string,
        "service_tier": only("auto", "default"), "top_logprobs": integer, "response_format": only({"type": "text"}),
        "tools": only([]), "tool_choice": only("none"), "parallel_tool_calls": only(), "functions": only([]),
        "function_call": only("none"), "modalities": only(["text"]), "audio": only(), "prediction": only(),
        "reasoning_effort": only(), "verbosity": only(), "web_search_options": only(), "prompt_cache_retention": only(),
        "guided_json": only(), "guided_regex": only(),
    },
    Endpoint.COMPLETIONS: BOTH | {
        "prompt": prompt, "logprobs": integer, "suffix": only(""), "echo": only(False), "best_of": integer,
    },
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "ignore_eos", "frequency_penalty",
            "presence_penalty", "repetition_penalty", "logit_bias")


def known(fields: Mapping[str, Any], names: Any, prefix: str = "") -> None:
    """Raise InvalidRequest for the first field that is not in `names`."""
    for name in fields:
        if name not in names:
            close = difflib.get_close_matches(name[:100], [*names], 1, 0.6)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known here: {', '.join(sorted(names))}."
            raise InvalidRequest(f"there is no field {prefix}{shown(name)}. {hint}", printable_name(prefix + name))


def printable_name(name: str) -> str:
    return ascii(name)[1:-1][:100]


# ---- the body ----------------------------------------------------------------------------------------------------


def parse(body: bytes, endpoint: Endpoint, tenant: str = "", account: str = "") -> Call:
    """`tenant`, `account`: whose it is, as its headers say. Raises InvalidRequest (NotSupported for known features)
    naming the first field at fault."""
    table = TABLE[endpoint]
    fields = an_object(read_json(body), "the body")
    known(fields, table)
    checked = {name: table[name](value, name) for name, value in fields.items() if value is not None}
    for name in ("model", "messages" if endpoint is Endpoint.CHAT else "prompt"):
        if name not in checked:
            raise InvalidRequest(f"{name} is missing. Send it in the body.", name)
    stream = checked.get("stream", False)
    if "stream_options" in checked and not stream:
        raise InvalidRequest("stream_options is only allowed with stream true. Remove it or stream.", "stream_options")
    n = checked.get("n", 1)
    if checked.get("best_of", n) != n:
        raise NotSupported(f"best_of is not supported yet. Leave it out, or send {n}, as n is.", "best_of")
    asked: Prompt = checked["messages"] if endpoint is Endpoint.CHAT else checked["prompt"]
    max_tokens, max_tokens_field = _max_tokens(checked)
    generate = GenerateCall(
        asked, SamplingParams(**{name: checked[name] for name in SAMPLING if name in checked},
                              logprobs=_logprobs(checked, endpoint)),
        max_tokens, None if endpoint is Endpoint.CHAT else DEFAULT_COMPLETION_TOKENS, checked.get("stop", ()),
        tenant, account, checked.get("prompt_cache_key") or "", max_tokens_field=max_tokens_field, n=n,
        priority=checked.get("priority", 0))
    return Call(checked["model"], generate, stream, checked.get("stream_options", False))


def _logprobs(checked: Mapping[str, Any], endpoint: Endpoint) -> int | None:
    """How many likeliest tokens beside the chosen one; None: no log-probs. Two fields of a chat, one of a
    completion."""
    if endpoint is Endpoint.COMPLETIONS:
        return checked.get("logprobs")
    wanted, top = checked.get("logprobs", False), checked.get("top_logprobs", 0)
    if top and not wanted:
        raise InvalidRequest("top_logprobs is only allowed with logprobs true. Remove it or add that.", "top_logprobs")
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"top_logprobs is {shown(top)}; it must be between 0 and {MAX_TOP_LOGPROBS}.",
                             "top_logprobs")
    return top if wanted else None


def _max_tokens(checked: Mapping[str, Any]) -> tuple[int | None, str]:
    values = {checked[name] for name in ("max_tokens", "max_completion_tokens") if name in checked}
    if len(values) > 1:
        raise InvalidRequest("max_tokens and max_completion_tokens differ. Send the second alone.", "max_tokens")
    for name in ("max_completion_tokens", "max_tokens"):
        if name in checked:
            return checked[name], name
    return None, "max_tokens"


def read_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity (written out or by overflow), no key twice, no endless nesting."""
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        raise InvalidRequest(f"the body is not UTF-8: byte {e.start} is wrong. Encode the JSON as UTF-8.") from None
    if not text.strip():
        raise InvalidRequest("the body is empty. Send a JSON object.")
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except json.JSONDecodeError as e:
        raise InvalidRequest(f"the body is not JSON: {e.msg} at line {e.lineno}, column {e.colno}.") from None
    except RecursionError:
        raise InvalidRequest("the body's JSON is nested too deeply. Send a flat object.") from None
    except ValueError:  # a number of more than 4,300 digits
        raise InvalidRequest("the body holds a number with thousands of digits. Send a smaller one.") from None


def _refuse_constant(name: str) -> Any:
    raise InvalidRequest(f"the body holds {name}, which is not JSON. Send a finite number.")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise InvalidRequest(f"the body holds {text[:40]}, which is too large. Send a smaller number.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidRequest(f"the body names {shown(twice)} twice. Send it once.", printable_name(twice))
    return fields
