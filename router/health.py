"""How much of its place a worker may fill: all of it, unless it has just come or keeps failing.

Each worker has a share in (0, 1] of what it could take. Failures of the worker halve it, successes bring it back, and
what fails together counts once (as congestion control does it: one cut per round trip). A share below FLOOR opens the
circuit: nothing goes there for a while, then one request, and the next after as long again, until one of them succeeds.
What it still runs, or gets from other routers, says nothing about whether it may be tried. A fresh boot begins at
START_SHARE and gets the rest over RAMP_S: its caches are empty, and after a mass restart everybody comes at once.

What a client did wrong, refusals and deadlines that a client chose short say nothing about a worker and never get here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.core.metrics import Metrics
from baton.core.worker import WorkerInfo, WorkerLoad

START_SHARE, RAMP_S = 0.25, 5.0
FRESH_STEPS = 64
"""A boot with fewer engine steps has just begun."""
HALF, RECOVERY = 0.5, 1.1
"""What a failure and a success do to a share."""
FLOOR = 0.1
TOGETHER_S = 0.25
"""Failures within this time of the first have one cause: a broken stream takes all its requests along."""
MAX_WORKERS = 65_536
"""Remembered; of more, those that were met first are strangers again."""
OPEN_FIRST_S, OPEN_MAX_S = 1.0, 30.0
"""How long a circuit stays open; doubles each time its probe fails."""


@dataclass(slots=True)
class _Circuit:
    boot_id: str = ""
    ramp_from: float = 0.0
    """When this boot was first seen; -inf: it was no fresh one."""
    well: bool = False
    """It has all of its share, and nothing is to be worked out."""
    share: float = 1.0
    failed_at: float = float("-inf")
    opened_at: float | None = None
    open_s: float = OPEN_FIRST_S


@dataclass(slots=True)
class Health:
    metrics: Metrics
    _circuits: dict[str, _Circuit] = field(default_factory=dict)

    def share(self, info: WorkerInfo, load: WorkerLoad, now: float) -> float:
        """Of what it could take; 0: its circuit is open. When that has been for long enough it may be `tried`."""
        circuit = self._circuits.get(info.worker_id)
        if circuit is None or circuit.boot_id != info.boot_id:
            circuit = self._meet(info, load, now)
        if circuit.well:
            return 1.0
        ramp = min(1.0, START_SHARE + (1 - START_SHARE) * (now - circuit.ramp_from) / RAMP_S)
        if circuit.opened_at is not None:
            return 0.0 if now < circuit.opened_at + circuit.open_s else ramp
        circuit.well = ramp * circuit.share == 1.0
        return ramp * circuit.share

    def tried(self, worker_id: str, now: float) -> None:
        """A request goes there: of an open circuit, no other one until this has failed or succeeded, or said nothing
        for as long as the circuit was open."""
        circuit = self._circuits.get(worker_id)
        if circuit is not None and circuit.opened_at is not None:
            circuit.opened_at = now

    def succeeded(self, worker_id: str) -> None:
        """It brought a token."""
        circuit = self._circuits.get(worker_id)
        if circuit is None:
            return
        if circuit.opened_at is not None:
            circuit.opened_at, circuit.open_s, circuit.share = None, OPEN_FIRST_S, START_SHARE
        circuit.share = min(1.0, circuit.share * RECOVERY)

    def failed(self, worker_id: str, now: float) -> None:
        """It lost a request, or broke it."""
        circuit = self._circuits.get(worker_id)
        if circuit is None or now < circuit.failed_at + TOGETHER_S:
            return
        circuit.failed_at, circuit.well = now, False
        circuit.share *= HALF
        if circuit.opened_at is not None:  # the probe
            circuit.opened_at, circuit.open_s = now, min(OPEN_MAX_S, 2 * circuit.open_s)
        elif circuit.share < FLOOR:
            circuit.opened_at = now
            self.metrics.inc("baton_circuits_opened_total", worker=worker_id)

    def _meet(self, info: WorkerInfo, load: WorkerLoad, now: float) -> _Circuit:
        """A new boot of a known worker keeps its record: one that crashes under every request is no better for it."""
        circuit = self._circuits.setdefault(info.worker_id, _Circuit())
        circuit.boot_id, circuit.well = info.boot_id, False
        circuit.ramp_from = now if load.steps < FRESH_STEPS else float("-inf")
        while len(self._circuits) > MAX_WORKERS:
            del self._circuits[next(iter(self._circuits))]
        return circuit
