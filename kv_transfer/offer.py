"""Opens the transports a worker offers: handoff.transports, as far as this machine can.

The first entry of the result is the first preference; the adverts go into the capability document in this order.
"""

from __future__ import annotations

import logging
import sys

from baton.core.config import HandoffConfig
from baton.core.errors import SetupError
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.memory import KVMemory
from baton.kv_transfer.shm import open_shm
from baton.kv_transfer.tcp import open_tcp
from baton.kv_transfer.transport import Transport

log = logging.getLogger("baton.kv_transfer")

_OTHER_UCX = {"nixl": "ucxx", "ucx": "nixl_cu13"}
"""Transport -> the package that brings a second libucx into the process."""


async def open_transports(
    worker_id: str, boot_id: str, memory: KVMemory, leases: LeaseTable, config: HandoffConfig,
    announce: str | None = None,
) -> dict[str, Transport]:
    """By name, in order of preference. `announce` is the address peers use for tcp; default: handoff.data_bind.

    A transport whose package or kernel feature is missing here is left out with one log line, which is no fallback: the
    worker never offers it. Raises SetupError when nothing is left, or when handoff.data_bind cannot be used.
    """
    opened: dict[str, Transport] = {}
    try:
        for name in config.transports:
            try:
                opened[name] = await _open(name, worker_id, boot_id, memory, leases, config, announce)
            except (OSError, ImportError) as e:
                log.info("transport %s is not offered: %s", name, e)
        if not opened:
            raise SetupError(f"none of handoff.transports = {list(config.transports)} works on this machine. Add tcp.",
                             "handoff.transports")
    except BaseException:
        for transport in opened.values():
            await transport.close()
        raise
    return opened


async def _open(
    name: str, worker_id: str, boot_id: str, memory: KVMemory, leases: LeaseTable, config: HandoffConfig,
    announce: str | None,
) -> Transport:
    other = _OTHER_UCX.get(name)
    if other in sys.modules:
        raise SetupError(
            f"handoff.transports = {list(config.transports)} asks for {name} in a process that has loaded {other}. "
            "Each brings a UCX library of its own: keep one of nixl and ucx.", "handoff.transports"
        )
    if name == "tcp":
        return await open_tcp(memory, leases.may_read, config, leases.metrics, announce)
    if name == "shm":
        return await open_shm(memory, leases.may_read, config)
    # Imported here: the package is an extra, and without it this transport is simply not there.
    if name == "ucx":
        from baton.kv_transfer.ucx import open_ucx

        return await open_ucx(memory, leases.may_read, config, leases.metrics, announce)
    if name == "nccl":
        from baton.kv_transfer.nccl import open_nccl

        return await open_nccl(memory, leases.may_read, config, leases.metrics, announce)
    from baton.kv_transfer.nixl import NixlTransport

    return await NixlTransport.open(f"{worker_id}:{boot_id}", memory, lambda: leases.num_live > 0)
