"""The 4-bit tensors of a GGUF file as nibbles, scales and minimums, as they lie in it: nothing is expanded and rounded
again. Formats as ggml defines them (block_q4_0, block_q4_1, block_q4_K in ggml-common.h)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from baton.models.checkpoint import Int4
from baton.models.weights import Array

GROUP = 32
Bytes = NDArray[np.uint8]
Parts = tuple[Bytes, Array, Array]


def unpack(type_name: str, data: Bytes, shape: tuple[int, int]) -> Int4 | None:
    """`data` is the tensor's bytes, [n, bytes of a row]; None if the type is not one of 4 bits."""
    reader = _READERS.get(type_name)
    if reader is None:
        return None
    n, k = shape
    block_bytes, block_size, parts_of = reader
    blocks = np.ascontiguousarray(data).reshape(n * k // block_size, block_bytes)
    nibbles, scale, minimum = parts_of(blocks)
    return Int4(nibbles.reshape(n, k), scale.reshape(n, k // GROUP), minimum.reshape(n, k // GROUP))


def _halves(block: Bytes) -> Array:
    """[blocks, 2 * m] bytes -> [blocks, m] fp16 numbers, as fp32."""
    return np.ascontiguousarray(block).view(np.float16).astype(np.float32)


def _low_then_high(packed: Bytes) -> Bytes:
    """Low halves of all bytes along the last axis, then high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _q4_0(blocks: Bytes) -> Parts:
    scale = _halves(blocks[:, :2])
    return _low_then_high(blocks[:, 2:]), scale, 8 * scale


def _q4_1(blocks: Bytes) -> Parts:
    scale, offset = _halves(blocks[:, :2]), _halves(blocks[:, 2:4])
    return _low_then_high(blocks[:, 4:]), scale, -offset


def _q4_k(blocks: Bytes) -> Parts:
    """256 values: two fp16, then eight 6-bit scales and eight 6-bit minimums in 12 bytes, then four runs of 64."""
    outer, packed = _halves(blocks[:, :4]), blocks[:, 4:16]
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minimums = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=1)
    nibbles = _low_then_high(blocks[:, 16:].reshape(-1, 4, 32))
    return nibbles, outer[:, :1] * scales, outer[:, 1:] * minimums


_READERS: dict[str, tuple[int, int, Callable[[Bytes], Parts]]] = {
    "Q4_0": (18, 32, _q4_0), "Q4_1": (20, 32, _q4_1), "Q4_K": (144, 256, _q4_k),
}
"""Type -> (bytes of a block, values in it, reader)."""
