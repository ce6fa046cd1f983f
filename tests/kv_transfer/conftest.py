"""Every transport, for the tests of what all of them promise."""

from __future__ import annotations

import os

import pytest

ALONE = os.environ.get("BATON_TEST_TRANSPORT")
"""Set by tests that run this file in a process of its own for one transport."""
TRANSPORTS = [ALONE] if ALONE else [
    "tcp", "shm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nixl", "nixl/tcp", "nccl"))
]


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """nixl moves bytes with process_vm_readv on one machine; nixl/tcp makes UCX use sockets as between machines. ucx is
    in test_ucx.py: its processes must not have loaded NIXL."""
    name = str(request.param)
    if name == "nccl":
        pytest.importorskip("baton.kv_transfer.nccl")
    if name.startswith("nixl"):
        pytest.importorskip("nixl_cu13")
        monkeypatch.setenv("NIXL_LOG_LEVEL", "ERROR")
    if name == "nixl/tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return name.partition("/")[0]
