"""A model without weights, whose KV is readable and whose next token depends on every byte of it. For tests of all
that moves KV: the simulator and real processes serve it, and its right answer is known without any engine.

Two layers, one KV head; a key or value is `head_dim` u64:

    layer 0   key(i) = token and position of slot i         value(i) = H(all keys and values before i, key(i))
    layer 1   key(i) = H(value of layer 0 in slot i)        value(i) = H(all keys and values before i, key(i))
    state     H(all keys and values of both layers)
    next      H(state, seed, choice, position, logit_bias, and if penalties are on: counts of prompt and output)
    log-prob  of a token: a softmax over H(state, token)

So a stale, missing, foreign or misplaced block, or a layer of one, changes all tokens after it; and so do a wrong
seed, choice or position, and a border between prompt and output that was counted wrongly. What a request must answer
is a pure function of the request: `expected`. H is xxh3_128; nobody here is hostile.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from baton.core.layout import KVLayout
from baton.core.request import Choice, FinishReason, Request, SampledToken, SamplingParams, TokenLogprob

VOCABULARY = 97
"""The tokens it says are 0 to 96; it reads any (models/hash_files.py gives the others their meaning)."""
EOS = 0
NUM_LAYERS = 2
ELEMENT_BYTES = 8
LOGIT_RANGE = 8.0
NUMERICS = "hash"


def layout(block_size: int, head_dim: int = 1) -> KVLayout:
    return KVLayout(NUM_LAYERS, 1, head_dim, block_size, "u64")


def _hash(*parts: bytes) -> bytes:
    """16 bytes. Only the last part may vary in length."""
    return bytes(xxhash.xxh3_128_digest(b"".join(parts)))


def _stretched(entry: bytes, head_dim: int) -> bytes:
    """`entry` [8 bytes], then as much as head_dim asks for that depends on all of it."""
    if head_dim == 1:
        return entry
    return entry + hashlib.shake_128(entry).digest((head_dim - 1) * ELEMENT_BYTES)


def key_of(token: int, position: int, head_dim: int = 1) -> bytes:
    """Layer 0. The token is stored plus one, so that a zeroed slot is not token 0 at position 0."""
    return _stretched(struct.pack("<II", token + 1, position), head_dim)


def upper_key(value: bytes, head_dim: int = 1) -> bytes:
    """Layer 1's key of the slot that has this value in layer 0."""
    return _stretched(_hash(b"upper", value)[:ELEMENT_BYTES], head_dim)


class LayerAttention:
    """What one layer's KV of a sequence says so far: fed in the order of the slots, however many at a time."""

    def __init__(self, head_dim: int = 1) -> None:
        self._head_dim = head_dim
        self._keys = xxhash.xxh3_128()
        self._values = xxhash.xxh3_128()

    def read(self, keys: bytes | memoryview, values: bytes | memoryview) -> None:
        """The next slots' keys and values, as many of each."""
        self._keys.update(keys)
        self._values.update(values)

    def value(self, key: bytes) -> bytes:
        """The value that the next slot gets if it has this key."""
        return _stretched(_hash(self.state, key)[:ELEMENT_BYTES], self._head_dim)

    @property
    def state(self) -> bytes:
        """Of all slots read so far, 32 bytes."""
        return bytes(self._keys.digest() + self._values.digest())


@dataclass(frozen=True, slots=True)
class Draw:
    """All that decides about one token besides the KV."""

    sampling: SamplingParams
    seed: int
    choice: int
    position: int
    """Of the token to be sampled, in its sequence."""
    history: Sequence[int]
    """Prompt and output, if sampling.needs_history."""
    num_prompt_tokens: int


def sample(state: bytes, draw: Draw) -> SampledToken:
    """`state` of both layers, lower first."""
    sampling = draw.sampling
    key = struct.pack("<QIQ", draw.seed, draw.choice, draw.position)
    digest = _hash(state, key, repr((sorted(sampling.logit_bias), _counted(draw))).encode())
    token = int.from_bytes(digest[:8], "little") % VOCABULARY
    return SampledToken(token, None if sampling.logprobs is None else _logprob(state, token, sampling.logprobs))


def _counted(draw: Draw) -> object:
    """What penalties know of the tokens before: how often each came, in the prompt and in the output."""
    if not draw.sampling.needs_history:
        return None
    border, s = draw.num_prompt_tokens, draw.sampling
    counts = [sorted(Counter(part).items()) for part in (draw.history[:border], draw.history[border:])]
    return (s.frequency_penalty, s.presence_penalty, s.repetition_penalty, counts)


def _logprob(state: bytes, token: int, num_top: int) -> TokenLogprob:
    def logit(t: int) -> float:
        return int.from_bytes(_hash(state, struct.pack("<I", t))[:4], "little") * (LOGIT_RANGE / 2**32)

    logits = [logit(t) for t in range(VOCABULARY)]
    total = math.log(math.fsum(map(math.exp, logits)))
    likeliest = sorted(range(VOCABULARY), key=lambda t: (-logits[t], t))[:num_top]
    return TokenLogprob(_fp32(logits[token] - total), tuple((t, _fp32(logits[t] - total)) for t in likeliest))


def _fp32(x: float) -> float:
    """Rounded as it is on the wire, so that equal can mean equal."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


# ---- the right answer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What one choice of a request must be, from its first token on, whatever happens to it on the way."""

    index: int
    tokens: tuple[SampledToken, ...]
    finish: FinishReason

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(t.token_id for t in self.tokens)


def expected(request: Request, max_model_len: int, head_dim: int = 1) -> tuple[Answer, ...]:
    """One answer per choice of the request, in their order; `delivered` is not looked at: it is part of the answer."""
    return tuple(_answer(request, choice, max_model_len, head_dim) for choice in request.choices)


def _answer(request: Request, choice: Choice, max_model_len: int, head_dim: int) -> Answer:
    sampling = request.sampling
    limit = min(sampling.max_tokens, max_model_len - len(request.prompt))
    output: list[SampledToken] = []
    for token in stream(request, choice.index, head_dim):
        output.append(token)
        if token.token_id in sampling.stop_token_ids or (token.token_id == EOS and not sampling.ignore_eos):
            return Answer(choice.index, tuple(output), FinishReason.STOP)
        if len(output) >= limit:
            return Answer(choice.index, tuple(output), FinishReason.LENGTH)
    raise AssertionError("the stream has no end")


def stream(request: Request, choice: int = 0, head_dim: int = 1) -> Iterator[SampledToken]:
    """The tokens after the prompt, without end."""
    lower, upper = LayerAttention(head_dim), LayerAttention(head_dim)
    tokens: list[int] = []

    def feed(token: int) -> None:
        key = key_of(token, len(tokens), head_dim)
        value = lower.value(key)
        lower.read(key, value)
        key = upper_key(value, head_dim)
        upper.read(key, upper.value(key))
        tokens.append(token)

    for token in request.prompt:
        feed(token)
    while True:
        draw = Draw(request.sampling, request.seed, choice, len(tokens), tokens, len(request.prompt))
        sampled = sample(lower.state + upper.state, draw)
        yield sampled
        feed(sampled.token_id)
