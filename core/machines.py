"""Every life in the protocol as a table: request, lending, lease, pull, worker, attempt.

Owns the states, who must act next in each, until when, and which events lead where. Does not act: code that lives one
of these lives keeps a `Life` and tells it what happened; an event that the table does not know in that state is a bug
and asserts. docs/protocol.md shows these tables (`make docs` writes them), tests/protocol explores them.

A state that does not end a life has an owner and a deadline: the setting that says how long (tests check that it
exists), or TURN where the code decides without awaiting anything. `on_deadline` is the event that fires then.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TURN = "none: same loop turn"
REQUEST = "the request's (`router.request_timeout_s` unless it names one)"
ANY = "*"
"""As the source of a move: every state that is not terminal."""


@dataclass(frozen=True, slots=True)
class State:
    """One row. Terminal states have neither owner nor deadline: nobody has to do anything any more."""

    name: str
    meaning: str
    owner: str = ""
    """Who must act next."""
    deadline: str = ""
    on_deadline: str = ""
    """The event of the deadline; none with TURN."""


@dataclass(frozen=True, slots=True)
class Move:
    """`event` in `state` leads `to`. A move to the same state says: heard, and nothing changes but what `note` says."""

    state: str
    event: str
    to: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """The first state is where a life begins; a state without moves is where it ends."""

    name: str
    states: tuple[State, ...]
    moves: tuple[Move, ...]
    names: frozenset[str] = field(init=False, repr=False, compare=False)
    _next: dict[tuple[str, str], str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(s.name for s in self.states))
        assert len(self.names) == len(self.states), f"{self.name}: a state is there twice in {self.states}"
        table: dict[tuple[str, str], str] = {}
        for move in self.moves:
            assert {move.state, move.to} <= {*self.names, ANY}, f"{self.name}: {move} names an unknown state"
            for source in self._running() if move.state == ANY else (move.state,):
                assert (source, move.event) not in table, f"{self.name}: {move.event} leads two ways from {source}"
                table[source, move.event] = move.to
        object.__setattr__(self, "_next", table)

    @property
    def initial(self) -> str:
        return self.states[0].name

    def state(self, name: str) -> State:
        return next(s for s in self.states if s.name == name)

    def is_terminal(self, name: str) -> bool:
        return not self.state(name).owner

    def events(self, state: str) -> tuple[str, ...]:
        """What may happen in this state."""
        return tuple(event for source, event in self._next if source == state)

    def next(self, state: str, event: str) -> str:
        to = self._next.get((state, event))
        assert to is not None, f"{self.name}: no {event!r} in state {state!r}, only {self.events(state)}"
        return to

    def _running(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.states if s.owner)


class Life:
    """One walk through a machine. `on` is the only way to move."""

    __slots__ = ("machine", "state")

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.state = machine.initial

    def __repr__(self) -> str:
        return f"<{self.machine.name} {self.state}>"

    def on(self, event: str) -> str:
        """What happened; returns the state that follows. Asserts that it may happen now."""
        self.state = self.machine.next(self.state, event)
        return self.state

    def at(self, *states: str) -> bool:
        """Whether it is in one of these states, which must exist."""
        assert {*states} <= self.machine.names, f"{self.machine.name}: one of {states} is no state"
        return self.state in states

    @property
    def ended(self) -> bool:
        return self.machine.is_terminal(self.state)


# ---- the hand-off, seen from the decode worker D and the lender P -------------------------------------------------

DECODE_REQUEST = Machine(
    "Request on the decode worker",
    (
        State("submitted", "what is cached is pinned, credit held for the rest; what comes next is decided", "D", TURN),
        State("fetching", "another holder lends the cached prefix that D lacks, D pulls it",
              "holder, transport", "`handoff.peer_timeout_s` per event; `handoff.pull_timeout_s` per pull", "fetched"),
        State("called", "credit held, `Prefill` sent, nothing bound yet",
              "P", "`handoff.peer_timeout_s` per event; `handoff.stall_timeout_s` without an engine step of P",
              "fail"),
        State("bound", "credit turned into destination blocks; pulls run while the next chunk is computed",
              "P, transport", "as CALLED; `handoff.pull_timeout_s` per pull", "fail"),
        State("handed", "`HandoffState` came, all pulls verified, nothing missing (see Verification); released",
              "P", "`handoff.release_timeout_s`", "good"),
        State("taking", "planned drain: a request that runs on a peer comes here, its blocks first, its tail last",
              "the peer", "`handoff.peer_timeout_s` per event; `handoff.pull_timeout_s` per pull", "end"),
        State("running", "D owns the request; the scheduler has the sequence", "D", REQUEST, "end"),
        State("moving_out", "planned drain: paused at a step boundary, all of it lent to the peer that takes it",
              "the peer", "`handoff.peer_timeout_s`", "abandon"),
        State("fallback", "P failed: the verified prefix stays, the rest goes back; counted, logged", "D", TURN),
        State("ended", "sequence removed, references and credit given back, lease released, last chunk sent"),
    ),
    (
        Move("submitted", "fetch", "fetching"),
        Move("submitted", "call", "called"),
        Move("submitted", "take", "taking"),
        Move("submitted", "run", "running", "the route has no prefill worker"),
        Move("fetching", "fetched", "submitted", "or not: counted, the rest is computed"),
        Move("called", "publish", "bound", "the first `Published`"),
        Move("called", "fail", "fallback"),
        Move("bound", "hand", "handed", "whole and verified"),
        Move("bound", "fail", "fallback", "pulls aborted, see Pull; the lease is released in the background"),
        Move("handed", "good", "running", "or no answer: the digests stand alone, counted"),
        Move("handed", "bad", "fallback", "`good=False`: all pulled blocks are dropped"),
        Move("taking", "hand", "handed", "whole, verified and released: the peer has forgotten it"),
        Move("running", "move", "moving_out"),
        Move("moving_out", "release", "ended", "the peer has all of it: only now it is forgotten here"),
        Move("moving_out", "abandon", "running", "resumed where it paused; a late release hears `good=False`"),
        Move("fallback", "spare", "called", "another prefill worker of the route is called for what is not verified"),
        Move("fallback", "retry", "ended", "`retry_route`: R prices again; verified full blocks stay in the cache"),
        Move(ANY, "end", "ended",
             "finished, refused, cancelled, deadline passed, router lost for `router.orphan_window_s`: one path"),
    ),
)

LENDING = Machine(
    "Lending on the lender",
    (
        State("accepted", "the lease is granted and empty; the sequence is queued, or runs here already",
              "P", REQUEST, "end"),
        State("fetching", "P pulls the prefix that another holder has, before it computes the rest",
              "holder, transport", "`handoff.peer_timeout_s` per event; `handoff.pull_timeout_s` per pull", "fetched"),
        State("computing", "blocks are lent and published as they are complete, with generation and digest",
              "P", REQUEST, "end"),
        State("paused", "a take-over: stopped at a step boundary, all of it lent; the request still belongs here",
              "D", "`handoff.peer_timeout_s`", "end"),
        State("lent", "`HandoffState` is out, the sequence has left the scheduler: the lease alone holds its blocks"),
        State("given", "D has all of a request it took over and released the lease: it is forgotten here"),
        State("ended", "the lease is abandoned, blocks return to cached or free; a request that was paused runs on"),
    ),
    (
        Move("accepted", "fetch", "fetching"),
        Move("accepted", "publish", "computing"),
        Move("accepted", "pause", "paused", "at the next step boundary"),
        Move("accepted", "hand", "lent", "what is cached was asked for, and nothing is"),
        Move("fetching", "fetched", "accepted", "or not: counted, P computes the rest"),
        Move("computing", "publish", "computing"),
        Move("computing", "hand", "lent", "tail published, first token sent"),
        Move("paused", "publish", "paused", "then `HandoffState`"),
        Move("paused", "give", "given"),
        Move(ANY, "end", "ended", "D gone, deadline passed, lease ended, the engine refused"),
    ),
)

LEASE = Machine(
    "Lease",
    (
        State("live", "its blocks are lent: not freed, not evicted, not preempted",
              "D renews", "`handoff.lease_ttl_s` since the last renewal", "expire"),
        State("released", "blocks unlent; a repeated release hears the same answer",
              "P's timer", "2 x `handoff.lease_ttl_s`", "forget"),
        State("expired", "blocks unlent; a late release hears `good=False` with the reason",
              "P's timer", "2 x `handoff.lease_ttl_s`", "forget"),
        State("abandoned", "as EXPIRED", "P's timer", "2 x `handoff.lease_ttl_s`", "forget"),
        State("forgotten", "whoever names it hears that it is unknown"),
    ),
    (
        Move("live", "renew", "live"),
        Move("live", "release", "released", "by the reader"),
        Move("live", "expire", "expired", "by the timer"),
        Move("live", "abandon", "abandoned",
             "the call was closed before `HandoffState`; if it lends what was cached or ran here, before the release"),
        Move("released", "forget", "forgotten"),
        Move("expired", "forget", "forgotten"),
        Move("abandoned", "forget", "forgotten"),
    ),
)

PULL = Machine(
    "Pull",
    (
        State("moving", "the transport moves bytes; the destination blocks belong to the pull",
              "transport", "`handoff.pull_timeout_s`", "timeout"),
        State("checking", "every byte is in; digests are compared", "D", TURN),
        State("quarantined", "nobody waits any more, but bytes may still land: the blocks belong to the quarantine",
              "D's timer, every `handoff.quarantine_poll_s`",
              "`handoff.quarantine_max_s`, or `handoff.quarantine_cap` of the pool", "fence"),
        State("verified", "the bytes are what was lent; the blocks belong to the request"),
        State("failed", "no byte can land any more; whoever holds the blocks may throw them away"),
    ),
    (
        Move("moving", "land", "checking", "the transport says done"),
        Move("moving", "error", "failed"),
        Move("moving", "timeout", "quarantined"),
        Move("moving", "cancel", "quarantined"),
        Move("checking", "equal", "verified"),
        Move("checking", "differ", "failed", "an `IntegrityError`, counted"),
        Move("quarantined", "land", "failed", "late, and of no use: the blocks return"),
        Move("quarantined", "error", "failed", "the fence ends it so, too: the blocks return"),
        Move("quarantined", "fence", "quarantined",
             "the peer is fenced; if that fails, again after 1 s, then twice as long each time, up to 60 s"),
    ),
)

# ---- the router's view --------------------------------------------------------------------------------------------

WORKER = Machine(
    "Worker as R sees it",
    (
        State("connecting", "in the registry; no stream, or no prefix map on it yet",
              "R dials, with back-off to 2 s", "`router.dead_s` from open stream to prefix map, then a new stream",
              "timeout"),
        State("ready", "gets requests",
              "worker", "`router.suspect_s` of silence; `handoff.stall_timeout_s` with work and no engine step",
              "doubt"),
        State("suspect", "no new requests", "worker", "`router.dead_s` of silence", "bury"),
        State("draining", "no new requests; those it has finish or move to a peer",
              "worker", "`router.dead_s` of silence", "bury"),
        State("dead", "counted once (`baton_worker_lost_total`) if it was READY and did not leave in order; dialled on",
              "R dials, with back-off to 2 s", "`router.dead_s` per dial", "timeout"),
    ),
    (
        Move("connecting", "snapshot", "ready"),
        Move("connecting", "timeout", "connecting"),
        Move("connecting", "bury", "dead", "`router.dead_s` without a word since it was READY"),
        Move("ready", "doubt", "suspect"),
        Move("ready", "drain", "draining", "it says so with its load"),
        Move("suspect", "word", "ready", "any message; if it stood still: one with more `steps`, or without work"),
        Move("suspect", "drain", "draining"),
        Move("suspect", "bury", "dead"),
        Move("draining", "resume", "ready"),
        Move("draining", "bury", "dead"),
        Move("dead", "open", "connecting", "a stream opens again"),
        Move("dead", "timeout", "dead"),
        Move("ready", "break", "connecting",
             "the stream broke: its requests wait a second for the next one, then go elsewhere"),
        Move("suspect", "break", "connecting", "the same"),
        Move("draining", "break", "connecting", "the same"),
    ),
)
"""A new boot id is a new life of this machine."""

ATTEMPT = Machine(
    "Attempt at the router",
    (
        State("placing", "a decode worker is chosen; the request waits, bounded, while none is ready or has room",
              "R", REQUEST, "timeout"),
        State("sent", "`Submit` is on the stream, nothing was heard",
              "D", "the request's + `router.heartbeat_s`; `router.dead_s` of silence", "timeout"),
        State("streaming", "tokens arrive; each is delivered once, by (request, epoch, first_index)",
              "D", "as SENT", "timeout"),
        State("moved", "planned drain: the attempt that took it over speaks for the request now"),
        State("refused", "D has no place: the next attempt goes elsewhere and costs nothing"),
        State("lost", "dispatched again with a new epoch, delivered tokens replayed, within `router.max_attempts`"),
        State("finished", "the last chunk was delivered"),
        State("cancelled", "the client went away or had enough; D was told"),
        State("expired", "the request's deadline passed"),
    ),
    (
        Move("placing", "submit", "sent"),
        Move("placing", "timeout", "expired"),
        Move("placing", "refuse", "refused", "nobody has a place for as long as it may wait"),
        Move("sent", "refuse", "refused"),
        Move("sent", "token", "streaming"),
        Move("sent", "finish", "finished"),
        Move("streaming", "token", "streaming"),
        Move("streaming", "finish", "finished"),
        Move("sent", "move", "moved"),
        Move("streaming", "move", "moved"),
        Move("sent", "lose", "lost", "stream broke and did not come back, worker failed, gap in the tokens"),
        Move("streaming", "lose", "lost", "the same"),
        Move("sent", "timeout", "expired"),
        Move("streaming", "timeout", "expired"),
        Move(ANY, "cancel", "cancelled"),
    ),
)

MACHINES = (DECODE_REQUEST, LENDING, LEASE, PULL, WORKER, ATTEMPT)


# ---- the page -----------------------------------------------------------------------------------------------------


def settings_named(text: str) -> Iterator[str]:
    """Dotted setting names in a deadline or a note."""
    return (m.group(1) for m in re.finditer(r"`([a-z]+\.[a-z_]+)`", text))


def table(machine: Machine) -> str:
    """The machine as docs/protocol.md shows it."""
    lines = ["| state | meaning | owner | deadline | leaves by |", "|---|---|---|---|---|"]
    for state in machine.states:
        deadline = f"{state.deadline}: *{state.on_deadline}*" if state.on_deadline else state.deadline
        moves = "; ".join(_shown(m) for m in machine.moves if m.state == state.name)
        lines.append(f"| {state.name.upper()} | {state.meaning} | {state.owner or '-'} | {deadline or '-'} "
                     f"| {moves or '-'} |")
    lines += [f"\nIn every state that has an owner, also: {_shown(m)}." for m in machine.moves if m.state == ANY]
    return "\n".join(lines)


def _shown(move: Move) -> str:
    note = f" ({move.note})" if move.note else ""
    return f"*{move.event}* -> {move.to.upper()}{note}"


def refreshed(page: str) -> str:
    """The page with every table between its markers written anew."""
    for machine in MACHINES:
        start, end = f"<!-- machine: {machine.name} -->\n\n", "\n\n<!-- end -->"
        before, found, rest = page.partition(start)
        assert found, f"the page has no marker {start.strip()}"
        page = before + start + table(machine) + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":  # make docs
    for name in sys.argv[1:]:
        Path(name).write_text(refreshed(Path(name).read_text()))
