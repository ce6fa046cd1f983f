"""What one request costs where: the parts of a price, in seconds.

Owns the terms. Does not know which of all ways is taken (cost.py), nor streams or retries.

Of computing the prompt on a prefill worker:
    queue         until the prompts before it are computed
    prefill       what the worker lacks, by its own model; with `fetch`, less what it first pulls from a holder
    handoff       calls and leases between the two workers
    pressure      the prefill again for each prompt that waits behind it, where prompts wait (see `pressure`)
Of decoding there afterwards:
    transfer      KV that the decode worker lacks, as far as the pull is not hidden behind the chunks still computed
    interference  each sequence there gets slower steps, for as long as this one decodes
    decode        its own steps there
    away          the session's last turn was decoded elsewhere
Instead of a hand-off:
    stall         the sequences there wait for the prompt that is computed between their steps

`queue`, `prefill`, `fetch` and `handoff` are over with the first token. What others lose (pressure, interference,
stall) weighs half as much for each class of priority.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.core.config import RouterConfig
from baton.core.layout import stored_alike
from baton.core.step_model import StepModel
from baton.core.worker import Role
from baton.router.policy import Candidate, Candidates, Facts

MAX_HOLDERS = 4
"""Holders looked at for one prompt, those that hold most."""
PRESSURE_RISE = 4.0
"""Prompts that a second of computing delays, for each that waits now: more come before the queue is empty. 1 / (1 -
utilisation) in an M/G/1 queue that is busy three quarters of the time; 1 and 2 were worse in overload, and 4 no worse
below it (docs/notes/0010)."""
MAX_PRESSURE = 4.0
"""Computing costs at most so many times its time: beyond, hits are bought with queues (docs/notes/0010)."""
STEPS_OUT = 1.5
"""Decode steps that who arrives waits for: the one that runs, half of it on average, and the one scheduled behind it
(docs/notes/0007)."""
AWAY_S = 0.005
"""Where a session's KV is, the index says; what it does not say is worth about this."""

Terms = tuple[tuple[str, float], ...]
"""(name, seconds) of each part of a price."""


@dataclass(slots=True, eq=False)
class Way:
    """The prompt computed on one worker."""

    worker: Candidate
    queue_s: float
    prefill_s: float
    num_chunks: int
    steps_s: float
    """Of `prefill_s`, what its steps cost whatever is in them."""
    uncached: int
    """Tokens computed."""
    fetch_s: float = 0.0
    holder: Candidate | None = None
    """Whom it pulls from first."""
    num_fetched: int = 0
    """Tokens pulled."""

    @property
    def ready_s(self) -> float:
        """Until its first token, without a hand-off."""
        return self.queue_s + self.prefill_s + self.fetch_s


@dataclass(slots=True, eq=False)
class Place:
    """The request decoded on one worker."""

    worker: Candidate
    missing_bytes: int
    """Of KV that it does not hold."""
    interference_s: float
    decode_s: float
    away_s: float
    after_s: float
    """All of it but the transfer."""


class Prices:
    """Of one request. Nothing here changes once made, but what is worked out late is kept."""

    def __init__(self, facts: Facts, config: RouterConfig, candidates: Candidates) -> None:
        self.facts = facts
        self.config = config
        self.candidates = candidates
        self.minds = 2.0**-facts.priority
        """What a second of somebody else counts."""
        self._typical: StepModel | None = None
        behind = sum(p.num_sequences for p in candidates.prefill) + facts.num_behind
        waiting = behind / max(1, len(candidates.prefill)) - 1.0
        self.pressure = min(MAX_PRESSURE, max(1.0, 1.0 + PRESSURE_RISE * waiting))
        """What a second of computing costs: itself, and those that wait for it, per prefill worker, there or in the
        router. One in computation waits for nobody."""

    # ---- computing ----

    def way(self, worker: Candidate) -> Way:
        """With the cheapest of the holders that have enough more than the worker itself, or alone."""
        model, size = self.model(worker), worker.info.capability.layout.block_size
        way = self._alone(worker, model, worker.uncached(self.facts.num_tokens))
        own_blocks = max(worker.held_blocks, worker.expected_blocks)
        best, least_tokens = way, self.config.fetch_min_tokens
        for holder in self.candidates.holders[:MAX_HOLDERS]:
            more = holder.held_blocks - own_blocks
            if more <= 0 or more * size < least_tokens:
                break
            if holder.info.worker_id == worker.info.worker_id or not self.candidates.fits(holder.info, worker.info):
                continue
            if not alike(holder, worker):
                continue  # what is converted is not cached
            fetched = self._alone(worker, model, max(1, way.uncached - more * size), way.queue_s)
            fetched.fetch_s = more * worker.info.capability.layout.block_bytes / self.bandwidth(worker, holder)
            fetched.holder, fetched.num_fetched = holder, more * size
            if fetched.ready_s < best.ready_s:
                best = fetched
        return best

    def _alone(self, worker: Candidate, model: StepModel, uncached: int, queue_s: float | None = None) -> Way:
        chunk = worker.load.chunk_tokens
        num_chunks = -(-uncached // chunk)
        prefill_s = model.prefill_s(max(0, self.facts.num_tokens - uncached), uncached, chunk)
        step_s, steps_out = model.step_s, 0.0
        if worker.info.role is Role.DECODE and worker.num_sequences:  # its chunks share steps with all who decode
            step_s, steps_out = model.decode_step_s(worker.num_sequences, worker.context_tokens), STEPS_OUT
            prefill_s += num_chunks * (step_s - model.step_s)
        if queue_s is None:
            queue_s = worker.queue_s(model) + steps_out * step_s
        return Way(worker, queue_s, prefill_s, num_chunks, num_chunks * step_s, uncached)

    def ahead_s(self, way: Way) -> float:
        """All that a prefill worker's part costs."""
        return way.ready_s + self.facts.handoff_s + self._pressure_s(way)

    def _pressure_s(self, way: Way) -> float:
        return (self.pressure - 1.0) * way.prefill_s * self.minds

    # ---- decoding ----

    def place(self, worker: Candidate) -> Place:
        facts, model, layout = self.facts, self.model(worker), worker.info.capability.layout
        missing = max(0, layout.num_blocks_for(facts.num_tokens) - worker.held_blocks)
        rows, context, added = worker.num_sequences, worker.context_tokens, facts.num_choices
        slower_s = added * (model.row_s + facts.num_tokens * model.context_s)
        own_s = model.decode_step_s(rows + added, context + added * facts.num_tokens)
        interference_s = rows * slower_s * facts.output_tokens * self.minds
        decode_s = own_s * facts.output_tokens
        away_s = AWAY_S if facts.home and facts.home != worker.info.worker_id else 0.0
        after_s = interference_s + decode_s + away_s
        return Place(worker, missing * layout.block_bytes, interference_s, decode_s, away_s, after_s)

    def transfer_s(self, way: Way, place: Place) -> float:
        """What of the pull is left when the prompt is computed: of a chunk's KV the move begins when the next chunk
        does, so at least that of the last."""
        moved_s = place.missing_bytes / self.bandwidth(place.worker, way.worker)
        hidden_s = min(way.prefill_s, moved_s) * (way.num_chunks - 1) / way.num_chunks
        return moved_s - hidden_s

    def stall_s(self, way: Way) -> float:
        """A chunk in a decode step costs those who decode its tokens; the step they had anyway. At least one is
        assumed: decode workers are kept free for decoding, or an idle fleet would never hand anything off."""
        return (way.prefill_s - way.steps_s) * max(1, way.worker.num_sequences) * self.minds

    # ---- in words ----

    def terms(self, way: Way, place: Place) -> Terms:
        """Of the whole price; names without seconds are left out, but for the first two and `stall`, by which one knows
        that nothing is handed off."""
        is_local = way.worker is place.worker
        rest = (
            ("fetch", way.fetch_s),
            *((("stall", self.stall_s(way)),) if is_local else (
                ("handoff", self.facts.handoff_s), ("pressure", self._pressure_s(way)),
                ("transfer", self.transfer_s(way, place)),
            )),
            ("interference", place.interference_s), ("decode", place.decode_s), ("away", place.away_s),
        )
        return ("queue", way.queue_s), ("prefill", way.prefill_s), *(t for t in rest if t[1] or t[0] == "stall")

    # ---- what is known of workers ----

    def model(self, worker: Candidate) -> StepModel:
        """Its own; what it has not measured is as on its peers, or assumed."""
        own = worker.load.model
        if own.num_prefill_steps and (own.num_decode_steps or worker.info.role is Role.PREFILL):
            return own
        if self._typical is None:
            self._typical = self._of_peers()
        typical = self._typical
        if not own.num_prefill_steps and not own.num_decode_steps:
            return typical
        if own.num_prefill_steps:
            return replace(own, row_s=typical.row_s, context_s=typical.context_s)
        return replace(own, token_s=typical.token_s, pair_s=typical.pair_s)

    def _of_peers(self) -> StepModel:
        models = [c.load.model for c in (*self.candidates.decode, *self.candidates.prefill)]
        prefill = [m for m in models if m.num_prefill_steps]
        decode = [m for m in models if m.num_decode_steps]
        assumed = StepModel(token_s=1 / self.config.assumed_prefill_tokens_per_s)
        return StepModel(
            _mean([m.step_s for m in models if m.num_prefill_steps or m.num_decode_steps], assumed.step_s),
            _mean([m.token_s for m in prefill], assumed.token_s),
            _mean([m.pair_s for m in prefill], assumed.pair_s),
            _mean([m.row_s for m in decode], assumed.row_s),
            _mean([m.context_s for m in decode], assumed.context_s),
        )

    def bandwidth(self, reader: Candidate, lender: Candidate) -> float:
        return reader.bandwidth.get(lender.info.worker_id) or self.config.assumed_bandwidth_bytes_per_s


def alike(one: Candidate, other: Candidate) -> bool:
    return stored_alike(one.info.capability, other.info.capability)


def _mean(measured: Sequence[float], assumed: float) -> float:
    """A worker that has not run yet is probably like its peers."""
    return sum(measured) / len(measured) if measured else assumed
