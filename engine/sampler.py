"""Chooses the next token from logits. Counter-based: the same (seed, position) and logits give the same token, on any
worker, in any batch, at any retry.

Key = the request's seed; counter = (choice, position, draw). Today each token takes one draw of choice 0; parallel
choices and draft verification take others without disturbing these.

Filters apply in the order temperature, top-k, top-p, min-p, each to what the one before it left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from baton.core.request import SamplingParams

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SampledRow:
    """How to sample one row of logits."""

    sampling: SamplingParams
    seed: int
    position: int
    """Of the token to be sampled, in its sequence."""


def sample(logits: torch.Tensor, rows: Sequence[SampledRow]) -> list[int]:
    """logits [num_rows, vocab_size] fp32 -> one token per row. Ties go to the lower token id."""
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    tokens = torch.argmax(logits, dim=-1).tolist()
    for i, row in enumerate(rows):
        if row.sampling.temperature > 0.0:
            tokens[i] = _draw(logits[i].numpy(), row)
    return [int(token) for token in tokens]


def _draw(logits: NDArray[np.float32], row: SampledRow) -> int:
    ids, weights = candidates(logits, row.sampling)
    cumulative = np.cumsum(weights)
    chosen = np.searchsorted(cumulative, uniform(row.seed, row.position) * cumulative[-1], side="right")
    return int(ids[min(int(chosen), len(ids) - 1)])


def uniform(seed: int, position: int, choice: int = 0, draw: int = 0) -> float:
    """One number in [0, 1) with 53 random bits; Philox 4x64-10 (Salmon et al. 2011) at a counter of its own."""
    # As uint64 at once: numpy makes floats of a list with a number above 2^63, and different seeds become equal.
    key, counter = np.array([seed, 0], np.uint64), np.array([draw, 0, choice, position], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


def candidates(logits: NDArray[np.float32], sampling: SamplingParams) -> tuple[Ids, Floats]:
    """Token ids that survive the filters, ascending, and their weights (unnormalised probabilities, largest 1)."""
    ids: Ids = np.arange(len(logits))
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature: exp(-inf) = 0 is what is meant
        weights: Floats = np.exp((logits.astype(np.float64) - float(logits.max())) / sampling.temperature)
    if 0 < sampling.top_k < len(ids):
        kept = _top_k(weights, sampling.top_k)
        ids, weights = ids[kept], weights[kept]
    if sampling.top_p < 1.0:
        kept = _top_p(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(weights >= sampling.min_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _top_k(weights: Floats, k: int) -> Ids:
    """Ascending indices of the k largest; of equals the first."""
    smallest = np.partition(weights, len(weights) - k)[len(weights) - k]
    above, equal = np.flatnonzero(weights > smallest), np.flatnonzero(weights == smallest)
    return np.sort(np.concatenate([above, equal[: k - len(above)]]))


def _top_p(weights: Floats, p: float) -> Ids:
    """Ascending indices of the smallest set, taken from the largest down, that holds at least p of the mass."""
    total = float(weights.sum())
    # Tokens below (1 - p) / n of the mass hold less than 1 - p together, so the set is complete without them: nearly
    # the whole vocabulary need not be sorted.
    likely = np.flatnonzero(weights * len(weights) >= (1.0 - p) * total)
    order = likely[np.argsort(-weights[likely], kind="stable")]
    num_kept = int(np.searchsorted(np.cumsum(weights[order]), p * total, side="left")) + 1
    return np.sort(order[:num_kept])
