"""One value for everything that can influence the future: two worlds with equal fingerprints behave alike.

Walks the real objects, whatever their attributes are called, so that a refactoring cannot silently blind the
exploration. Moments (floats around EPOCH) count relative to their owner's clock, and what is long past is only past;
ids are numbered by first sight; a task is where its coroutine stands.
"""

from __future__ import annotations

import asyncio
import enum
import types
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

from baton.core.config import HandoffConfig
from baton.core.machines import Machine
from baton.core.metrics import Metrics
from baton.kv_transfer.choose import Handshake
from baton.kv_transfer.memory import KVMemory
from tests.protocol.manual_loop import EPOCH, ManualLoop

LONG_PAST_S = -4.0
"""Longer ago than every duration of the explored configuration: how long makes no difference."""
FIRST_ID = 1 << 32
"""An int from here up is somebody's id()."""

_PLAIN = {bool, str, bytes, type(None)}
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
_OPAQUE = (Metrics, HandoffConfig, Machine, ManualLoop, Handshake, *_CODE)
"""They never change, or decide nothing: counters, settings, tables, code. A handshake is over within its turn, because
the explored wire answers probes at once."""


def fingerprint(root: object, now: float) -> tuple[Any, ...]:
    """`now`: of the clock that the moments in `root` belong to."""
    walk = _Walk(now)
    walk.see(root)
    return tuple(walk.out)


class _Walk:
    """Not recursive generators but one growing list: this is where an exploration spends its time."""

    def __init__(self, now: float) -> None:
        self.out: list[Any] = []
        self._now = now
        self._seen: dict[int, int] = {}
        self._ids: dict[int, int] = {}

    def see(self, thing: Any) -> None:
        kind = type(thing)
        if kind in _PLAIN:
            self.out.append(thing)
            return
        how = _HOW.get(kind)
        if how is None:
            how = _HOW[kind] = _how(kind)
        how(self, thing)

    def number(self, value: int) -> None:
        known = value < FIRST_ID
        self.out.append(value if known else ("id", self._ids.setdefault(value, len(self._ids))))

    def moment(self, value: float) -> None:
        self.out.append(max(value - self._now, LONG_PAST_S) if EPOCH <= value < 2 * EPOCH else value)

    def member(self, value: enum.Enum) -> None:
        self.out.append(value.name)

    def nothing(self, _: object) -> None:
        pass

    def memory(self, memory: KVMemory) -> None:
        self.out.append(bytes(memory.buffer))

    def mapping(self, things: dict[Any, Any]) -> None:
        self.out.append("{")
        for key, value in things.items():
            self.see(key)
            self.see(value)
        self.out.append("}")

    def sequence(self, things: list[Any]) -> None:
        self.out.append("[")
        for one in things:
            self.see(one)
        self.out.append("]")

    def unordered(self, things: set[Any]) -> None:
        parts = []
        for one in things:
            before, self.out = self.out, []
            self.see(one)
            parts.append(tuple(self.out))
            self.out = before
        self.out.append(tuple(sorted(parts, key=repr)))

    def task(self, task: asyncio.Task[Any]) -> None:
        if self._is_new(task):
            self.out += ("task", task.get_name(), _place(task), task.cancelling(), task.done())

    def future(self, future: asyncio.Future[Any]) -> None:
        if self._is_new(future):
            self.out += ("future", future.done(), future.cancelled())

    def method(self, method: types.MethodType) -> None:
        self.out.append(method.__func__.__qualname__)

    def thing(self, thing: Any) -> None:
        if not self._is_new(thing):
            return
        kind = type(thing)
        self.out.append(kind.__qualname__)
        for name in _slots(kind):
            if hasattr(thing, name):
                self.see(getattr(thing, name))
        attributes = getattr(thing, "__dict__", None)
        if attributes:
            for name, value in attributes.items():
                self.out.append(name)
                self.see(value)

    def _is_new(self, thing: object) -> bool:
        number = self._seen.setdefault(id(thing), len(self._seen))
        if number < len(self._seen) - 1:
            self.out.append(("again", number))
            return False
        return True


_HOW: dict[type, Callable[[_Walk, Any], None]] = {
    int: _Walk.number,
    float: _Walk.moment,
    dict: _Walk.mapping,
    OrderedDict: _Walk.mapping,
    Counter: _Walk.mapping,
    list: _Walk.sequence,
    tuple: _Walk.sequence,
    deque: _Walk.sequence,
    set: _Walk.unordered,
    frozenset: _Walk.unordered,
    KVMemory: _Walk.memory,
    types.MethodType: _Walk.method,
}
"""Grows by every class met."""
_SLOTS: dict[type, tuple[str, ...]] = {}


def _how(kind: type) -> Callable[[_Walk, Any], None]:
    if issubclass(kind, enum.Enum):
        return _Walk.member
    if issubclass(kind, _OPAQUE):
        return _Walk.nothing
    if issubclass(kind, asyncio.Task):
        return _Walk.task
    return _Walk.future if issubclass(kind, asyncio.Future) else _Walk.thing


def _slots(kind: type) -> tuple[str, ...]:
    if kind not in _SLOTS:
        _SLOTS[kind] = tuple(name for k in kind.__mro__ for name in getattr(k, "__slots__", ()))
    return _SLOTS[kind]


def _place(task: asyncio.Task[Any]) -> tuple[Any, ...]:
    """Where its coroutine stands: the instruction of every frame down to what it waits for."""
    coro: Any = task.get_coro()
    place: list[Any] = []
    while coro is not None and hasattr(coro, "cr_frame"):
        if coro.cr_frame is not None:
            place += (coro.__qualname__, coro.cr_frame.f_lasti)
        coro = coro.cr_await
    return tuple(place)
