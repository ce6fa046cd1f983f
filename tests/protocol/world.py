"""A lender, a reader and a network: what may happen next, and what must hold whatever happened.

An action is a tuple of names, so that a path of actions replays a world exactly and reads as its own explanation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.protocol.bounds import TTL_S, Bounds, Parts
from tests.protocol.fingerprint import fingerprint
from tests.protocol.lender import LenderSide, Message
from tests.protocol.reader import Moving, ReaderSide

Action = tuple[Any, ...]

NETWORK = {"deliver", "drop", "duplicate"}
"""Actions on a message."""
TO_LENDER = {"call", "close", "release", "renew"}
REPEATED = {"release", "renew", "answer"}
"""Unary calls are retried; a stream's messages come once, in order, or the stream breaks."""
FAULTS = {"drop", "duplicate", "break", "fence fails", "renew", "reuse at P", "reuse at D", "crash at P", "crash at D"}
"""Only as often as the bounds say. Everything else may always happen, unless they limit it."""
STREAMS = ({"call", "close"}, {"published", "state", "refused"})


class World:
    def __init__(self, bounds: Bounds, parts: Parts) -> None:
        self.bounds = bounds
        self.parts = parts
        self.left = Counter(bounds.limits)
        self.unstarted = list(bounds.requests)
        self.network: list[Message] = []
        self.lender = LenderSide(bounds, parts, 1, self.network.append)
        self.reader = self._new_reader()
        self._used: dict[str, int] = {}

    def _new_reader(self) -> ReaderSide:
        return ReaderSide(self.bounds, self.parts, self.network.append, lambda: self.lender)

    def close(self) -> None:
        self.reader.loop.bury()

    # ---- what may happen next --------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        """Once the reader wants nothing any more, the two sides cannot influence each other: what is under way there
        brings no bytes that anybody will read. Then the lender goes first, so that orders are not multiplied."""
        elsewhere = [a for a in (*self._in_network(), *self._at_lender()) if self._may(a)]
        yield from elsewhere
        if self.unstarted or self.reader.intakes or not elsewhere:
            here = (*self._at_reader(), ("crash at P",), ("crash at D",))
            yield from (a for a in here if self._may(a))

    def _may(self, action: Action) -> bool:
        kind = action[0]
        if kind == "at once":
            return all(map(self._may, action[1:]))
        return self.left[kind] > 0 if kind in FAULTS or kind in self.left else True

    def _in_network(self) -> Iterator[Action]:
        for message in sorted(set(self.network), key=repr):
            if self._is_next(message):
                yield "deliver", message
            yield "drop", message
            if message[0] in REPEATED:
                yield "duplicate", message

    def _at_lender(self) -> Iterator[Action]:
        yield from (("hand", name) for name in self.lender.lendings)
        if self.lender.timer_is_due:
            yield ("lease timer",)
        elif self._time_matters_at_lender():
            yield ("clock at P",)
        if self.reader.wire.moving or any(m[0] == "published" for m in self.network):
            yield ("reuse at P",)  # when somebody may still read from it; else one free block is like another

    def _time_matters_at_lender(self) -> bool:
        """A lease may expire, or one that ended may be asked about before it is forgotten or after. Else the clock only
        clears the table, which changes nothing for anybody (`round` sees that it happens)."""
        leases = self.lender.leases
        if leases.num_live:
            return True
        asked = any(m[0] in ("release", "renew") for m in self.network)
        return leases.next_deadline() is not None and (asked or any(i.lease_id for i in self.reader.intakes.values()))

    def _at_reader(self) -> Iterator[Action]:
        reader = self.reader
        if self.unstarted and (self.bounds.side_by_side or not reader.intakes):
            yield "start", self.unstarted[0]
        ends = list(self._on_wire())
        leaves: list[Action] = []
        for name, intake in reader.intakes.items():
            if intake.life.at("running"):
                yield "finish", name
            elif not intake.life.ended:
                leaves.append(("cancel", name))
            if intake.life.at("handed"):
                yield "no answer", name
            if intake.life.at("bound", "handed"):
                yield "renew", intake.lease_id
        if reader.puller.in_flight_blocks():
            leaves.append(("clock at D",))
            yield ("reuse at D",)  # when bytes may still land; else one free block is like another
        yield from ends
        yield from leaves
        if self.bounds.races:
            pairs = [(end, leave) for end in ends for leave in leaves]
            yield from (("at once", *pair) for one in pairs for pair in (one, one[::-1]))

    def _on_wire(self) -> Iterator[Action]:
        wire = self.reader.wire
        for number, one in enumerate(wire.moving):
            yield from (("land", number, source) for source in wire.sources(number))
            yield "break" if self._still_runs(one) else "reset", number
        if wire.fence_asked is not None:
            yield ("fence done",)
            yield ("fence fails",)

    def _still_runs(self, one: Moving) -> bool:
        """The boot that it reads from."""
        return one.boot == f"boot{self.lender.boot}"

    def _is_next(self, message: Message) -> bool:
        """Streams keep their order."""
        for kinds in STREAMS:
            if message[0] in kinds:
                earlier = self.network[: self.network.index(message)]
                return not any(m[0] in kinds and m[1] == message[1] for m in earlier)
        return True

    # ---- it happens ------------------------------------------------------------------------------------------------

    def do(self, action: Action) -> None:
        if action[0] == "crash at D":
            self._count(action)
            self._crash_reader()
        else:
            self.reader.loop.run(lambda: self._do(action))

    def _do(self, action: Action) -> None:
        self._count(action)
        getattr(self, "_" + action[0].replace(" ", "_"))(*action[1:])

    def _count(self, action: Action) -> None:
        if action[0] in self.left:
            self.left[action[0]] -= 1

    def _at_once(self, first: Action, second: Action) -> None:
        """Two things in one turn of the reader's loop: what waits for the first has not run when the second comes."""
        self._do(first)
        self._do(second)

    def _start(self, name: str) -> None:
        self.unstarted.remove(name)
        self.reader.start(name)

    def _deliver(self, message: Message) -> None:
        self.network.remove(message)
        side: Any = self.lender if message[0] in TO_LENDER else self.reader
        getattr(side, message[0])(*message[1:])

    def _drop(self, message: Message) -> None:
        self.network.remove(message)

    def _duplicate(self, message: Message) -> None:
        self.network.append(message)

    def _hand(self, name: str) -> None:
        self.lender.hand(name)

    def _lease_timer(self) -> None:
        self.lender.leases.expire(self.lender.now)

    def _clock_at_P(self) -> None:
        self.lender.tick()

    def _clock_at_D(self) -> None:
        self.reader.loop.tick(TTL_S)

    def _reuse_at_P(self) -> None:
        self._reuse("reuse at P", self.lender.reuse)

    def _reuse_at_D(self) -> None:
        self._reuse("reuse at D", self.reader.reuse)

    def _reuse(self, kind: str, reuse: Callable[[str], None]) -> None:
        number = self._used[kind] = self._used.get(kind, 0) + 1
        reuse(f"{kind[-1]}{number}")

    def _finish(self, name: str) -> None:
        self.reader.finish(name)

    def _cancel(self, name: str) -> None:
        if name in self.reader.intakes:  # else it has ended in this very turn
            self.reader.cancel(name)

    def _no_answer(self, name: str) -> None:
        self.reader.no_answer(name)

    def _renew(self, lease_id: str) -> None:
        self.network.append(("renew", lease_id))

    def _land(self, number: int, source: str) -> None:
        if number < len(self.reader.wire.moving):
            self.reader.land(number, source)

    def _break(self, number: int) -> None:
        self.reader.wire.break_down(number)

    _reset = _break
    """By a dead boot's host."""

    def _fence_done(self) -> None:
        self.reader.wire.end_fence(well=True)

    def _fence_fails(self) -> None:
        self.reader.wire.end_fence(well=False)

    def _crash_at_P(self) -> None:
        """Its memory is gone; what it had sent is still on the way."""
        self.lender = LenderSide(self.bounds, self.parts, self.lender.boot + 1, self.network.append)

    def _crash_reader(self) -> None:
        """Nothing of it runs again, and its streams break."""
        self.network[:] = [m for m in self.network if m[0] in TO_LENDER]
        names = dict.fromkeys([m[1] for m in self.network if m[0] == "call"] + list(self.lender.lendings))
        self.network += [("close", name) for name in names if ("close", name) not in self.network]
        self.reader.loop.bury()
        self.reader = self._new_reader()

    # ---- what must hold --------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.lender.check()
        self.reader.check()

    def fingerprint(self) -> int:
        reader = self.reader
        return hash((
            fingerprint((self.lender, sorted(self.network, key=repr), self.unstarted), self.lender.now),
            fingerprint((reader, reader.loop.timers()), reader.loop.now),
            tuple(sorted(self.left.items())),
        ))

    def round(self) -> Iterator[Action]:
        """No more faults: everybody does his work until nobody has any, then a tick passes. Yields what happens
        next. The transports move nothing any more, only fences end what moves: that it moves instead is explored."""
        while (action := self._next_fair()) is not None:
            yield action
            self.do(action)
        yield ("a tick passes",)
        for action in (("clock at P",), ("lease timer",), ("clock at D",)):
            self.do(action)

    def is_at_rest(self) -> bool:
        """Nothing is left to come back; if something is, the sides' `check_at_rest` say what."""
        lender, reader = self.lender, self.reader
        ledgers = (lender.pool.ledger(), reader.pool.ledger())
        back = all(ledger.free + ledger.cached == ledger.total for ledger in ledgers)
        idle = not (reader.intakes or reader.puller.in_flight_blocks())
        return back and idle and lender.leases.next_deadline() is None

    def _next_fair(self) -> Action | None:
        for message in self.network:
            if self._is_next(message):
                return "deliver", message
        for name in self.lender.lendings:
            return "hand", name
        if self.reader.wire.fence_asked is not None:
            return ("fence done",)
        for name, intake in self.reader.intakes.items():
            if intake.life.at("running"):
                return "finish", name
            if intake.life.at("handed"):
                return "no answer", name
            if intake.life.at("called") or intake.verified:
                return "cancel", name
        return None
