"""The simulator's asyncio loop: virtual time, a schedule chosen by a seed, and processes that can freeze or die.

Owns the clock and the order in which ready callbacks run. Does not know what runs on it: production code calls
asyncio and asyncio.get_running_loop().time() and cannot tell the difference.

Life of one turn (`_run_once`, in the place of asyncio's):

    1. nothing is ready: the clock jumps to the next timer. No timer either: SimDeadlock, with what every task waits for
    2. due timers join the ready callbacks; callbacks of dead processes vanish, those of frozen ones wait
    3. the rest is shuffled by the seed. asyncio itself runs callbacks first in, first out; production code must not
       lean on that between tasks, because no real network keeps it

A process has clocks of its own, as a host has: its monotonic clock (`loop.time()`) counts from an origin that means
nothing to anybody else, and its wall clock (`time.time()`, see sim/clocks.py) can jump. The world's own clock is
`loop.now`.

Nothing here depends on id() or hash() of an object: tasks and futures get counter hashes, because TaskGroup and
asyncio.wait keep them in sets, and otherwise another process would cancel them in another order.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import math
import random
import selectors
import sys
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Never, TypeVar

T = TypeVar("T")

MAX_TURNS_PER_INSTANT = 100_000
"""So many turns without the clock moving is a busy loop; a step of the busiest world takes a few dozen."""


class SimDeadlock(RuntimeError):
    """Nothing is ready and no timer is set: nobody can ever wake anybody."""


class SimLivelock(RuntimeError):
    """Callbacks keep waking each other and the clock stands still."""


TICKS_PER_S = 2.0**30
"""Clocks of processes go in steps of 2^-30 s: sums with an origin below 2^22 s are then exact."""


class SimProcess:
    """What a real process is to the world: its tasks freeze, thaw and die together, and see one clock.

    Everything started by `spawn`, and everything that starts in turn, belongs to it (through a context variable).
    """

    def __init__(self, loop: SimLoop, name: str, origin_s: int = 0) -> None:
        """`origin_s`: what its monotonic clock shows when the world begins, a whole number below 2^22."""
        assert 0 <= origin_s < 2**22, f"{name} cannot count from {origin_s}"
        self.name = name
        self.frozen = False
        self.dead = False
        self.origin_s = origin_s
        self.wall_jump_s = 0.0
        """How far its wall clock is off: somebody set it."""
        self._loop = loop
        self._context = contextvars.Context()
        self._context.run(_process.set, self)

    def __repr__(self) -> str:
        state = "dead" if self.dead else "frozen" if self.frozen else "alive"
        return f"<{self.name} {state}>"

    @property
    def running(self) -> bool:
        return not (self.frozen or self.dead)

    def spawn(self, coro: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        return self._loop.create_task(coro, name=name, context=self._context.copy())

    def tasks(self) -> list[SimTask]:
        """Those not finished, oldest first."""
        return [t for t in self._loop.tasks() if t.process is self]

    def freeze(self) -> None:
        """SIGSTOP: nothing of it runs; its timers and messages pile up."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: everything that piled up is ready at once."""
        self.frozen = False
        self._loop.release_stalled(self)

    def kill(self) -> None:
        """SIGKILL: nothing of it ever runs again, no `finally` either."""
        self.dead = True
        self._loop.bury(self.tasks())


_process: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar("sim_process", default=None)


def current_process() -> SimProcess | None:
    """The process this code runs in; None for the world itself (driver, network, oracle)."""
    return _process.get()


class SimTask(asyncio.Task[Any]):
    def __init__(self, coro: Any, *, loop: SimLoop, context: contextvars.Context | None = None) -> None:
        self._number = loop.next_number()
        self.process: SimProcess | None = _process.get() if context is None else context.get(_process)
        super().__init__(coro, loop=loop, context=context)

    def __hash__(self) -> int:
        return self._number

    __eq__ = object.__eq__


class SimFuture(asyncio.Future[Any]):
    _number = 0

    def __hash__(self) -> int:
        """A number it gets when somebody first asks: few futures are ever kept in a set."""
        if not self._number:
            self._number = self.get_loop().next_number()  # type: ignore[attr-defined]
        return self._number

    __eq__ = object.__eq__


class _SimTimer(asyncio.TimerHandle):
    """A TimerHandle that is made and cancelled faster: most of a world's work is timers."""

    def __init__(
        self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], loop: SimLoop,
        context: contextvars.Context | None,
    ) -> None:
        self._when, self._callback, self._args, self._loop = when, callback, args, loop
        self._context = contextvars.copy_context() if context is None else context
        self._cancelled = self._scheduled = False
        self._repr = self._source_traceback = None

    def cancel(self) -> None:
        self._cancelled = True
        self._callback, self._args = None, None  # type: ignore[assignment]


class _NoSockets(selectors.BaseSelector):
    """asyncio asks for a place to wait for sockets."""

    def select(self, timeout: float | None = None) -> Never:
        raise RuntimeError("the simulator's loop never waits")

    def register(self, fileobj: Any, events: int, data: Any = None) -> Never:
        raise RuntimeError("there are no sockets in the simulator: use sim.network")

    def unregister(self, fileobj: Any) -> Never:
        raise KeyError(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class SimLoop(asyncio.SelectorEventLoop):
    """`rng` belongs to the schedule; a part of the world that needs chance derives its own with `fork`."""

    _ready: deque[asyncio.Handle]
    _stopping: bool

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"schedule {seed}")
        self.problems: list[str] = []
        """Exceptions nobody took, generators nobody closed: each is a bug of the code under test."""
        self.num_turns = 0
        self.on_turn: Callable[[Iterable[SimProcess]], None] | None = None
        """Called before each turn, when no callback is half done, with the processes that ran in the last one. What
        it raises ends the run."""
        self._ran: dict[SimProcess, None] = {}
        self.now = 0.0
        """The world's clock, which no process sees."""
        self._ticked = 0.0
        """The same in whole ticks, for the clocks of processes."""
        self._numbers = 0
        self._timers: list[tuple[float, int, _SimTimer]] = []
        self._num_timers = 0
        self._turns_at_this_instant = 0
        self._stalled: list[asyncio.Handle] = []
        self._graveyard: list[asyncio.Task[Any]] = []
        self._killed = False
        """A process died in this turn: what it still had to do in it is not done."""
        self.world = contextvars.Context()
        """Of callbacks that belong to no process."""
        super().__init__(_NoSockets())
        self.set_task_factory(lambda loop, coro, **kw: SimTask(coro, loop=self, **kw))
        self.set_exception_handler(lambda loop, what: self._note(what))

    def time(self) -> float:
        """The monotonic clock of the process that asks."""
        process = _process.get()
        return self.now if process is None else self._ticked + process.origin_s

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """`when` is on the clock of the process that asks; whoever runs then has no say."""
        process = _process.get()
        if process is not None:
            when = math.ceil((when - process.origin_s) * TICKS_PER_S) / TICKS_PER_S
        return self._schedule(when, callback, args, context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        process = _process.get()
        if process is None:
            return self._schedule(self.now + delay, callback, args, context)
        when = math.ceil((self._ticked + delay) * TICKS_PER_S) / TICKS_PER_S
        return self._schedule(when, callback, args, context)

    def at(self, when: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        """For the world: call back at world time `when`, as nobody's process."""
        return self._schedule(when, callback, args, self.world)

    def _schedule(
        self, when: float, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context | None
    ) -> asyncio.TimerHandle:
        """In a heap of our own: tuples compare faster than handles."""
        timer = _SimTimer(when, callback, args, self, context)
        self._num_timers += 1
        heapq.heappush(self._timers, (when, self._num_timers, timer))
        return timer

    def fork(self, name: str) -> random.Random:
        """A generator of its own for `name`, so that one consumer more does not change what another one draws."""
        return random.Random(f"{name} {self.seed}")

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def tasks(self) -> list[SimTask]:
        """All that are not finished and not dead, oldest first."""
        buried = set(self._graveyard)
        found = [t for t in asyncio.all_tasks(self) if isinstance(t, SimTask) and t not in buried]
        return sorted(found, key=hash)

    def create_future(self) -> asyncio.Future[Any]:
        return SimFuture(loop=self)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Never:  # type: ignore[override]
        raise RuntimeError("there are no threads in the simulator: this code belongs behind an adapter")

    def _run_once(self) -> None:
        """One turn, in asyncio's place; see the module's head."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        if not (self._ready or self._stopping):
            self._jump()
        self.num_turns += 1
        self._turns_at_this_instant += 1
        if self._turns_at_this_instant > MAX_TURNS_PER_INSTANT:
            raise SimLivelock(f"{MAX_TURNS_PER_INSTANT} turns at t={self.now}:\n" + self.describe())
        if self.on_turn is not None:
            self.on_turn(self._ran)
        self._ran = {}
        ready = [h for h in self._ready if self._may_run(h)]
        self._ready.clear()
        while timers and timers[0][0] <= self.now:
            timer = heapq.heappop(timers)[2]
            if not timer._cancelled and self._may_run(timer):
                ready.append(timer)
        if len(ready) > 1:
            self.rng.shuffle(ready)
        self._killed = False
        for handle in ready:
            if not handle._cancelled and not (self._killed and not self._may_run(handle)):
                handle._run()

    def _jump(self) -> None:
        """The clock moves to the next timer."""
        if not self._timers:
            raise SimDeadlock("everybody waits and no timer is set:\n" + self.describe())
        if self._timers[0][0] > self.now:
            self.now = self._timers[0][0]
            self._ticked = math.floor(self.now * TICKS_PER_S) / TICKS_PER_S
            self.start_instant()

    def start_instant(self) -> None:
        self._turns_at_this_instant = 0

    def _may_run(self, handle: asyncio.Handle) -> bool:
        process: SimProcess | None = handle._context.get(_process)  # type: ignore[attr-defined]
        if process is None:
            return True
        if process.running:
            self._ran[process] = None
            return True
        if not process.dead:
            self._stalled.append(handle)
        return False

    def release_stalled(self, process: SimProcess) -> None:
        mine = [h for h in self._stalled if h._context.get(_process) is process]  # type: ignore[attr-defined]
        self._stalled = [h for h in self._stalled if h not in mine]
        self._ready.extend(mine)

    def bury(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Keep dead tasks until the loop is closed: collected earlier, their `finally` would run after all."""
        self._killed = True
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._graveyard.extend(tasks)

    def describe(self) -> str:
        """What each unfinished task waits for, one line each."""
        lines = []
        for task in self.tasks():
            frames = task.get_stack(limit=1)
            where = f"{frames[0].f_code.co_qualname}:{frames[0].f_lineno}" if frames else "?"
            owner = task.process.name if task.process else "world"
            lines.append(f"  {owner}: {task.get_name()} at {where}")
        return "\n".join(lines)

    def _note(self, what: dict[str, Any]) -> None:
        error = what.get("exception")
        self.problems.append(f"{what['message']}: {error!r}" if error else str(what["message"]))

    def _asyncgen_finalizer_hook(self, agen: AsyncGenerator[Any, Any]) -> None:
        name = getattr(agen, "__qualname__", "?")
        self.problems.append(f"async generator {name} was dropped, not closed: its clean-up runs when it is collected")
        if not self.is_closed():
            self._asyncgens.discard(agen)  # type: ignore[attr-defined]
            self.create_task(agen.aclose())

    def close(self) -> None:
        if self._graveyard:
            self._dispose_of_the_dead()
        super().close()

    def _dispose_of_the_dead(self) -> None:
        """Close what dead processes left, now, while nobody looks: later the collector would, and every `finally` in
        there would complain in the middle of somebody else's run."""
        hook = sys.unraisablehook
        sys.unraisablehook = lambda unraisable: None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for task in self._graveyard:
                    with contextlib.suppress(BaseException):
                        task.get_coro().close()
                del task
                self._graveyard.clear()
                self._stalled.clear()
                self._ready.clear()
                self._timers.clear()
                gc.collect(2 if gc.isenabled() else 1)  # the run itself has promoted some of them
        finally:
            sys.unraisablehook = hook

    def _make_self_pipe(self) -> None:
        """No pipe: no thread ever has to wake us."""

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


def run(seed: int, main: Callable[[SimLoop], Coroutine[Any, Any, T]]) -> T:
    """Run `main(loop)` on a loop of this seed; afterwards cancel what it left running.

    Raises what `main` raises, SimDeadlock and SimLivelock. Nests in nothing: no other loop may run in this thread.
    """
    loop = SimLoop(seed)
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main(loop))
    finally:
        try:
            _cancel_leftovers(loop)
        finally:
            asyncio.set_event_loop(None)
            loop.close()


def _cancel_leftovers(loop: SimLoop) -> None:
    for process in {t.process: None for t in loop.tasks() if t.process is not None}:
        process.thaw()
    loop.start_instant()
    loop.on_turn = None
    left = loop.tasks()
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=60.0))
    loop.run_until_complete(loop.shutdown_asyncgens())
