"""Late bytes: is a block that was given to a new owner ever written to by the transfer it was taken from?

    python -m baton.bench.freeze --transport tcp --transport shm [--runs 5]

One run, with a lender in another process:
    1. pull; with its first bytes in, the lender is stopped (SIGSTOP, and the kernel says T); a second pull is started
    2. what needs the lender times out, its blocks go into quarantine, the timer fences the peer, the blocks return
    3. all blocks get a new owner, who fills them with a pattern
    4. the lender wakes up, does what it had in hand, and serves a pull over a new connection
    5. bytes that differ from the pattern are late bytes: there must be none

Exits with 1 if there was a late byte, or if a freeze missed its transfer in every one of three tries.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from dataclasses import dataclass

from baton.bench.kv_pair import Lender, Reader, lender, reader, until
from baton.core.config import child_env
from baton.core.errors import BatonError, DeadlineExceeded
from baton.core.handoff import LentBlock

BLOCK_BYTES = 1 << 20
FIRST_BLOCKS, SECOND_BLOCKS = 64, 32
NUM_BLOCKS = FIRST_BLOCKS + SECOND_BLOCKS
PATTERN = 0xA5
TRIES = 3
SETTINGS = {"pull_timeout_s": 1.0, "quarantine_poll_s": 0.02, "quarantine_max_s": 0.2, "quarantine_cap": 1.0}
TRANSPORTS = ("tcp", "shm", "nixl", "ucx", "nccl")


@dataclass(frozen=True, slots=True)
class Freeze:
    """What one run saw."""

    landed: int
    """Blocks with bytes in them when the lender stood still, of NUM_BLOCKS."""
    timed_out: int
    """Pulls, of two. None where the reader copies by itself and the lender had granted it."""
    fences: int
    late_bytes: int
    lender_lived: bool

    @property
    def missed(self) -> bool:
        """Nothing was on its way when the lender was stopped."""
        return not 0 < self.landed < NUM_BLOCKS


async def freeze(transport: str, there: Lender) -> Freeze:
    """One run with a lender of NUM_BLOCKS blocks of BLOCK_BYTES, which it leaves awake."""
    async with reader((transport,), num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, **SETTINGS) as r:
        lease, blocks = there.lend(NUM_BLOCKS)
        await r.puller.connect(there.info)
        mine = r.take(NUM_BLOCKS)
        landed, timed_out = await _pull_and_freeze(r, there, lease, blocks, mine)
        r.pool.release(mine)
        held = r.puller.quarantined_blocks()
        assert r.pool.ledger().quarantined == len(held), f"{held} are quarantined, {r.pool.ledger()}"
        await until(lambda: not r.puller.quarantined_blocks())
        reused = r.take(NUM_BLOCKS)
        for block in reused:
            r.memory.block(block)[:] = bytes([PATTERN]) * BLOCK_BYTES
        there.thaw()
        lived = there.answers() and await _pull_anew(r, there, lease, blocks[0], reused.pop())
        late = sum(BLOCK_BYTES - bytes(r.memory.block(b)).count(PATTERN) for b in reused)
        return Freeze(landed, timed_out, int(r.metrics.value("baton_fences_total")), late, lived and there.answers())


async def _pull_and_freeze(
    r: Reader, there: Lender, lease: str, blocks: list[LentBlock], mine: list[int]
) -> tuple[int, int]:
    """(blocks that had begun to fill when the lender stood still, pulls that timed out)."""
    first = asyncio.create_task(r.puller.pull(there.info, lease, blocks[:FIRST_BLOCKS], mine[:FIRST_BLOCKS]))
    await until(lambda: r.arrived(mine) > 0 or first.done())
    there.freeze()
    landed = r.arrived(mine)
    second = asyncio.create_task(r.puller.pull(there.info, lease, blocks[FIRST_BLOCKS:], mine[FIRST_BLOCKS:]))
    ends = await asyncio.gather(first, second, return_exceptions=True)
    return landed, sum(isinstance(e, DeadlineExceeded) for e in ends)


async def _pull_anew(r: Reader, there: Lender, lease: str, lent: LentBlock, block: int) -> bool:
    """On a new connection, so that the lender has had every chance to send what was pending. False: it is gone."""
    try:
        await r.puller.pull(there.info, lease, [lent], [block])
    except BatonError:
        return False
    return True


def freeze_once(transport: str) -> Freeze:
    """Tries again with a new lender when the freeze missed."""
    for _ in range(TRIES):
        with lender((transport,), num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES) as there:
            seen = asyncio.run(freeze(transport, there))
        if not seen.missed:
            break
    return seen


def _run_all(transport: str, runs: int) -> bool:
    """Whether it is as it must be."""
    good = True
    for run in range(1, runs + 1):
        seen = freeze_once(transport)
        good = good and not seen.missed and seen.late_bytes == 0
        print(f"{transport:5} run {run}: {seen.landed} of {NUM_BLOCKS} blocks had begun, {seen.timed_out} of 2 pulls "
              f"timed out, {seen.fences} fences, late bytes {seen.late_bytes}"
              + ("" if seen.lender_lived else ", LENDER DIED") + (", MISSED" if seen.missed else ""), flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", action="append", choices=TRANSPORTS, required=True)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if len(options.transport) == 1:
        return 0 if _run_all(options.transport[0], options.runs) else 1
    # One process each: nixl and ucx cannot share one.
    codes = [
        subprocess.run(
            [sys.executable, "-m", "baton.bench.freeze", "--transport", name, "--runs", str(options.runs)],
            env=child_env(1), check=False,
        ).returncode
        for name in options.transport
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
