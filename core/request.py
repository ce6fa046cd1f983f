"""What a client asks for, in tokens. Text never gets this far: the router owns it.

Counts are tokens, ends are exclusive, durations are seconds left (never wall-clock times: clocks of two
hosts differ, what is left of a deadline does not).
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from array import array
from dataclasses import dataclass, field

from baton.core.errors import InvalidRequest

MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 300
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 8


class FinishReason(enum.StrEnum):
    """Why a request ended. STOP: a stop token or (router) stop string. LENGTH: max_tokens or the context's end."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose each token. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch that filter off.

    Order: logit_bias, repetition, frequency and presence penalty, temperature, top_k, top_p, min_p. Frequency and
    presence count output tokens only, repetition looks at prompt and output: where the prompt ends is part of a
    request's state. Log-probs are of the raw logits, before all of these.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time it is in the output."""
    presence_penalty: float = 0.0
    """Taken off a token's logit once if it is in the output."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    logprobs: int | None = None
    """None: not asked for. Else each token comes with its own log-prob and those of so many likeliest tokens."""

    @property
    def needs_history(self) -> bool:
        """Some penalty is on: the next token depends on which tokens came before."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)

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
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "must be between -2 and 2"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "must be between -2 and 2"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 10.0, "must be between 0.01 and 10"),
            (
                "logit_bias",
                len(self.logit_bias) <= MAX_LOGIT_BIASES
                and len({t for t, _ in self.logit_bias}) == len(self.logit_bias)
                and all(0 <= t < 2**31 and -100.0 <= bias <= 100.0 for t, bias in self.logit_bias),
                f"may name at most {MAX_LOGIT_BIASES} token ids, each once, with values between -100 and 100",
            ),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
                f"must be between 0 and {MAX_TOP_LOGPROBS}",
            ),
        ]
        for name, good, rule in rules:
            if not good:
                value = repr(getattr(self, name))
                raise InvalidRequest(f"{name} is {value[:77] + '...' * (len(value) > 77)}; it {rule}.", param=name)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of probabilities, from the raw logits."""

    logprob: float
    """Of the token that was chosen."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-prob) of the likeliest tokens, falling; of equals the lower id first."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None = None
    """Set if SamplingParams.logprobs is."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a request's parallel answers."""

    index: int
    """From 0; part of the sampler's counter."""
    delivered: tuple[int, ...] = ()
    """Output tokens the client already has: a worker that takes over replays prompt + delivered and goes on with
    index len(delivered)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and its answers."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choices: tuple[Choice, ...] = (Choice(0),)
    """Answers still to be generated, by rising index: those that have ended are left out of a later attempt."""
    tenant: str = ""
    deadline_s: float = 600.0
    """Seconds left when this message was sent."""
    session: str = ""
    """A client's word that requests belong together: their next one had better go where the last was decoded."""
    priority: int = 0
    """It goes as one so many classes below its tenant's (config.PRIORITIES), or as one of the lowest."""

    @property
    def shared(self) -> tuple[int, ...]:
        """Tokens that every choice begins with, computed once: the prompt, and of an only choice its delivered
        tokens."""
        return self.prompt + self.choices[0].delivered if len(self.choices) == 1 else self.prompt

    @property
    def seed(self) -> int:
        """Key of the counter-based sampler, 64 bits: the client's seed, else derived from the request id, so
        that a result does not depend on placement, batch or retry."""
        if self.sampling.seed is not None:
            return self.sampling.seed
        return int.from_bytes(hashlib.sha256(self.request_id.encode()).digest()[:8], "little")

    @property
    def asked(self) -> bytes:
        """Names the question, and who asked: equal for all attempts of a request, whoever sends them."""
        how = repr((self.tenant, self.seeded_sampling)).encode()
        return hashlib.sha256(len(how).to_bytes(8, "little") + how + array("Q", self.prompt).tobytes()).digest()

    @property
    def seeded_sampling(self) -> SamplingParams:
        """`sampling` with the seed that is used: under another request id, it would be another."""
        return dataclasses.replace(self.sampling, seed=self.seed)
