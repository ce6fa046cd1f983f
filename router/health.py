"""How much of its place a worker may fill: all of it, unless it has just come or keeps failing.

Each worker has a share in (0, 1] of what it could take. Failures of the worker halve it, successes bring it back, and
what fails together counts once (as congestion control does it: one cut per round trip). A share below FLOOR opens the
circuit: nothing goes there for a while, then one request at a time, until one of them succeeds. A fresh boot begins at
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
OPEN_FIRST_S, OPEN_MAX_S = 1.0, 30.0
"""How long a circuit stays open; doubles each time its probe fails."""


@dataclass(slots=True)
class _Circuit:
    boot_id: str
    ramp_from: float
    """When this boot was first seen; -inf: it was no fresh one."""
    share: float = 1.0
    failed_at: float = float("-inf")
    opened_at: float | None = None
    open_s: float = OPEN_FIRST_S


@dataclass(slots=True)
class Health:
    metrics: Metrics
    _circuits: dict[str, _Circuit] = field(default_factory=dict)

    def share(self, info: WorkerInfo, load: WorkerLoad, now: float) -> float:
        """Of what it could take; 0: its circuit is open. When that has been for long enough: as little as one request.
        """
        circuit = self._circuit(info, load, now)
        if circuit.opened_at is not None:
            return 0.0 if now < circuit.opened_at + circuit.open_s else FLOOR / 100
        ramp = START_SHARE + (1 - START_SHARE) * (now - circuit.ramp_from) / RAMP_S
        return min(1.0, ramp) * circuit.share

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
        circuit.failed_at = now
        circuit.share *= HALF
        if circuit.opened_at is not None:  # the probe
            circuit.opened_at, circuit.open_s = now, min(OPEN_MAX_S, 2 * circuit.open_s)
        elif circuit.share < FLOOR:
            circuit.opened_at = now
            self.metrics.inc("baton_circuits_opened_total", worker=worker_id)

    def _circuit(self, info: WorkerInfo, load: WorkerLoad, now: float) -> _Circuit:
        """A new boot of a known worker keeps its record: one that crashes under every request is no better for it."""
        circuit = self._circuits.get(info.worker_id)
        if circuit is None:
            circuit = self._circuits[info.worker_id] = _Circuit("", 0.0)
        if circuit.boot_id != info.boot_id:
            circuit.boot_id = info.boot_id
            circuit.ramp_from = now if load.steps < FRESH_STEPS else float("-inf")
        return circuit
