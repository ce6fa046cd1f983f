"""What bench/kv_pair.py has, and what only tests do with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from baton.bench.kv_pair import Lender, Reader, info_of, lender, reader, until

__all__ = ["Lender", "Reader", "info_of", "kill_a_reader", "lender", "reader", "until"]


def kill_a_reader(there: Lender, transport: str, count: int, block_bytes: int) -> str:
    """Start a reader that pulls `count` blocks for ever, and kill it in its second round. Returns the lease id."""
    lent = there.ask("lend", count=count)
    adverts = [(name, advert.decode()) for name, advert in there.info.capability.transports]
    options = {**lent, "transport": transport, "adverts": adverts, "num_blocks": count, "block_bytes": block_bytes}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kv_transfer.reader_main", json.dumps(options)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert any(line == "PULLED\n" for line in process.stdout), "the reader ended by itself"
        process.kill()
    lease_id: str = lent["lease_id"]
    return lease_id
