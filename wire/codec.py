"""Core types <-> protobuf messages, and nothing else. The only place that knows both.

Worker messages mirror core's dataclasses name by name (proto/baton/wire/worker.proto), so the translation is derived
from the two descriptions instead of being written a third time. Deriving happens once, at import, and is exhaustive:
a field that only one side has, an enum member the other lacks, or a type there is no rule for raises TypeError there
and then. Rules, by core's type:

    int float str bool bytes          the same scalar
    StrEnum                           enum value of the same name; 0 stands for nothing
    dataclass                         message of the same name
    tuple[X, ...]                     repeated X
    tuple[A, B, ...] (fixed)          message whose fields, by number, are the elements
    X | None                          optional field, absent
    A | B | ... (dataclasses)         message with one oneof over these messages

Bytes that parse but cannot be a core value (a missing part, a member this build does not know) raise Incompatible:
the peer speaks another version.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from baton.core import handoff, messages, worker
from baton.core.errors import Incompatible
from baton.core.step_model import StepModel
from baton.wire import worker_pb2 as pb

Encode = Callable[[Any], Any]
"""Core value -> scalar, list, or dict of a message's fields (what a message's constructor takes)."""
Decode = Callable[[Any], Any]



class _How(enum.Enum):
    """What a field's value needs before it is a core value."""

    PLAIN = enum.auto()
    CONVERTED = enum.auto()
    REPEATED = enum.auto()
    OPTIONAL = enum.auto()
    REQUIRED = enum.auto()


_SCALARS = (int, float, str, bool, bytes)

C = TypeVar("C")
P = TypeVar("P", bound=Message)


class Codec(Generic[C, P]):
    """Both directions for one core type (or union) `C` and its message `P`."""

    def __init__(self, hint: Any, message: type[P]) -> None:
        self._message = message
        self._encode, self._decode = _rules(hint, typing.cast(Descriptor, message.DESCRIPTOR))

    def encode(self, value: C) -> P:
        return self._message(**self._encode(value))

    def decode(self, message: P) -> C:
        """Raises Incompatible where `message` lacks a part or names something unknown."""
        return typing.cast(C, self._decode(message))


def _rules(hint: Any, message: Descriptor) -> tuple[Encode, Decode]:
    """For a whole message: a dataclass, a union of dataclasses, or a fixed tuple."""
    if _is_union(hint):
        return _union_rules(hint, message)
    if typing.get_origin(hint) is tuple:
        return _tuple_rules(typing.get_args(hint), message)
    if not dataclasses.is_dataclass(hint) or not isinstance(hint, type):
        raise TypeError(f"no rule turns {hint!r} into the message {message.name}")
    return _dataclass_rules(hint, message)


def _dataclass_rules(cls: type, message: Descriptor) -> tuple[Encode, Decode]:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    wire_names = sorted(message.fields_by_name)
    if cls.__name__ != message.name or sorted(names) != wire_names:
        raise TypeError(f"{cls.__name__}{sorted(names)} and message {message.name}{wire_names} differ")
    rules = [_Field(name, *_field_rules(hints[name], message.fields_by_name[name])) for name in names]
    return _writer(rules), _reader(cls, rules)


class _Field(NamedTuple):
    name: str
    encode: Encode
    how: _How
    decode: Decode


def _writer(fields: Sequence[_Field]) -> Encode:
    """The dict of a value's fields; None is taken as absent. One of these runs for every token: all are fetched at
    once, and only what is not plain is looked at again (a call for each field took twice as long)."""
    names = [f.name for f in fields]
    fetch = _fetched(names)
    converted = [(f.name, f.encode) for f in fields if f.encode is not _same]

    def encode(value: Any) -> dict[str, Any]:
        parts = dict(zip(names, fetch(value), strict=True))
        for name, enc in converted:
            if part := parts[name]:  # None and () are what they are
                parts[name] = enc(part)
        return parts

    return encode


def _reader(make: Callable[..., Any], fields: Sequence[_Field]) -> Decode:
    """`make` of a message's fields in turn."""
    fetch = _fetched([f.name for f in fields])
    repeated = [(at, f.decode) for at, f in enumerate(fields) if f.how is _How.REPEATED]
    converted = [(at, f.decode) for at, f in enumerate(fields) if f.how is _How.CONVERTED]
    may_lack = [(at, f) for at, f in enumerate(fields) if f.how in (_How.OPTIONAL, _How.REQUIRED)]

    def decode(wire: Any) -> Any:
        parts = list(fetch(wire))
        for at, dec in repeated:
            part = parts[at]
            parts[at] = dec(part) if part else ()
        for at, dec in converted:
            parts[at] = dec(parts[at])
        for at, field in may_lack:
            if wire.HasField(field.name):
                parts[at] = field.decode(parts[at])
            elif field.how is _How.OPTIONAL:
                parts[at] = None
            else:
                raise Incompatible(_skew(f"a {wire.DESCRIPTOR.name} without {field.name}"))
        return make(*parts)

    return decode


def _fetched(names: Sequence[str]) -> Callable[[Any], Iterable[Any]]:
    """A tuple of attributes, also of one."""
    if len(names) == 1:
        return lambda value: (getattr(value, names[0]),)
    return attrgetter(*names)


def _tuple_rules(hints: tuple[Any, ...], message: Descriptor) -> tuple[Encode, Decode]:
    fields = sorted(message.fields, key=lambda f: f.number)
    if len(fields) != len(hints):
        raise TypeError(f"{message.name} has {len(fields)} fields for a tuple of {len(hints)}")
    rules = [_Field(f.name, *_field_rules(h, f)) for h, f in zip(hints, fields, strict=True)]

    def encode(value: Any) -> dict[str, Any]:
        return {field.name: field.encode(part) for field, part in zip(rules, value, strict=True)}

    return encode, _reader(lambda *parts: parts, rules)


def _union_rules(hint: Any, message: Descriptor) -> tuple[Encode, Decode]:
    (oneof,) = message.oneofs
    kinds = {cls.__name__: cls for cls in typing.get_args(hint)}
    parts = {f.name: typing.cast(Descriptor, f.message_type) for f in oneof.fields}
    if {part.name for part in parts.values()} != set(kinds) or len(parts) != len(message.fields):
        raise TypeError(f"{message.name} must be one oneof over exactly {sorted(kinds)}")
    encoders, decoders = {}, {}
    for name, part in parts.items():
        enc, decoders[name] = _rules(kinds[part.name], part)
        encoders[kinds[part.name]] = name, enc

    def encode(value: Any) -> dict[str, Any]:
        name, enc = encoders[type(value)]
        return {name: enc(value)}

    def decode(wire: Any) -> Any:
        name = wire.WhichOneof(oneof.name)
        if name is None:
            raise Incompatible(_skew(f"a {message.name} of a kind unknown here"))
        return decoders[name](getattr(wire, name))

    return encode, decode


def _field_rules(hint: Any, field: FieldDescriptor) -> tuple[Encode, _How, Decode]:
    """For one field: how its core value is encoded, and how it is read."""
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        element = typing.get_args(hint)[0]
        enc, dec = _value_rules(element, field)
        if _plain(element) in _SCALARS:
            return list, _How.REPEATED, tuple
        return lambda value: [enc(v) for v in value], _How.REPEATED, lambda parts: tuple([dec(v) for v in parts])
    optional = _is_union(hint) and type(None) in typing.get_args(hint)
    if optional:
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
    enc, dec = _value_rules(hint, field)
    if optional:
        if not field.has_presence:
            raise TypeError(f"{field.full_name} must be optional: core has None there")
        return enc, _How.OPTIONAL, dec
    if field.message_type is not None:
        return enc, _How.REQUIRED, dec
    return enc, _How.PLAIN if dec is _same else _How.CONVERTED, dec


def _value_rules(hint: Any, field: FieldDescriptor) -> tuple[Encode, Decode]:
    plain = _plain(hint)
    if field.message_type is not None:
        return _rules(plain, field.message_type)
    if isinstance(plain, type) and issubclass(plain, enum.StrEnum):
        return _enum_rules(plain, field)
    if plain not in _SCALARS:
        raise TypeError(f"{field.full_name}: no rule for {hint!r}")
    return _same, _same


def _enum_rules(cls: type[enum.StrEnum], field: FieldDescriptor) -> tuple[Encode, Decode]:
    numbers = {v.name: v.number for v in typing.cast(EnumDescriptor, field.enum_type).values if v.number != 0}
    if set(numbers) != set(cls.__members__):
        raise TypeError(f"{field.full_name}: {sorted(numbers)} are not the members of {cls.__name__}")
    to_wire = {member: numbers[member.name] for member in cls}
    to_core = {number: member for member, number in to_wire.items()}

    def decode(number: int) -> enum.StrEnum:
        member = to_core.get(number)
        if member is None:
            raise Incompatible(_skew(f"{cls.__name__} number {number}"))
        return member

    return to_wire.__getitem__, decode


def _plain(hint: Any) -> Any:
    """The type under a NewType."""
    return getattr(hint, "__supertype__", hint)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _same(value: Any) -> Any:
    return value


def _skew(what: str) -> str:
    return f"a peer sent {what}. Run the same Baton version on all workers and routers."


UP: Codec[messages.UpMessage, pb.UpMessage] = Codec(messages.UpMessage, pb.UpMessage)
STEP: Codec[messages.StepMessage, pb.StepMessage] = Codec(messages.StepMessage, pb.StepMessage)
STATUS: Codec[messages.WorkerStatus, pb.WorkerStatus] = Codec(messages.WorkerStatus, pb.WorkerStatus)
PREFILL_CALL: Codec[handoff.PrefillCall, pb.PrefillCall] = Codec(handoff.PrefillCall, pb.PrefillCall)
PREFILL_EVENT: Codec[handoff.PrefillEvent, pb.PrefillEvent] = Codec(handoff.PrefillEvent, pb.PrefillEvent)
RELEASE_ANSWER: Codec[handoff.ReleaseAnswer, pb.ReleaseAnswer] = Codec(handoff.ReleaseAnswer, pb.ReleaseAnswer)
# Parts of the admin messages.
INFO: Codec[worker.WorkerInfo, pb.WorkerInfo] = Codec(worker.WorkerInfo, pb.WorkerInfo)
MODEL: Codec[StepModel, pb.StepModel] = Codec(StepModel, pb.StepModel)
LOAD: Codec[worker.WorkerLoad, pb.WorkerLoad] = Codec(worker.WorkerLoad, pb.WorkerLoad)
LEDGER: Codec[worker.Ledger, pb.Ledger] = Codec(worker.Ledger, pb.Ledger)
ROUTE: Codec[worker.Route, pb.Route] = Codec(worker.Route, pb.Route)
SPAN: Codec[worker.Span, pb.Span] = Codec(worker.Span, pb.Span)
