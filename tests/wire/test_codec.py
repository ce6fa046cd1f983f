"""Every core message survives the wire, whatever its values; whatever a core value cannot be is refused."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.core import handoff, messages, request, step_model, worker
from baton.core.errors import Incompatible
from baton.wire import codec
from baton.wire import worker_pb2 as pb

INT_LIMITS = {FieldDescriptor.TYPE_UINT32: 2**32 - 1, FieldDescriptor.TYPE_UINT64: 2**64 - 1}
CODECS = {name: value for name, value in vars(codec).items() if isinstance(value, codec.Codec)}
HINTS = {
    "UP": messages.UpMessage, "STEP": messages.StepMessage, "STATUS": messages.WorkerStatus,
    "PREFILL_CALL": handoff.PrefillCall, "PREFILL_EVENT": handoff.PrefillEvent,
    "RELEASE_ANSWER": handoff.ReleaseAnswer, "INFO": worker.WorkerInfo, "LOAD": worker.WorkerLoad,
    "LEDGER": worker.Ledger, "MODEL": step_model.StepModel, "ROUTE": worker.Route, "SPAN": worker.Span,
}


def values_of(hint: Any, limit: int = 2**32 - 1) -> st.SearchStrategy[Any]:
    """Values of a core type, from its description alone; `limit` bounds its integers."""
    hint = getattr(hint, "__supertype__", hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(a, limit) for a in args])
    if origin is tuple and args[1:] == (...,):
        return st.lists(values_of(args[0], limit), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*[values_of(a, limit) for a in args])
    if dataclasses.is_dataclass(hint):
        return dataclass_values(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    scalars: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, limit), float: st.floats(allow_nan=False), str: st.text(max_size=8), bool: st.booleans(),
        bytes: st.binary(max_size=20), type(None): st.none(),
    }
    return scalars[hint]


def dataclass_values(cls: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    wire = getattr(pb, cls.__name__).DESCRIPTOR.fields_by_name
    parts = {f.name: values_of(hints[f.name], INT_LIMITS.get(wire[f.name].type, 0)) for f in dataclasses.fields(cls)}
    return st.builds(cls, **parts)


def test_every_codec_is_tried_below() -> None:
    assert set(HINTS) == set(CODECS)


@pytest.mark.parametrize("name", sorted(HINTS))
def test_every_message_survives_the_wire(name: str) -> None:
    tried = CODECS[name]

    @settings(max_examples=60, database=None)
    @given(values_of(HINTS[name]))
    def survives(value: Any) -> None:
        message = tried.encode(value)
        parsed = type(message).FromString(message.SerializeToString())
        back = tried.decode(parsed)
        assert back == value
        assert type(back) is type(value)

    survives()


def test_all_core_messages_are_reached_from_the_codecs() -> None:
    reached: set[type] = set()

    def visit(hint: Any) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in reached:
            reached.add(hint)
            for part in typing.get_type_hints(hint).values():
                visit(part)
        for part in typing.get_args(hint):
            visit(part)

    for hint in HINTS.values():
        visit(hint)
    for module in (messages, handoff, request):
        own = {c for c in vars(module).values() if dataclasses.is_dataclass(c) and c.__module__ == module.__name__}
        assert own <= reached, own - reached


def test_an_empty_ledger_is_still_a_ledger_and_none_is_none() -> None:
    zero = worker.Ledger(0, 0, 0, 0, 0)
    for ledger in (zero, None):
        step = messages.StepMessage("boot", worker.WorkerLoad(), ledger=ledger)
        message = pb.StepMessage.FromString(codec.STEP.encode(step).SerializeToString())
        assert codec.STEP.decode(message).ledger == ledger


@pytest.mark.parametrize(("tried", "message", "named"), [
    (codec.UP, pb.UpMessage(), "UpMessage"),
    (codec.UP, pb.UpMessage(submit=pb.Submit(epoch=1)), "without request"),
    (codec.INFO, pb.WorkerInfo(worker_id="w", capability=pb.Capability(layout=pb.KVLayout())), "Role number 0"),
    (codec.STATUS, pb.WorkerStatus(), "without info"),
])
def test_what_no_core_value_can_be_is_refused_as_version_skew(tried: Any, message: Any, named: str) -> None:
    with pytest.raises(Incompatible, match=named):
        tried.decode(message)


def test_a_field_that_only_core_has_is_found_at_import() -> None:
    @dataclasses.dataclass(frozen=True)
    class Alive:
        steps: int
        news: str

    with pytest.raises(TypeError, match="news"):
        codec.Codec(Alive, pb.Alive)


def test_a_core_none_needs_an_optional_field() -> None:
    @dataclasses.dataclass(frozen=True)
    class Alive:
        steps: int | None

    Alive.__annotations__["steps"] = typing.Optional[int]  # noqa: UP045 (resolved here: the class is local)
    with pytest.raises(TypeError, match="optional"):
        codec.Codec(Alive, pb.Alive)
