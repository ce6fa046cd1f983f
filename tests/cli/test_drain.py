"""`baton drain` against a router whose worker empties itself step by step."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from baton.core.errors import NotFound, PeerLost
from baton.wire import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from baton.wire.server import start_router_server

Baton = Callable[..., subprocess.CompletedProcess[str]]
BUSY, LAST_LEASE, EMPTY = (2, 1), (0, 1), (0, 0)


class Router(admin_pb2_grpc.AdminServicer, inference_pb2_grpc.InferenceServicer):
    """Knows decode-0. Each question about it finds the next of `left` (requests, leases), and then the last again."""

    def __init__(self) -> None:
        self.left: list[tuple[int, int]] = [BUSY, BUSY, LAST_LEASE, EMPTY]
        self.asked: list[bool | None] = []
        self.draining = False
        self.undone_after: int | None = None
        self.lost = False
        self.peers = 1

    async def Status(self, request: Any, context: Any) -> admin_pb2.FleetStatus:
        return admin_pb2.FleetStatus(router_id="r")

    async def Drain(self, request: admin_pb2.DrainRequest, context: Any) -> admin_pb2.DrainProgress:
        if request.worker_id != "decode-0":
            raise NotFound(f"there is no worker {request.worker_id!r}; this router knows decode-0.", "worker_id")
        if self.lost:
            raise PeerLost("decode-0 is gone.")
        self.asked.append(request.on if request.HasField("on") else None)
        self.draining = request.on if request.HasField("on") else self.draining
        if len(self.asked) == self.undone_after:
            self.draining = False
        requests, leases = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        return admin_pb2.DrainProgress(
            worker_id="decode-0", draining=self.draining, requests=requests, leases=leases, peers=self.peers,
            drained=self.draining and not requests and not leases)  # fmt: skip


Drain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def router() -> Router:
    return Router()


@pytest.fixture
def drain(router: Router, baton: Baton) -> Drain:
    """Runs `baton drain` with these arguments while the router serves."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        async def served() -> subprocess.CompletedProcess[str]:
            server = await start_router_server(router, router, "127.0.0.1", 0)
            try:
                address = f"127.0.0.1:{server.port}"
                return await asyncio.to_thread(baton, "drain", *arguments, "--router", address)
            finally:
                await server.stop(0)

        return asyncio.run(served())

    return run


def test_it_says_what_is_left_until_nothing_is(router: Router, drain: Drain) -> None:
    done = drain("decode-0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "decode-0 is draining: 2 requests and 1 lease left",
        "decode-0 is draining: 1 lease left",
        "decode-0 is empty: nothing runs on it and nobody pulls from it. It can be stopped.",
    ]
    assert router.asked == [True, None, None, None], "it is told once; then it is only asked"


def test_a_worker_that_does_not_get_empty_in_time_is_exit_code_1(router: Router, drain: Drain) -> None:
    router.left = [BUSY]
    done = drain("decode-0", "--wait", "0.3")
    assert done.returncode == 1
    assert "Not empty after 0.3 s" in done.stdout
    assert router.draining, "it goes on draining"


def test_wait_0_tells_it_and_leaves(router: Router, drain: Drain) -> None:
    done = drain("decode-0", "--wait", "0")
    assert (done.returncode, done.stdout) == (0, "decode-0 is draining: 2 requests and 1 lease left\n")
    assert router.asked == [True]


def test_undo_takes_it_back(router: Router, drain: Drain) -> None:
    done = drain("decode-0", "--undo")
    assert (done.returncode, done.stdout, router.asked) == (0, "decode-0 takes requests again.\n", [False])


def test_somebody_elses_undo_ends_the_wait(router: Router, drain: Drain) -> None:
    router.left, router.undone_after = [BUSY], 3
    done = drain("decode-0", "--wait", "60")
    assert done.returncode == 1
    assert "Somebody took that back" in done.stdout


def test_the_last_of_its_role_has_nobody_to_hand_over_to(router: Router, drain: Drain) -> None:
    router.peers = 0
    done = drain("decode-0")
    assert (done.returncode, "No other worker can take over from decode-0" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("worker", "lost", "wait", "code", "said"),
    [
        ("decode-9", False, "1", 1, "this router knows decode-0"),
        ("decode-0", True, "1", 1, "decode-0 is gone"),
        ("decode-0", False, "nan", 2, "--wait is nan"),
        ("decode-0", False, "-1", 2, "--wait is -1"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    worker: str, lost: bool, wait: str, code: int, said: str, router: Router, drain: Drain
) -> None:
    router.lost = lost
    done = drain(worker, "--wait", wait)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not router.draining


def test_without_a_router_it_says_where_it_looked(baton: Baton) -> None:
    done = baton("drain", "decode-0", "--router", "127.0.0.1:1")
    assert (done.returncode, "no router answers at 127.0.0.1:1" in done.stderr) == (2, True)
