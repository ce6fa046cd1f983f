"""The tables themselves: whoever must act is named and has a deadline, every life can end, the page shows them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from baton.core import machines
from baton.core.config import settings
from baton.core.machines import (
    ANY,
    LEASE,
    MACHINES,
    PULL,
    TURN,
    Life,
    Machine,
    Move,
    State,
    refreshed,
    settings_named,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/protocol.md"
SETTINGS = {name for name, _, _ in settings()}
ROWS = [pytest.param(m, s, id=f"{m.name}: {s.name}") for m in MACHINES for s in m.states]


def reachable(machine: Machine, start: str) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        state = todo.pop()
        todo += [to for event in machine.events(state) if (to := machine.next(state, event)) not in seen]
        seen.update(todo)
    return seen


@pytest.mark.parametrize(("machine", "state"), ROWS)
def test_every_state_has_an_owner_and_a_deadline_or_ends_the_life(machine: Machine, state: State) -> None:
    events = machine.events(state.name)
    if not state.owner:
        assert not events, f"{state.name} has no owner, but {events} lead on"
        assert not state.deadline
        return
    if state.deadline == TURN:
        assert not state.on_deadline
        return
    named = set(settings_named(state.deadline))
    rows = [machine.state(s.name) for s in machine.states if f"as {s.name.upper()}" in state.deadline]
    for row in rows:
        named |= set(settings_named(row.deadline))
    assert named, f"{state.name} has no deadline that a setting gives: {state.deadline!r}"
    assert named <= SETTINGS, f"there is no setting {named - SETTINGS}"
    assert state.on_deadline in events, f"{state.on_deadline!r}, fired at the deadline, leads nowhere"


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_every_state_can_be_reached_and_every_life_can_end(machine: Machine) -> None:
    assert reachable(machine, machine.initial) == machine.names
    ends = {s.name for s in machine.states if not s.owner} or {machine.initial}  # a worker's boot ends outside
    for state in machine.names:
        assert reachable(machine, state) & ends, f"from {state} no end can be reached"


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_notes_name_settings_that_exist(machine: Machine) -> None:
    texts = [m.note for m in machine.moves] + [s.meaning + s.owner for s in machine.states]
    named = {name for text in texts for name in settings_named(text)}
    assert named <= SETTINGS, f"there is no setting {named - SETTINGS}"


def room_that_lives(machine: Machine) -> Path:
    """Where `Life(THAT_MACHINE)` is begun."""
    (name,) = [n for n, value in vars(machines).items() if value is machine]
    begun = re.compile(rf"\bLife\({name}\)")
    rooms = {p.parent for p in ROOT.glob("*/*.py") if begun.search(p.read_text())}
    assert len(rooms) == 1, f"{name} is lived in {sorted(map(str, rooms))}"
    return rooms.pop()


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_the_code_lives_by_the_table_and_the_table_by_the_code(machine: Machine) -> None:
    """No event is only on paper, and none that is written out in the code is unknown to the table. (One that is passed
    on in a variable is left to `Life`, which asserts when it happens.)"""
    room = room_that_lives(machine)
    nodes = [node for path in room.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    said = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    events = {move.event for move in machine.moves}
    assert events <= said, f"{room.name} never says {sorted(events - said)}"
    told = {
        arg.value
        for n in nodes
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "on" and n.args
        for arg in ast.walk(n.args[0])
        if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
    }
    here = [m for m in MACHINES if room_that_lives(m) == room]
    known = {word for m in here for move in m.moves for word in (move.event, move.state)}
    assert told <= known, f"{room.name} tells a life {sorted(told - known)}, which no table of it knows"


def test_a_pull_leaves_moving_for_quarantine_only_because_bytes_may_still_land() -> None:
    assert {PULL.next("moving", e) for e in ("timeout", "cancel")} == {"quarantined"}
    assert {PULL.next("moving", e) for e in ("land", "error")} == {"checking", "failed"}
    assert PULL.next("quarantined", "fence") == "quarantined", "asking for a fence is not having one"


def test_a_life_moves_by_its_table_and_refuses_the_rest() -> None:
    life = Life(LEASE)
    assert life.at("live")
    assert life.on("renew") == "live"
    assert life.on("release") == "released"
    assert not life.ended
    with pytest.raises(AssertionError, match=r"Lease: no 'release' in state 'released'"):
        life.on("release")
    life.on("forget")
    assert life.ended
    with pytest.raises(AssertionError, match="no state"):
        life.at("lvie")


def test_a_machine_that_contradicts_itself_is_refused() -> None:
    here, there = State("here", "", "D", TURN), State("there", "")
    with pytest.raises(AssertionError, match="leads two ways"):
        Machine("m", (here, there), (Move("here", "go", "there"), Move(ANY, "go", "here")))
    with pytest.raises(AssertionError, match="unknown state"):
        Machine("m", (here,), (Move("here", "go", "nowhere"),))
    with pytest.raises(AssertionError, match="twice"):
        Machine("m", (here, here), ())


def test_the_protocol_page_shows_the_tables_as_they_are() -> None:
    assert PAGE.read_text() == refreshed(PAGE.read_text()), "run `make docs` and commit the result"
