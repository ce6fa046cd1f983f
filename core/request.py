"""What a client asks for, in tokens. Text never gets this far: the router owns it.

Counts are tokens, ends are exclusive, durations are seconds left (never wall-clock times: clocks of two
hosts differ, what is left of a deadline does not).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field

from baton.core.errors import InvalidRequest

MAX_STOP_TOKEN_IDS = 64


class FinishReason(enum.StrEnum):
    """Why a request ended. STOP: a stop token or (router) stop string. LENGTH: max_tokens or the context's end."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose each token. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch that filter off.

    Filters apply in the order temperature, top_k, top_p, min_p, as the field does.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def check(self) -> None:
        """Raise InvalidRequest naming the first field out of range. NaN fails every comparison below."""
        rules = [
            ("max_tokens", 1 <= self.max_tokens < 2**31, "must be at least 1 and below 2^31"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "must be between 0 and 100"),
            ("top_k", 0 <= self.top_k < 2**31, "must be 0 (off) or a positive count"),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "must be between 0 and 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "must be an unsigned 64-bit number"),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
                f"may hold at most {MAX_STOP_TOKEN_IDS} ids",
            ),
        ]
        for name, good, rule in rules:
            if not good:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it {rule}.", param=name)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. `delivered` are output tokens the client already has: a worker that takes over replays
    prompt + delivered and goes on with index len(delivered)."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    delivered: tuple[int, ...] = ()
    tenant: str = ""
    deadline_s: float = 600.0
    """Seconds left when this message was sent."""

    @property
    def seed(self) -> int:
        """Key of the counter-based sampler, 64 bits: the client's seed, else derived from the request id, so
        that a result does not depend on placement, batch or retry."""
        if self.sampling.seed is not None:
            return self.sampling.seed
        return int.from_bytes(hashlib.sha256(self.request_id.encode()).digest()[:8], "little")
