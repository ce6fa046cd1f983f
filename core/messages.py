"""What travels on the one long-lived stream between a router and a worker. Plain values: wire/ turns them into
protobuf, the simulator carries them as they are.

Up: Hello, then Submit, Resume and Cancel. Down: one StepMessage per engine step with the tokens of all requests, KV
events and load; between steps a StepMessage without tokens is the heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.block_hash import BlockHash
from baton.core.request import FinishReason, Request, TokenLogprob
from baton.core.worker import Ledger, Route, Span, WorkerInfo, WorkerLoad


@dataclass(frozen=True, slots=True)
class Resume:
    """Say the rest of a request, under a new epoch: its stream, or its router, was lost. Answered by chunks of what is
    known from the next indexes on, then by all that follows; Forgotten if some of it is not known here."""

    request_id: str
    epoch: int
    """As in Submit: names the attempt from now on. Of an attempt whose stream came back, the one that it has."""
    asked: bytes
    """Request.asked. Whoever does not know the whole question, or is another tenant, gets none of the answer."""
    next_indexes: tuple[tuple[int, int], ...]
    """(choice, output tokens that the router has), for each choice that it waits for."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a stream; the worker answers with a StepMessage whose `snapshot` is set."""

    router_id: str
    running: tuple[Resume, ...] = ()
    """Attempts of an earlier stream that this router still waits for. What else it left at this worker ends."""


@dataclass(frozen=True, slots=True)
class TakeFrom:
    """The request runs on `worker` as attempt `epoch` of the same router: take it over, KV and all."""

    worker: WorkerInfo
    epoch: int


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request
    route: Route
    epoch: int
    """Names this attempt. Everything a worker says about it carries the epoch; the router drops what an older attempt
    says."""
    take_from: TakeFrom | None = None
    """Set: no prefill. If the take-over fails, the attempt ends with an error and the request runs on at the source."""
    crashes_left: int = 2
    """Lenders that may still break under this request before it is handed back: it may be what breaks them."""


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    epoch: int
    reason: str = "the client went away"


UpMessage = Hello | Submit | Resume | Cancel


@dataclass(slots=True)
class TokenChunk:
    """News of one choice of a request. (request_id, epoch, choice, first_index) makes delivery exact: duplicates and
    stale epochs are dropped, a gap is an error.

    Nobody changes one. It is not frozen because there is one for every token, and frozen ones take four times as long
    to make (2.8 against 0.7 us)."""

    request_id: str
    epoch: int
    first_index: int
    token_ids: tuple[int, ...] = ()
    finish: FinishReason | None = None
    """Of this choice; ERROR and CANCELLED end all choices of the attempt."""
    choice: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    """Aligned with token_ids if the request asks for them, else empty."""
    lost_lenders: tuple[str, ...] = ()
    """boot_ids of workers whose connection broke while they worked for this attempt. With ERROR."""
    error_code: str = ""
    """With finish=ERROR: the BatonError's code, and its message below."""
    error_message: str = ""
    cached_tokens: int = 0
    """Prompt tokens not computed for this request. With the first chunk and the last."""
    spans: tuple[Span, ...] = ()
    """The worker's part of the waterfall, with the last chunk."""


@dataclass(frozen=True, slots=True)
class KVEvents:
    """A change of a worker's prefix map. `seq` counts from 1 per boot without gaps; a reader that misses one
    reconnects and takes the snapshot."""

    seq: int
    stored: tuple[BlockHash, ...] = ()
    removed: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class KVSnapshot:
    """The whole prefix map as of event `seq`."""

    seq: int
    hashes: tuple[BlockHash, ...]


@dataclass(slots=True)
class StepMessage:
    """Not frozen for the same reason as TokenChunk, nor is what each of them carries."""

    boot_id: str
    load: WorkerLoad
    chunks: tuple[TokenChunk, ...] = ()
    kv_events: tuple[KVEvents, ...] = ()
    snapshot: KVSnapshot | None = None
    ledger: Ledger | None = None
    """Every heartbeat_s, with whatever message is due then."""
    pair_bandwidth: tuple[tuple[str, str, float], ...] = ()
    """(peer worker_id, transport chosen, measured bytes/s) for each peer this worker has pulled from. With the ledger
    only: there is a message for every step, and these are as many as the fleet has workers."""
    taken: tuple[int, ...] = ()
    """Epochs of this router's attempts whose work here `load` covers from now on: it shows it, or it is over."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Answer of a worker's `status` call."""

    info: WorkerInfo
    load: WorkerLoad
    ledger: Ledger
    counters: tuple[tuple[str, float], ...]
    """Rendered samples 'name{label="value"}', from core/metrics.py."""
