"""How KV blocks lie in memory, and what a worker says of itself so that only fitting pairs are made.

A block is one contiguous piece of bytes, `[layer, kv_head, K|V]` runs of `[token, dim]`: one descriptor for a transfer,
and a head slice is one run per layer. An int8 run ends with `[token]` fp32 scales (value = element * scale): one per
token and head, inside the block, so that a token's bytes do not depend on the chunk it came in.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

DTYPE_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "u64": 8}
SCALE_BYTES: Final = {"int8": 4}
"""Of the scale that each token of a run has, for those types that have one."""
PROTOCOL_VERSION: Final = 2
HANDOFF_VERSION: Final = 2
CONVERTIBLE: Final = ("fp32", "bf16", "int8")
"""Element types of KV that a reader turns into each other (kv_transfer/landing.py)."""
CONVERT_KV: Final = "convert_kv"
"""The feature of a worker that pairs with those of another of these types. Without it they are no peers: what is
computed from converted KV is not what one worker alone would compute."""
FEATURES: Final = ("cached_lend", "choices", "layers", "logprobs", "penalties", "take_over")
HASH_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and element type of one block. `block_size` is tokens per block."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[layer, kv_head, K|V, token, dim], without scales."""
        return (self.num_layers, self.num_kv_heads, 2, self.block_size, self.head_dim)

    @property
    def run_bytes(self) -> int:
        """Of the keys, or the values, of one layer and kv head in one block, scales included."""
        return self.block_size * (self.head_dim * DTYPE_BYTES[self.dtype] + SCALE_BYTES.get(self.dtype, 0))

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.num_kv_heads * 2 * self.run_bytes

    def part_of(self, first_layer: int, end_layer: int) -> tuple[int, int]:
        """The byte range of these layers within a block."""
        layer_bytes = self.block_bytes // self.num_layers
        return first_layer * layer_bytes, end_layer * layer_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Capability:
    """What a worker can do and how it stores KV. Published at registration; the router pairs only what fits."""

    model: str
    model_fingerprint: str
    layout: KVLayout
    max_model_len: int
    num_blocks: int
    eos_token_ids: tuple[int, ...] = ()
    numerics: str = "torch-fp32"
    hash_version: int = HASH_VERSION
    protocol_versions: tuple[int, ...] = (PROTOCOL_VERSION,)
    """Of the messages it speaks."""
    handoff_versions: tuple[int, ...] = (HANDOFF_VERSION,)
    """Of the hand-off state it writes (the last) and reads (all)."""
    features: tuple[str, ...] = FEATURES
    """What it can do beyond the protocol's base."""
    transports: tuple[tuple[str, bytes], ...] = ()
    """(name, advert) in order of preference; the advert is opaque to all but that transport."""

    def advert(self, name: str) -> bytes | None:
        return dict(self.transports).get(name)


_MUST_MATCH = ("model_fingerprint", "numerics", "hash_version")
_MUST_MATCH_IN_ANY_ORDER = ("eos_token_ids", "features")


def difference(a: Capability, b: Capability) -> str | None:
    """The first field that keeps a pair apart, as 'name: a's value vs b's value', or None when they fit: then either
    may lend to the other. Says the same of (b, a)."""
    for name in _MUST_MATCH:
        if getattr(a, name) != getattr(b, name):
            return f"{name}: {getattr(a, name)} vs {getattr(b, name)}"
    for name in _MUST_MATCH_IN_ANY_ORDER:
        if set(getattr(a, name)) != set(getattr(b, name)):
            return f"{name}: {list(getattr(a, name))} vs {list(getattr(b, name))}"
    for f in dataclasses.fields(KVLayout):
        mine, theirs = getattr(a.layout, f.name), getattr(b.layout, f.name)
        if mine != theirs and not (f.name == "dtype" and CONVERT_KV in a.features and _convertible(a, b)):
            hint = " (handoff.convert_kv lets them pair)" if f.name == "dtype" and _convertible(a, b) else ""
            return f"layout.{f.name}: {mine} vs {theirs}{hint}"
    if not (_reads_all_of(a, b) and _reads_all_of(b, a)):
        return f"handoff_versions: {list(a.handoff_versions)} vs {list(b.handoff_versions)} (each must read the last)"
    names = [tuple(name for name, _ in c.transports) for c in (a, b)]
    for what, (ours, others) in (
        ("protocol_versions", (a.protocol_versions, b.protocol_versions)), ("transports", names)
    ):
        if not set(ours) & set(others):
            return f"{what}: {list(ours)} vs {list(others)} (none in common)"
    return None


def stored_alike(a: Capability, b: Capability) -> bool:
    """Of two that fit: KV moves between them as it is. Else its reader converts it, and the answer is no longer, bit
    for bit, what one worker alone would give."""
    return a.layout.dtype == b.layout.dtype


def _convertible(a: Capability, b: Capability) -> bool:
    return {a.layout.dtype, b.layout.dtype} <= set(CONVERTIBLE)


def _reads_all_of(reader: Capability, writer: Capability) -> bool:
    return bool(writer.handoff_versions) and writer.handoff_versions[-1] in reader.handoff_versions
