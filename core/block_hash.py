"""The block hash: one definition for router and engine. Published vectors: docs/block-hash.md.

    root     = H(version, model fingerprint, KV dtype, numerics class, tenant salt, adapter), each length-prefixed
    hash[i]  = H(hash[i-1] or root, block_size token ids as u32 little-endian)

H is sha256, first 16 bytes. A hash names a block *and everything before it*, so that a flat set of hashes is an
exact prefix index. Only full blocks have one.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from baton.core.layout import HASH_VERSION, Capability

BlockHash = NewType("BlockHash", bytes)

HASH_BYTES = 16
FLEET_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class HashScope:
    """Everything that makes equal tokens have different KV. Two requests share blocks only in one scope."""

    model_fingerprint: str
    kv_dtype: str
    numerics: str
    tenant_salt: str = ""
    adapter: str = ""
    version: int = HASH_VERSION

    @classmethod
    def of(cls, capability: Capability, tenant_salt: str = "", adapter: str = "") -> HashScope:
        return cls(
            capability.model_fingerprint,
            capability.layout.dtype,
            capability.numerics,
            tenant_salt,
            adapter,
            capability.hash_version,
        )

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a scope is a value, and clients may choose their tenant
    def root(self) -> BlockHash:
        """Length prefixes (u32 little-endian, bytes) keep ("ab", "c") and ("a", "bc") apart."""
        h = hashlib.sha256()
        fields = (
            str(self.version),
            self.model_fingerprint,
            self.kv_dtype,
            self.numerics,
            self.tenant_salt,
            self.adapter,
        )
        for text in fields:
            raw = text.encode()
            h.update(struct.pack("<I", len(raw)))
            h.update(raw)
        return BlockHash(h.digest()[:HASH_BYTES])


def extend(parent: BlockHash, tokens: Sequence[int], block_size: int) -> list[BlockHash]:
    """Hashes of the full blocks in `tokens`, chained on `parent`. The tail that fills no block has none."""
    hashes = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = struct.pack(f"<{block_size}I", *tokens[start : start + block_size])
        parent = BlockHash(hashlib.sha256(parent + block).digest()[:HASH_BYTES])
        hashes.append(parent)
    return hashes


def block_hashes(scope: HashScope, tokens: Sequence[int], block_size: int = FLEET_BLOCK_TOKENS) -> list[BlockHash]:
    """Hashes of every full block of a sequence that starts at token 0."""
    return extend(scope.root(), tokens, block_size)
