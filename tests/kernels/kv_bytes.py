"""What the bytes of K and V runs are, said in numpy: what the kernels and converted hand-offs are compared with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
BLOCK_SIZE = 16


def stored(values: Floats, dtype: str) -> Bytes:
    """[num_runs, run bytes]: runs [token, dim] of `values` [num_runs, token, dim] as their definition has them."""
    if dtype == "fp32":
        return values.view(np.uint8).reshape(len(values), -1)
    if dtype == "bf16":
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint8).reshape(len(values), -1)
    most = np.abs(values).max(axis=2)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 1e-30)
    elements = np.rint(values * inverse[..., None]).astype(np.int8).view(np.uint8).reshape(len(values), -1)
    return np.concatenate([elements, (most / np.float32(127)).view(np.uint8).reshape(len(values), -1)], axis=1)


def read(runs: Bytes, dtype: str, head_dim: int) -> Floats:
    """What was stored."""
    shape = (len(runs), BLOCK_SIZE, head_dim)
    if dtype == "fp32":
        return runs.reshape(-1).view(np.float32).reshape(shape)
    if dtype == "bf16":
        return (runs.reshape(-1).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    elements = runs[:, : BLOCK_SIZE * head_dim].copy().view(np.int8).reshape(shape)
    scales = runs[:, BLOCK_SIZE * head_dim :].copy().view(np.float32).reshape(*shape[:2], 1)
    return elements.astype(np.float32) * scales


def run_bytes(dtype: str, head_dim: int) -> int:
    return BLOCK_SIZE * {"fp32": 4 * head_dim, "bf16": 2 * head_dim, "int8": head_dim + 4}[dtype]
