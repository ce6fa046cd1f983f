"""Names the bytes of a block, so that a pulled block is either what was lent or thrown away.

Owns the choice of hash (xxh3_128). It guards against stale, torn and foreign bytes, not against an attacker.
"""

from __future__ import annotations

import xxhash

DIGEST_BYTES = 16

Readable = bytes | bytearray | memoryview


def digest(data: Readable) -> bytes:
    """xxh3_128 of a whole block's bytes, big-endian, 16 bytes."""
    return xxhash.xxh3_128(data).digest()
