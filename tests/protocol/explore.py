"""Breadth first over every state that a world can reach within its bounds.

A state is reached by replaying its path on fresh objects, because coroutines cannot be copied; it is expanded once per
fingerprint. Safety is checked in every state, progress from every state: left alone, everything comes back. The first
violation found is a shortest one.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.protocol.bounds import Bounds, Parts
from tests.protocol.world import NETWORK, Action, World

ROUNDS = 16
"""Ticks within which everything must have come back: the longest chain is time-out, quarantine, failed fence, pause."""


class Violation(Exception):
    """What broke, and the shortest way there."""


@dataclass(frozen=True)
class Explored:
    num_states: int
    num_transitions: int
    depth: int


def explore(bounds: Bounds, parts: Parts | None = None, max_states: int = 1_000_000) -> Explored:
    """Raises Violation. `max_states` is a guard: reaching it is an error, nothing is explored in part."""
    parts = parts or Parts()
    seen: dict[int, frozenset[Action]] = {}
    todo: deque[tuple[tuple[Action, ...], list[Action]]] = deque()
    num_transitions = depth = 0

    def visit(path: tuple[Action, ...]) -> None:
        nonlocal depth
        with _replayed(bounds, parts, path) as world:
            found, actions = world.fingerprint(), list(world.actions())
            if found in seen:
                assert seen[found] == frozenset(actions), _told(path, "looks like another state, but goes on otherwise")
                return
            seen[found] = frozenset(actions)
            assert len(seen) <= max_states, f"more than {max_states} states: the bounds are too wide"
            depth = len(path)
            todo.append((path, actions))
            _check(world, path)

    visit(bounds.before)
    while todo:
        path, actions = todo.popleft()
        for action in actions:
            num_transitions += 1
            visit((*path, action))
    return Explored(len(seen), num_transitions, depth)


@contextmanager
def _replayed(bounds: Bounds, parts: Parts, path: tuple[Action, ...]) -> Iterator[World]:
    world = World(bounds, parts)
    try:
        try:
            for action in path:
                world.do(action)
        except AssertionError as e:
            raise Violation(_told(path, str(e))) from e
        yield world
    finally:
        world.close()


def _check(world: World, path: tuple[Action, ...]) -> None:
    """A new state: is it safe, and does everything come back from here? Uses the world up."""
    after: list[Action] | None = None
    try:
        world.check()
        after = []
        for _ in range(ROUNDS):
            after += world.round()
            if world.is_at_rest():
                break
        world.check()
        world.lender.check_at_rest()
        world.reader.check_at_rest()
    except AssertionError as e:
        raise Violation(_told(path, str(e), after)) from e


def _told(path: tuple[Action, ...], why: str, after: list[Action] | None = None) -> str:
    lines = [why.splitlines()[0], *(f"  {i:2}. {_shown(a)}" for i, a in enumerate(path, 1))]
    if after is not None:
        lines.append("  then, left alone:")
        for action, times in ((a, len(list(group))) for a, group in itertools.groupby(after)):
            lines.append(f"      {_shown(action)}" + (f", {times} times" if times > 1 else ""))
    return "\n".join(lines)


def _shown(action: Action) -> str:
    """Of a message: kind and whose."""
    return " ".join(_shown(a[:2] if action[0] in NETWORK else a) if isinstance(a, tuple) else str(a) for a in action)
