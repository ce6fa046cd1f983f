"""One attempt of a request: its place on a decode worker, from the Submit to the last word.

Owns what an epoch holds at the worker and here: the subscription, the dispatched work that is counted, the Cancel that
is owed. Does not know what its chunks mean for the request (run.py).

Life (core/machines.py, ATTEMPT): placed -> `open`: submitted, work counted -> its first token settles the count ->
`close`, once: nothing of it is left here, and unless its worker has said its last word, nothing there either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.core.errors import BatonError, Forgotten, Incompatible, IntegrityError, PeerLost, RetryRoute, from_code
from baton.core.machines import ATTEMPT, Life
from baton.core.messages import Cancel, Resume, Submit, TokenChunk
from baton.core.request import FinishReason
from baton.core.worker import Route, WorkerInfo
from baton.router.fleet import Fleet
from baton.router.link import Subscription, Work


@dataclass(slots=True, eq=False)
class Attempt:
    request_id: str
    epoch: int
    """Never the same twice at a router: a request id may come again while chunks of its last use are on their way."""
    route: Route
    decode: WorkerInfo
    fleet: Fleet
    lacks: Callable[[Attempt], Resume]
    """What its worker is asked for when the stream comes back."""
    resumes: bool = False
    """It goes on with what another router, or an earlier life of this one, had begun."""
    life: Life = field(default_factory=lambda: Life(ATTEMPT))
    opened_at: float = 0.0
    has_last_word: bool = False
    """Its worker is through with it."""
    broke: bool = False
    """The stream to its worker was lost under it."""
    runs_on: bool = False
    """Its worker goes on with it when it is closed: who reads on asks there."""
    lost_lenders: tuple[str, ...] = ()
    """Boots whose connection broke while they worked for it."""
    avoid: tuple[str, ...] = ()
    """worker_ids that the next attempt should do without."""
    _subscription: Subscription | None = None
    _charged: tuple[str, ...] = ()
    """worker_ids that the work of this attempt is counted on."""

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.epoch

    def open(
        self, message: Submit | Resume, work: dict[str, Work], hear: Callable[[Attempt, TokenChunk], None],
        lose: Callable[[Attempt, BatonError], None],
    ) -> None:
        """Send it. `work`: what counts on each worker from now on. Raises PeerLost without a stream; it must be closed
        then, too."""
        self.opened_at = asyncio.get_running_loop().time()
        self.avoid = () if self.resumes else (self.route.decode,)
        self.life.on("submit")
        subscription = Subscription(*self.key, lambda chunk: hear(self, chunk), lambda error: self._break(lose, error),
                                    lambda: self.lacks(self))
        self.fleet.subscribe(self.route.decode, subscription)
        self._subscription = subscription
        self.fleet.send(self.route.decode, message)
        self._charged = tuple(work)
        for worker_id, part in work.items():
            self.fleet.charge(worker_id, self.epoch, part)

    def failure(self, chunk: TokenChunk) -> BatonError | None:
        """What the worker ended the attempt with; None if it did not."""
        if chunk.finish not in (FinishReason.CANCELLED, FinishReason.ERROR):
            return None
        self.has_last_word = True
        if chunk.finish is FinishReason.CANCELLED:
            why = chunk.error_message or "it is going away"
            return PeerLost(f"{self.route.decode} cancelled request {self.request_id}: {why}.")
        error = from_code(chunk.error_code, chunk.error_message)
        self.lost_lenders = chunk.lost_lenders
        if isinstance(error, Forgotten) and not self.resumes:
            return PeerLost(f"the stream to {self.route.decode} broke, and when it was back, request {self.request_id} "
                            "was not known there any more.")
        if isinstance(error, RetryRoute):
            # The decode worker is well, and what it has verified is in its cache.
            self.avoid = tuple(p.worker_id for p in (self.route.prefill, *self.route.spares) if p is not None)
        elif self.route.prefill is not None and isinstance(error, (PeerLost, Incompatible, IntegrityError)):
            self.avoid = (self.route.prefill.worker_id,)
        return error

    def streams(self) -> bool:
        """Notes a token. True with the first: reports of its worker show the work from now on."""
        is_first = self.life.at("sent")
        self.life.on("token")
        if is_first:
            self._settle()
        return is_first

    def close(self, event: str, why: str = "") -> None:
        """Its end, by the table's event; `why` is what its worker is told. Further calls change nothing."""
        if self.life.ended:
            return
        self.life.on(event)
        self._settle()
        if self._subscription is None:
            return
        self.fleet.unsubscribe(self.route.decode, self._subscription)
        if not (self.has_last_word or self.broke or self.runs_on):
            self.fleet.send(self.route.decode, Cancel(*self.key, *([why] if why else [])))

    def _break(self, lose: Callable[[Attempt, BatonError], None], error: BatonError) -> None:
        self.broke = True
        lose(self, error)

    def _settle(self) -> None:
        for worker_id in self._charged:
            self.fleet.settle(worker_id, self.epoch)
        self._charged = ()

