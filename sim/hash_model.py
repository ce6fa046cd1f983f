"""The model of the simulated world: its KV is readable, and its next token depends on every byte of it.

    key(i)   = token id (u32) and position (u32) of slot i
    value(i) = hash of seed-independent state: every key and value before i, and key(i), as attention would have it
    next     = hash(all keys and values, sampling seed, position) modulo the vocabulary

So a stale, missing, foreign or misplaced block changes all tokens after it, and what a request must answer is a pure
function of the request: `expected` computes it without any engine.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

from baton.core.request import FinishReason, Request

VOCABULARY = 97
EOS = 0
KEY_BYTES = VALUE_BYTES = 8


class Attention:
    """What a sequence's KV says so far: fed slot by slot, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def value(self, key: bytes) -> bytes:
        """The value (8 bytes) that a new slot with this key gets after everything read so far."""
        one = self._hash.copy()
        one.update(key)
        return one.digest()

    def read(self, key: bytes, value: bytes) -> None:
        self._hash.update(key + value)

    def next_token(self, seed: int, position: int) -> int:
        """The token at `position`, given the slots before it."""
        one = self._hash.copy()
        one.update(struct.pack("<QI", seed, position))
        return int.from_bytes(one.digest(), "little") % VOCABULARY


def key_of(token: int, position: int) -> bytes:
    """The token is stored plus one, so that a zeroed slot is not token 0 at position 0."""
    return struct.pack("<II", token + 1, position)


def stream(request: Request) -> Iterator[int]:
    """The tokens after the prompt, without end."""
    seen = Attention()

    def feed(token: int, position: int) -> None:
        key = key_of(token, position)
        seen.read(key, seen.value(key))

    for position, token in enumerate(request.prompt):
        feed(token, position)
    position = len(request.prompt)
    while True:
        token = seen.next_token(request.seed, position)
        yield token
        feed(token, position)
        position += 1


def expected(request: Request, max_model_len: int) -> tuple[tuple[int, ...], FinishReason]:
    """What a worker must answer to `request`, and how it must end, whatever happens to it on the way."""
    sampling = request.sampling
    limit = min(sampling.max_tokens, max_model_len - len(request.prompt))
    output: list[int] = []
    for token in stream(request):
        output.append(token)
        if token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos):
            return tuple(output), FinishReason.STOP
        if len(output) >= limit:
            return tuple(output), FinishReason.LENGTH
    raise AssertionError("the stream has no end")
