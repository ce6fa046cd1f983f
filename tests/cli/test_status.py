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
        worker.ledger.free, worker.load.model.num_decode_steps = 1456, 3
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


def test_a_draining_worker_shows_what_is_left_and_a_silent_one_for_how_long(fleet: FleetStatus) -> None:
    prefill, decode = fleet.workers
    decode.state, prefill.state = WorkerState.Value("DRAINING"), WorkerState.Value("DEAD")
    decode.load.num_running, decode.load.num_waiting, decode.load.num_lent_out = 2, 1, 4
    prefill.silent_s = 12.3
    said = "\n".join(summary(fleet, None))
    assert "draining, 3 requests and 4 leases left" in said
    assert "dead, silent for 12 s" in said
    for state, shown in (("SUSPECT", "suspect, silent for 12 s"), ("READY", "ready")):
        prefill.state = WorkerState.Value(state)
        assert shown in "\n".join(summary(fleet, None))


def test_who_is_never_paired_is_named_with_the_field_that_keeps_them_apart(fleet: FleetStatus) -> None:
    assert "never paired" not in "\n".join(summary(fleet, None))
    odd = fleet.workers[1]
    for peer in ("prefill-0", "decode-1"):
        odd.kept_apart.add(peer=peer, difference="layout.block_size: 16 vs 32")
    odd.kept_apart.add(peer="decode-2", difference="numerics: torch-fp32 vs bf16")
    apart = "\n".join(summary(fleet, None)).partition("\nnever paired\n")[2].splitlines()
    rows = [line.split(maxsplit=1)[1] for line in apart if line.startswith("  decode-0")]
    assert rows == [
        "prefill-0, decode-1  layout.block_size: 16 vs 32",
        "decode-2             numerics: torch-fp32 vs bf16",
    ]
