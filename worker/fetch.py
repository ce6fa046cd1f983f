"""Pull a prompt's cached prefix from whoever holds it, into our own prefix map. It only warms the cache: whoever wanted
it finds it there like any other prefix, and if it fails nothing is lost but the time.
"""

from __future__ import annotations

import asyncio
import logging

from baton.core.errors import BatonError
from baton.core.handoff import LendMode, PrefillCall
from baton.core.request import Request
from baton.core.sequence import new_sequence
from baton.core.worker import WorkerInfo
from baton.worker.arrival import Arrival
from baton.worker.handoff import Handoff, Silent
from baton.worker.parts import WorkerParts

log = logging.getLogger(__name__)


async def fetch_prefix(parts: WorkerParts, request: Request, epoch: int, holder: WorkerInfo) -> None:
    """Afterwards our cache has what the holder's had, or less; failures are counted, never raised. Bounded by
    handoff.pull_timeout_s."""
    seq = new_sequence(request, epoch, parts.pool.block_size, max_output_tokens=1)
    arrival = Arrival(parts, seq)
    try:
        arrival.reserve()
        ttl_s = parts.handoff.lease_ttl_s
        call = PrefillCall(request, epoch, parts.worker_id, arrival.num_held, ttl_s, LendMode.CACHED)
        async with asyncio.timeout(parts.handoff.pull_timeout_s):
            handoff = Handoff(parts, holder, call, arrival, Silent())
            await handoff.run()
            await handoff.release()
        arrival.publish()
    except TimeoutError:
        parts.metrics.inc("baton_fallbacks_total", kind="fetch_timeout")
        log.warning("the prefix that %s holds did not come in time: it is computed here", holder.worker_id)
    except BatonError as e:
        parts.metrics.inc("baton_fallbacks_total", kind=f"fetch_{e.code}")
        log.warning("the prefix that %s holds is computed here instead: %s", holder.worker_id, e.message)
    finally:
        arrival.give_back()
