"""How long an engine step takes on one worker: five coefficients, fitted to the worker's own steps.

    step = step_s + prefill tokens * token_s + (query, key) pairs of these * pair_s
                  + decode rows * row_s + their context tokens * context_s

Owns the model and its fit. Does not know who prices with it: a worker fits and reports, every router reads the same.

Life of a fit: `observe` each step -> `model`, solved when asked and something new is known.

The base is its own coefficient, so that a worker that only ever computed short suffixes does not take the base for
their speed. Least squares on relative errors (a step of 5 ms counts as much as one of 500), older steps forgotten by
steps of their own kind alone: a decode worker does not unlearn its prefill speed by decoding. What was never seen
follows what is alike: a decode row costs like a prompt token, a token of its context like a pair; and before there is
anything, the prior below.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.step import Step

SIZE = 5
FADE = 0.98
"""Weight that a step keeps with each further one of its kind: about the last fifty count."""
CLIP = 2.0
"""A step counts as at most so many times its prediction: a stall is not a speed."""
TRUST_AFTER = 8
"""Steps of a kind before its predictions clip; and so many clipped in a row are a change of speed, and what was known
of the kind before is void."""
ANCHOR = 1e-5
"""Weight of the prior, in steps."""
LIKENESS = 1e-2
"""Weight of 'a decode row costs like a prompt token', in steps."""


@dataclass(slots=True)
class StepModel:
    """Seconds. The defaults are the prior: round figures of a small model on a few CPU cores."""

    step_s: float = 0.005
    """Of a step with nothing in it."""
    token_s: float = 0.0005
    """Per prompt token computed."""
    pair_s: float = 5e-8
    """Per (query, key) pair of these tokens: a token at position i attends to i + 1."""
    row_s: float = 0.0005
    """Per sequence that decodes."""
    context_s: float = 5e-8
    """Per token that these read."""
    num_prefill_steps: int = 0
    """Measured steps with prompt tokens. 0: token_s and pair_s are a guess."""
    num_decode_steps: int = 0
    """Measured steps without. 0: row_s and context_s are a guess."""

    def prefill_s(self, num_cached: int, num_uncached: int, chunk_tokens: int) -> float:
        """To compute `num_uncached` tokens behind `num_cached`, in chunks."""
        num_steps = -(-num_uncached // chunk_tokens)
        return num_steps * self.step_s + num_uncached * self.token_s + pairs(num_cached, num_uncached) * self.pair_s

    def queue_s(self, num_tokens: int, num_pairs: int, chunk_tokens: int) -> float:
        """To compute the prompts of a queue, which share steps."""
        return num_tokens * (self.token_s + self.step_s / chunk_tokens) + num_pairs * self.pair_s

    def decode_step_s(self, num_rows: int, context_tokens: int) -> float:
        return self.step_s + num_rows * self.row_s + context_tokens * self.context_s

    def tokens_per_s(self, num_tokens: int) -> float:
        """Prefill speed in steps of so many tokens."""
        return num_tokens / self.prefill_s(0, num_tokens, num_tokens)


def pairs(num_cached: int, num_uncached: int) -> int:
    """(query, key) pairs that causal attention of these tokens looks at."""
    return num_uncached * num_cached + num_uncached * (num_uncached + 1) // 2


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step consists of, as the model counts it."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_rows: int = 0
    context_tokens: int = 0

    @classmethod
    def of(cls, step: Step) -> StepWork:
        """A single row that samples is a decode."""
        tokens = num_pairs = rows = context = 0
        for chunk in step.chunks:
            num_tokens = len(chunk.token_ids)
            if num_tokens == 1 and chunk.choices:
                rows += 1
                context += chunk.end
            else:
                tokens += num_tokens
                num_pairs += pairs(chunk.start, num_tokens)
        return cls(tokens, num_pairs, rows, context)


class StepFit:
    """Normal equations of two kinds of steps, with and without prompt tokens. Coefficients are in units of the prior,
    so that one weight means the same for all of them."""

    def __init__(self, prior: StepModel | None = None) -> None:
        prior = prior or StepModel()
        self._unit = (prior.step_s, prior.token_s, prior.pair_s, prior.row_s, prior.context_s)
        self._squares = {kind: [[0.0] * SIZE for _ in range(SIZE)] for kind in (False, True)}
        self._sums = {kind: [0.0] * SIZE for kind in (False, True)}
        self._num_steps = {False: 0, True: 0}
        self._num_trusted = {False: 0, True: 0}
        """Steps since the last change of speed."""
        self._num_clipped = {False: 0, True: 0}
        """In a row."""
        self._model = prior
        self._solved = True

    def observe(self, work: StepWork, duration_s: float) -> None:
        """Take one step in. A step without duration says nothing."""
        if duration_s <= 0:
            return
        prefills = work.prefill_tokens > 0
        counts = (1, work.prefill_tokens, work.prefill_pairs, work.decode_rows, work.context_tokens)
        duration_s = self._clipped(prefills, counts, duration_s)
        row = [count * unit / duration_s for count, unit in zip(counts, self._unit, strict=True)]
        sums, squares = self._sums[prefills], self._squares[prefills]
        for i, x in enumerate(row):
            sums[i] = FADE * sums[i] + x
            squares[i] = [FADE * old + x * y for old, y in zip(squares[i], row, strict=True)]
        self._num_steps[prefills] += 1
        self._solved = False

    @property
    def model(self) -> StepModel:
        """As of all steps observed."""
        if not self._solved:
            self._solved = True
            base, token, pair, row, context = (s * unit for s, unit in zip(self._shares(), self._unit, strict=True))
            self._model = StepModel(base, token, pair, row, context, self._num_steps[True], self._num_steps[False])
        return self._model

    def _clipped(self, prefills: bool, counts: tuple[int, ...], duration_s: float) -> float:
        """What the step counts as."""
        self._num_trusted[prefills] += 1
        most_s = CLIP * self._predicted(counts)
        if self._num_trusted[prefills] <= TRUST_AFTER or not 0 < most_s < duration_s:
            self._num_clipped[prefills] = 0
            return duration_s
        self._num_clipped[prefills] += 1
        if self._num_clipped[prefills] < TRUST_AFTER:
            return most_s
        self._squares[prefills] = [[0.0] * SIZE for _ in range(SIZE)]
        self._sums[prefills] = [0.0] * SIZE
        self._num_trusted[prefills] = self._num_clipped[prefills] = 0
        return duration_s

    def _predicted(self, counts: tuple[int, ...]) -> float:
        m = self._model
        coefficients = (m.step_s, m.token_s, m.pair_s, m.row_s, m.context_s)
        return sum(count * c for count, c in zip(counts, coefficients, strict=True))

    def _shares(self) -> list[float]:
        """The coefficients as multiples of the prior's: the least squares among those that are not negative."""
        squares = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*self._squares.values(), strict=True)]
        sums = [ANCHOR + sum(both) for both in zip(*self._sums.values(), strict=True)]
        for i in range(SIZE):
            squares[i][i] += ANCHOR
        for one, other in ((1, 3), (2, 4)):
            # LIKENESS * (one coefficient - the other)^2, in units of the first.
            ratio = self._unit[other] / self._unit[one]
            squares[one][one] += LIKENESS
            squares[other][other] += LIKENESS * ratio * ratio
            squares[one][other] -= LIKENESS * ratio
            squares[other][one] -= LIKENESS * ratio
        free = list(range(SIZE))
        while True:
            shares = _solved(squares, sums, free)
            lowest = min(free, key=lambda i: shares[i])
            if shares[lowest] >= 0:
                return shares
            free.remove(lowest)


def _solved(squares: list[list[float]], sums: list[float], free: list[int]) -> list[float]:
    """Gauss without pivots, which positive definite equations do not need; what is not free is 0."""
    rows = [[*(squares[i][j] for j in free), sums[i]] for i in free]
    for i, pivot in enumerate(rows):
        for row in rows[i + 1 :]:
            factor = row[i] / pivot[i]
            for j in range(i, len(row)):
                row[j] -= factor * pivot[j]
    shares = [0.0] * SIZE
    for i in reversed(range(len(rows))):
        known = sum(rows[i][k] * shares[free[k]] for k in range(i + 1, len(rows)))
        shares[free[i]] = (rows[i][-1] - known) / rows[i][i]
    return shares
