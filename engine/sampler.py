"""Chooses next tokens from logits. Counter-based: the same seed, choice, position, history and logits give the same
token, on any worker, in any batch, at any retry.

Key = the request's seed; counter = (choice, position, draw). Today each token takes one draw; draft verification will
take others without disturbing these.

Life of a row of logits:
    1. Its largest is looked at: NaN or infinite, and the row fails alone.
    2. Log-probs are taken of it as it is.
    3. logit_bias, then penalties for tokens that came before.
    4. Greedy: the largest. Else temperature, top-k, top-p, min-p, each on what the one before it left, and one draw
       for each choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.core.errors import BatonError, InternalError
from baton.core.request import SampledToken, SamplingParams, TokenLogprob
from baton.core.step import ScheduledChunk

Logits = NDArray[np.float32]
Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

LARGEST = float(np.finfo(np.float64).max)


@dataclass(frozen=True, slots=True)
class SampledRow:
    """How to sample one row of logits, once for each choice."""

    sampling: SamplingParams
    seed: int
    position: int
    """Of the token to be sampled, in its sequence."""
    choices: tuple[int, ...] = (0,)
    history: tuple[int, ...] = ()
    """All tokens before it, if sampling.needs_history."""
    num_prompt_tokens: int = 0
    """How many of them are the prompt."""

    @property
    def is_plain(self) -> bool:
        """Its token follows from the logits and one draw: nothing is added to them before."""
        return not _adjusts(self.sampling) and (self.sampling.temperature == 0.0 or len(self.choices) == 1)

    @property
    def is_greedy(self) -> bool:
        """The largest logit's token is the one."""
        return self.sampling.temperature == 0.0 and not _adjusts(self.sampling)

    @classmethod
    def of(cls, chunk: ScheduledChunk) -> SampledRow:
        return cls(chunk.sampling, chunk.seed, chunk.end, chunk.choices, chunk.history, chunk.num_prompt_tokens)


def sample(logits: Logits, rows: Sequence[SampledRow]) -> list[tuple[SampledToken, ...] | BatonError]:
    """logits [num_rows, vocab_size] fp32 -> one token for each choice of each row, or why a row has none. Ties go to
    the lower token id."""
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    largest = logits.argmax(axis=-1)  # NaN counts as larger than all
    peaks = logits[np.arange(len(rows)), largest].tolist()
    return [
        outcome(row, token if row.is_greedy else None, peak, raw)
        for row, token, peak, raw in zip(rows, largest.tolist(), peaks, logits, strict=True)
    ]


def outcome(
    row: SampledRow, token: int | None, peak: float, raw: Logits
) -> tuple[SampledToken, ...] | BatonError:
    """What becomes of a row, whose greatest logit is `peak`. `token` is every choice's, if somebody has chosen it
    already; then `raw` matters only for log-probs."""
    if not math.isfinite(peak):
        return _not_finite(row, peak)
    if token is None:
        return _sample_row(raw, row)
    if row.sampling.logprobs is None:
        return (SampledToken(token),) * len(row.choices)
    return (SampledToken(token, logprobs(raw, (token,), row.sampling.logprobs)[0]),) * len(row.choices)


def _not_finite(row: SampledRow, peak: float) -> BatonError:
    return InternalError(
        f"the logits of the token at position {row.position} are not finite (largest: {peak}). "
        "The KV they were computed from is not used again."
    )


def _sample_row(raw: Logits, row: SampledRow) -> tuple[SampledToken, ...]:
    sampling = row.sampling
    tokens = _choose(adjusted(raw, row) if _adjusts(sampling) else raw, row)
    if sampling.logprobs is None:
        return tuple(map(SampledToken, tokens))
    return tuple(map(SampledToken, tokens, logprobs(raw, tokens, sampling.logprobs)))


def _choose(logits: Logits | Floats, row: SampledRow) -> list[int]:
    if row.sampling.temperature == 0.0:
        return [int(logits.argmax())] * len(row.choices)
    ids, weights = candidates(logits, row.sampling)
    cumulative = np.cumsum(weights)
    draws = [uniform(row.seed, row.position, choice) * cumulative[-1] for choice in row.choices]
    chosen = np.searchsorted(cumulative, draws, side="right")
    return [int(ids[min(int(c), len(ids) - 1)]) for c in chosen]


def uniform(seed: int, position: int, choice: int = 0, draw: int = 0) -> float:
    """One number in [0, 1) with 53 random bits; Philox 4x64-10 (Salmon et al. 2011) at a counter of its own."""
    # As uint64 at once: numpy makes floats of a list with a number above 2^63, and different seeds become equal.
    key, counter = np.array([seed, 0], np.uint64), np.array([draw, 0, choice, position], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw()
    return float(int(bits) >> 11) * 2.0**-53


# ---- before the choice -----------------------------------------------------------------------------------------------


def logprobs(raw: Logits, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Of each of `tokens`, and the same `num_top` likeliest for all (fewer only if the vocabulary is smaller)."""
    wide = raw.astype(np.float64)
    peak = wide.max()
    total = peak + np.log(np.exp(wide - peak).sum())
    likeliest = _top_k(wide, num_top) if num_top else np.empty(0, np.int64)
    likeliest = likeliest[np.argsort(-wide[likeliest], kind="stable")]
    # Rounded as the wire rounds, so that equal means equal on both sides of it.
    top = tuple((int(t), float(np.float32(wide[t] - total))) for t in likeliest)
    return [TokenLogprob(float(np.float32(wide[t] - total)), top) for t in tokens]


def _adjusts(sampling: SamplingParams) -> bool:
    return bool(sampling.logit_bias) or sampling.needs_history


def adjusted(raw: Logits, row: SampledRow) -> Floats:
    """The logits after logit_bias and penalties: repetition as Keskar et al. 2019 (section 4.1) and Hugging Face's
    processor have it, over prompt and output; frequency and presence as OpenAI documents them, over the output."""
    logits: Floats = raw.astype(np.float64)
    sampling = row.sampling
    for token, bias in sampling.logit_bias:
        if token < len(logits):
            logits[token] += bias
    history: Ids = np.asarray(row.history, dtype=np.int64)
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(history)
        before = logits[seen]
        with np.errstate(over="ignore"):
            after = np.where(before > 0, before / sampling.repetition_penalty, before * sampling.repetition_penalty)
        logits[seen] = np.minimum(after, LARGEST)  # infinity less infinity is no probability
    if sampling.frequency_penalty or sampling.presence_penalty:
        said, counts = np.unique(history[row.num_prompt_tokens :], return_counts=True)
        logits[said] -= counts * sampling.frequency_penalty + sampling.presence_penalty
    return logits


# ---- filters ---------------------------------------------------------------------------------------------------------


def candidates(logits: Logits | Floats, sampling: SamplingParams) -> tuple[Ids, Floats]:
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


def _top_k(values: Floats, k: int) -> Ids:
    """Ascending indices of the k largest; of equals the first. All, if there are fewer."""
    if k >= len(values):
        return np.arange(len(values))
    smallest = np.partition(values, len(values) - k)[len(values) - k]
    above, equal = np.flatnonzero(values > smallest), np.flatnonzero(values == smallest)
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
