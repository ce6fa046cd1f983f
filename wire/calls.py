"""What both ends of a call share: limits, errors as statuses and back, and iterators that are really closed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from baton.core.errors import (
    BY_CODE,
    BatonError,
    DeadlineExceeded,
    Incompatible,
    InternalError,
    Overloaded,
    PeerLost,
    from_code,
)

CODE_KEY: Final = "baton-code"
PARAM_KEY: Final = "baton-param-bin"
RETRY_AFTER_KEY: Final = "retry-after"
"""Seconds, as in HTTP."""

MAX_MESSAGE_BYTES: Final = 64 << 20
"""Far above any real message: a snapshot of 1M blocks is 18 MB, a prompt of 8k tokens 24 kB."""
_MAX_DETAILS_BYTES: Final = 1500
"""A status travels in HTTP/2 trailers, percent-encoded (x3), and peers refuse trailers above 8 kB."""

_SHARED_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A backstop for hosts that vanish without a word; heartbeats on the stream notice much earlier.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CLIENT_OPTIONS: Final = (
    *_SHARED_OPTIONS,
    ("grpc.enable_http_proxy", 0),
    # Closing a channel closes its connection: no pool shared with other channels.
    ("grpc.use_local_subchannel_pool", 1),
    # The first is also the time-out of one connection attempt (gRPC's name for it misleads).
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
SERVER_OPTIONS: Final = (
    *_SHARED_OPTIONS,
    # Without this a second server takes the same port, and the kernel deals connections out to both.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
)


async def abort(context: Any, error: BatonError) -> None:
    """End a call on the server with `error`. Always raises (grpc.aio.AbortError)."""
    metadata: list[tuple[str, str | bytes]] = [(CODE_KEY, error.code)]
    if error.param is not None:
        metadata.append((PARAM_KEY, error.param.encode()[:200]))
    if isinstance(error, Overloaded):
        metadata.append((RETRY_AFTER_KEY, str(math.ceil(error.retry_after_s))))
    details = error.message.encode()[:_MAX_DETAILS_BYTES].decode(errors="ignore")
    await context.abort(grpc.StatusCode[error.grpc_status], details, tuple(metadata))


def error_of(status: grpc.aio.AioRpcError, peer: str) -> BatonError:
    """The error a call failed with. Every error a Baton server gives on purpose carries its code; what comes without
    one was made by gRPC, and nearly all of that means the peer or the link is gone."""
    metadata = dict(status.trailing_metadata() or ())
    details = status.details() or status.code().name
    code = metadata.get(CODE_KEY)
    if isinstance(code, str) and code in BY_CODE:
        param = metadata.get(PARAM_KEY)
        return from_code(code, details, param.decode(errors="replace") if isinstance(param, bytes) else None)
    match status.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"{peer} did not answer in time.")
        case grpc.StatusCode.UNIMPLEMENTED:
            return Incompatible(f"{peer} does not serve this call ({details}). Run the same Baton version everywhere.")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return InternalError(f"a message between us and {peer} was over {MAX_MESSAGE_BYTES} bytes: {details}")
        case other:
            return PeerLost(f"lost {peer}: {other.name}: {details}")


@asynccontextmanager
async def rebuilt_errors(peer: str) -> AsyncIterator[None]:
    """Around a call at a client: gRPC's exceptions leave as BatonErrors, our own cancellation as it is."""
    try:
        yield
    except grpc.aio.AioRpcError as e:
        raise error_of(e, peer) from None
    except grpc.aio.UsageError as e:
        raise PeerLost(f"the channel to {peer} is closed: {e}") from None
    except asyncio.CancelledError:
        # gRPC raises this also when the *call* was cancelled here, by closing its channel. Only ours may pass.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise PeerLost(f"the channel to {peer} was closed under the call.") from None


@asynccontextmanager
async def closing(messages: Any) -> AsyncIterator[Any]:
    """Like contextlib.aclosing, for iterators that may have nothing to close."""
    try:
        yield messages
    finally:
        aclose = getattr(messages, "aclose", None)
        if aclose is not None:
            await aclose()
