"""The world's failures, one small tree, mapped once to gRPC and HTTP.

    BatonError
      InvalidRequest        the client must change something            400  INVALID_ARGUMENT
        NotSupported        a known feature that is not built yet       400  INVALID_ARGUMENT
      NotFound              no such model, request or worker            404  NOT_FOUND
      Overloaded            no credit, no queue place: come back later  429  RESOURCE_EXHAUSTED
        RateLimited         the tenant has used up its share            429  RESOURCE_EXHAUSTED
      DeadlineExceeded      a wait ended at its deadline                504  DEADLINE_EXCEEDED
      Cancelled             the client or its router went away          499  CANCELLED
        ResumedElsewhere    its client reads on over another stream     499  CANCELLED
      PeerLost              a worker or link died under a call          503  UNAVAILABLE
        RetryRoute          no prefill worker is left: choose again     503  UNAVAILABLE
        Forgotten           nothing to resume is known there            503  UNAVAILABLE
      Incompatible          two workers store or speak differently      503  FAILED_PRECONDITION
      IntegrityError        pulled bytes are not what was lent          500  DATA_LOSS
      InternalError         a bug; the message is for the log           500  INTERNAL
      RequestQuarantined    two workers crashed under this request      500  INTERNAL
      SetupError            this machine or configuration cannot start  (exit code 2)
        ConfigError         a setting is wrong
        NotWritable         what is made once and kept cannot be kept

Bugs are not here: they assert. A message says what, why, and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class BatonError(Exception):
    """Root of everything the world can do to us. `code` crosses the wire; the class is rebuilt from it."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    grpc_status: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, param: str | None = None) -> None:
        """`param` names the request field or setting at fault, where there is one."""
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(BatonError):
    code, http_status, grpc_status = "invalid_request", 400, "INVALID_ARGUMENT"


class NotSupported(InvalidRequest):
    code = "not_supported"


class NotFound(BatonError):
    code, http_status, grpc_status = "not_found", 404, "NOT_FOUND"


class Overloaded(BatonError):
    code, http_status, grpc_status = "overloaded", 429, "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, param: str | None = None, retry_after_s: float = 1.0) -> None:
        """`retry_after_s`: when to come back, as far as is known."""
        super().__init__(message, param)
        self.retry_after_s = retry_after_s


class RateLimited(Overloaded):
    code = "rate_limited"


class DeadlineExceeded(BatonError):
    code, http_status, grpc_status = "deadline_exceeded", 504, "DEADLINE_EXCEEDED"


class Cancelled(BatonError):
    code, http_status, grpc_status = "cancelled", 499, "CANCELLED"


class ResumedElsewhere(Cancelled):
    code = "resumed_elsewhere"


class PeerLost(BatonError):
    code, http_status, grpc_status = "peer_lost", 503, "UNAVAILABLE"


class RetryRoute(PeerLost):
    code = "retry_route"


class Forgotten(PeerLost):
    code = "forgotten"


class RequestQuarantined(BatonError):
    code, http_status, grpc_status = "request_quarantined", 500, "INTERNAL"


class Incompatible(BatonError):
    code, http_status, grpc_status = "incompatible", 503, "FAILED_PRECONDITION"


class IntegrityError(BatonError):
    code, http_status, grpc_status = "integrity", 500, "DATA_LOSS"


class InternalError(BatonError):
    code, http_status, grpc_status = "internal", 500, "INTERNAL"


class SetupError(BatonError):
    """Ends the command with exit code 2 and this one sentence."""

    code, http_status, grpc_status = "setup", 500, "FAILED_PRECONDITION"


class ConfigError(SetupError):
    code = "config"


class NotWritable(SetupError):
    code = "not_writable"


def _tree(root: type[BatonError]) -> dict[str, type[BatonError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def from_code(code: str, message: str, param: str | None = None) -> BatonError:
    """Rebuild an error that crossed the wire. An unknown code is an InternalError, never lost."""
    return BY_CODE.get(code, InternalError)(message, param)


BY_CODE: dict[str, type[BatonError]] = _tree(BatonError) | {"internal": InternalError}
