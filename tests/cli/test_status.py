"""What `baton status` shows of a fleet, in a pipe and on a narrow terminal."""

from __future__ import annotations

import pytest

from baton.cli.status import summary
from baton.wire.admin_pb2 import FleetStatus, WorkerState

NAMES = ("prefill-0", "decode-0")


@pytest.fixture
def fleet() -> FleetStatus:
    status = FleetStatus(router_id="r", model="m")
    for name in NAMES:
        worker = status.workers.add(state=WorkerState.Value("CONNECTING"))
        worker.info.worker_id, worker.info.address = name, "127.0.0.1:40000"
        worker.ledger.free = 1456
    status.pairs.add(prefill=NAMES[0], decode=NAMES[1], transport="shm", bytes_per_s=1.2e9)
    status.counters.add(name="baton_requests_total", value=3)
    return status


def test_a_pipe_gets_every_column_in_full(fleet: FleetStatus) -> None:
    said = list(summary(fleet, None))
    for name in NAMES:
        (row,) = [line.split() for line in said if line.split()[:1] == [name] and "127.0.0.1:40000" in line]
        assert {"connecting", "0/0/0/1456/0", "ms"} <= set(row)
    assert ["baton_requests_total", "3"] in [line.split() for line in said]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_narrow_terminal_keeps_names_states_and_blocks_whole(columns: int, fleet: FleetStatus) -> None:
    said = "\n".join(summary(fleet, columns)).partition("workers")[2]
    assert max(map(len, said.splitlines())) <= columns
    for name in NAMES:
        assert any({name, "connecting", "0/0/0/1456/0"} <= set(line.split()) for line in said.splitlines())
    assert "shm" in said
