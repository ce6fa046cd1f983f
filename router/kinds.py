"""Who may be paired with whom, asked once for each two kinds of worker and not for each two workers.

Workers are of one kind when their capabilities differ in nothing that pairing looks at. A fleet of thousands has one
kind, or a few.
"""

from __future__ import annotations

import dataclasses
import logging

from baton.core.layout import Capability, difference
from baton.core.worker import Role, WorkerInfo

log = logging.getLogger(__name__)


class Kinds:
    """Memory: one entry per boot that was not forgotten, one per two kinds that met."""

    def __init__(self) -> None:
        self._kinds: dict[Capability, int] = {}
        self._boots: dict[str, int] = {}
        self._differences: dict[tuple[int, int], str | None] = {}

    def of(self, info: WorkerInfo) -> int:
        kind = self._boots.get(info.boot_id)
        if kind is None:
            capability = info.capability
            essence = dataclasses.replace(
                capability, model="", max_model_len=0, num_blocks=0,
                transports=tuple((name, b"") for name, _ in capability.transports),
            )
            kind = self._boots[info.boot_id] = self._kinds.setdefault(essence, len(self._kinds))
        return kind

    def forget(self, boot_id: str) -> None:
        """It is gone, or says something else of itself."""
        self._boots.pop(boot_id, None)

    def difference(self, one: WorkerInfo, other: WorkerInfo) -> str | None:
        """Why neither may lend to the other; None: they may."""
        first, second = _in_order(one, other)
        pair = self.of(first), self.of(second)
        try:
            return self._differences[pair]
        except KeyError:
            why = self._differences[pair] = difference(first.capability, second.capability)
            if why is not None:
                log.warning("%s and %s, and all like them, never pair: %s", first.worker_id, second.worker_id, why)
            return why


def _in_order(one: WorkerInfo, other: WorkerInfo) -> tuple[WorkerInfo, WorkerInfo]:
    """Prefill before decode, else by name: a pair is compared, logged and shown one way round."""
    if one.role is not other.role:
        return (one, other) if one.role is Role.PREFILL else (other, one)
    return (one, other) if one.worker_id <= other.worker_id else (other, one)
