"""What the quantised formats of the host kernels mean, in numpy and with the kernels' own roundings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
GROUP, ROTATED = 32, 64


def as_bytes(x: Floats) -> Floats:
    """What is left of numbers along the last axis that share a scale as integers in [-127, 127]."""
    most = np.abs(x).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(most > 1e-35, np.float32(127) / most, 0).astype(np.float32)
    return np.asarray(np.rint(x * inverse) * (most / np.float32(127)), np.float32)


def rotated(x: Floats) -> Floats:
    """Each 64 values of a row times a Hadamard matrix; zeros after the last ones. Twice is 64 times the same."""
    n, k = x.shape
    y = np.zeros((n, -(-k // ROTATED) * ROTATED), np.float32)
    y[:, :k] = x
    for apart in (1, 2, 4, 8, 16, 32):
        pairs = y.reshape(n, -1, 2, apart)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(n, -1)
    return y


def int8_weights(w: Floats) -> Floats:
    """What int8 keeps of a matrix [n, k]."""
    return np.asarray(rotated(as_bytes(rotated(w)))[:, : w.shape[1]] / ROTATED, np.float32)
