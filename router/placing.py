"""Where an attempt goes: the prompt is hashed once, everybody who could take it is priced, and it waits while nobody
can.

Owns the waits before an attempt. Does not know what becomes of it.

Life of a placing:

1. its turn: when a worker has room (admission.py), and behind those that were refused before (waiting.py)
2. priced among ready workers that have not refused or failed it; chosen, or
3. everybody asked has said no: a pause, then all of them may be asked again; nobody is ready: until somebody is
4. bounded: by PLACE_WAIT_S without a ready worker, REFUSED_WAIT_S without a place, and always by the deadline
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from baton.core.block_hash import BlockHash, HashScope, extend
from baton.core.config import Config
from baton.core.errors import InvalidRequest, Overloaded, PeerLost
from baton.core.metrics import Metrics
from baton.core.step_model import pairs
from baton.core.worker import Role, Route, WorkerInfo
from baton.router.admission import Admission
from baton.router.decisions import Decider
from baton.router.fair_queue import class_of
from baton.router.fleet import Fleet, context_limit
from baton.router.health import Health
from baton.router.link import Work
from baton.router.outcomes import Outcomes
from baton.router.policy import Candidate, Candidates, Facts
from baton.router.room import Room
from baton.router.run import Run
from baton.router.waiting import WaitingLine

PLACE_WAIT_S = 10.0
"""Longest wait for a decode worker to become ready; then the client can go elsewhere."""
REFUSED_WAIT_S = 60.0
"""Longest wait for a place while workers are ready and have none."""
PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 1.0
"""Pause before workers that all refused are asked again; doubles with each attempt."""
SAME_S = 0.002
"""So long candidates are as they were, if nothing was heard of or sent to any worker."""


class NobodyReady(PeerLost):
    """There is no decode worker to wait for. To clients a PeerLost: the fault is the fleet's, not the load's."""


class Placing:
    def __init__(self, fleet: Fleet, decider: Decider, line: WaitingLine, config: Config, metrics: Metrics) -> None:
        self.health = Health(metrics)
        self.outcomes = Outcomes(metrics)
        self.admission = Admission(config.router, metrics, self._is_open, self._is_too_large)
        self._config = config.router
        self._fleet = fleet
        self._decider = decider
        self._asked: tuple[object, float, tuple[Facts, Candidates]] | None = None
        self._open: tuple[Candidates, bool] | None = None
        """What was found of the candidates asked last: who is admitted has his turn in the same breath."""
        self._line = line
        self._room = Room(config, self.health)

    def max_model_len(self) -> int:
        """Most tokens, prompt and output, that any known worker holds for one request; 0 while none is known."""
        return self._fleet.max_model_len()

    def check_length(self, run: Run) -> None:
        limit = self.max_model_len()
        if limit and len(run.request.prompt) + 1 > limit:
            raise InvalidRequest(
                f"the prompt has {len(run.request.prompt)} tokens; with at least one token of output that is more than "
                f"the {limit} any worker holds. Shorten the prompt.",
                "prompt",
            )

    async def place(self, run: Run) -> Route:
        """The next attempt's route. Waits for its turn, and then up to PLACE_WAIT_S for somebody to take it."""
        loop = asyncio.get_running_loop()
        await self._turn(run)
        give_up = min(run.deadline, loop.time() + PLACE_WAIT_S)
        while True:
            if loop.time() >= run.deadline:
                raise run.late()
            self.check_length(run)
            route = self._price(run)
            if route is not None:
                return route
            left_s = give_up - loop.time()
            if run.avoided:
                await self._pause(run)
                await self._turn(run)
            elif left_s <= 0 or not await self._fleet.changed(left_s):
                if loop.time() >= run.deadline:
                    raise run.late()
                raise (Overloaded if self._fleet.ready else NobodyReady)(
                    f"no decode worker can take request {run.request.request_id}: {self._roll_call()}. "
                    "Try again later; `baton status` shows the workers."
                )
            else:
                await self._turn(run)

    def place_move(self, run: Run, source: WorkerInfo) -> Route | None:
        """Where it moves to from a worker that drains; None: nobody has room, or fits. Never waits."""
        facts = self._facts(run, run.delivery.num_shared_tokens + run.delivery.num_apart_tokens)
        everybody = self._candidates(run, facts)
        others = [d for d in everybody.decode if d.info.worker_id not in run.move_elsewhere]
        decision = self._decider.choose_move(facts, source, dataclasses.replace(everybody, decode=others))
        if decision.route is None and run.move_elsewhere:
            run.move_elsewhere.clear()
            decision = self._decider.choose_move(facts, source, everybody)
        run.decisions.append(decision)
        return decision.route

    def work(self, run: Run, route: Route) -> dict[str, Work]:
        """What the route gives to each worker."""
        computing = route.prefill or self._fleet.info(route.decode)
        assert computing is not None, f"{route.decode} was offered and is not known"
        hashes = self._hashes(run)
        held = self._held(hashes)
        best = max(held.get(w.worker_id, 0) for w in (computing, route.holder) if w is not None)
        scope = _scope(HashScope.of(computing.capability), run.request.tenant)
        mine = hashes[scope, computing.capability.layout.block_size]
        best = max(best, self._fleet.coming.match(mine).get(computing.boot_id, 0))
        total = run.delivery.num_shared_tokens
        left = max(1, total - best * computing.capability.layout.block_size)
        num_pairs = pairs(total - left, left)
        if route.prefill is None:
            return {route.decode: Work(left, num_pairs, total, mine)}
        return {computing.worker_id: Work(left, num_pairs, hashes=mine), route.decode: Work(context_tokens=total)}

    def _hashes(self, run: Run) -> Mapping[tuple[HashScope, int], Sequence[BlockHash]]:
        """Of the blocks that all its choices begin with. Hashed once per request and way of hashing (one, in a fleet of
        one model); workers that hash differently cannot hold each other's hashes."""
        for fleet_scope, block_size in self._fleet.scopes():
            scope = _scope(fleet_scope, run.request.tenant)
            hashes = run.hashes.setdefault((scope, block_size), [])
            known = len(hashes) * block_size
            if run.delivery.num_shared_tokens - known >= block_size:  # at first the prompt, later what came since
                parent = hashes[-1] if hashes else scope.root()
                hashes += extend(parent, run.delivery.shared_from(known), block_size)
        return run.hashes

    def _held(self, hashes: Mapping[tuple[HashScope, int], Sequence[BlockHash]]) -> Mapping[str, int]:
        """Leading blocks on each worker, most first."""
        return _merged([self._fleet.index.match(chain) for chain in hashes.values()])

    def _price(self, run: Run) -> Route | None:
        facts, candidates = self._ask(run)
        decision = self._decider.choose(facts, self._room.narrowed(candidates))
        run.decisions.append(decision)
        route, now = decision.route, asyncio.get_running_loop().time()
        if route is not None:
            self.health.tried(route.decode, now)
            if route.prefill is not None:
                self.health.tried(route.prefill.worker_id, now)
        return route

    def _is_open(self, run: Run) -> bool:
        """Could it be sent now, and begin soon? Also if nobody is ready: `place` knows how long to wait for that."""
        if self._line.somebody_waits:
            return False
        facts, candidates = self._ask(run)
        if self._open is None or self._open[0] is not candidates:
            self._open = candidates, not candidates.decode or self._room.is_open(facts, candidates)
        return self._open[1]

    def _is_too_large(self, run: Run) -> bool:
        """Asked of one that is not open: would a smaller one be?"""
        if self._line.somebody_waits:
            return False
        return self._room.is_too_large(*self._ask(run))

    def _ask(self, run: Run) -> tuple[Facts, Candidates]:
        """What a policy is asked, as of now; in one breath (admitted, its turn, priced) it is looked up once."""
        delivery, now = run.delivery, asyncio.get_running_loop().time()
        moment = (run, delivery.longest, len(delivery.unfinished), len(run.avoided), self._decider.num_decisions,
                  len(self.admission), self._fleet.num_changes)
        if self._asked is None or self._asked[0] != moment or now - self._asked[1] > SAME_S:
            facts = self._facts(run, delivery.num_shared_tokens)
            self._asked = moment, now, (facts, self._candidates(run, facts))
        return self._asked[2]

    def _candidates(self, run: Run, facts: Facts) -> Candidates:
        fleet, longest, hashes = self._fleet, run.delivery.longest, self._hashes(run)
        held = self._held(hashes)
        coming = _merged([fleet.coming.match(chain) for chain in hashes.values()])

        def able(candidate: Candidate) -> bool:
            info = candidate.info
            return info.worker_id not in run.avoided and context_limit(info.capability) > longest

        def offered(role: Role, has_room: Callable[[Candidate], bool]) -> list[Candidate]:
            """Of a large fleet few are offered: who has no room, or is not trusted, shall not take their places."""
            preferred = None if self._decider.compares_all else has_room
            return fleet.candidates(role, held, coming, able, preferred, facts.home)

        decode = offered(Role.DECODE, lambda d: d.has_room(facts) and self._room.has_slot(d))
        return Candidates(decode, offered(Role.PREFILL, self._room.has_slot), fleet.fits, fleet.holders(held))

    def _facts(self, run: Run, num_tokens: int) -> Facts:
        request, delivery = run.request, run.delivery
        num_left = request.sampling.max_tokens - delivery.num_output_tokens // len(request.choices)
        return Facts(
            num_tokens,
            len(delivery.unfinished),
            self._decider.num_decisions,
            output_tokens=self.outcomes.expected_tokens(max(1, num_left)),
            handoff_s=self.outcomes.handoff_s,
            priority=1 - class_of(self._config.tenants, request.tenant, request.priority),
            deadline_s=run.deadline - asyncio.get_running_loop().time(),
            num_behind=len(self.admission),
            home=self.outcomes.home(request),
        )

    async def _turn(self, run: Run) -> None:
        """Let those go first who came or were refused before. Who was running goes on at once: he has waited already.
        Once it is its turn, nothing waits before it is sent."""
        if not run.let_in:
            await self.admission.turn(run)
        give_up = min(run.deadline, (run.refused_since or run.arrived) + REFUSED_WAIT_S)
        if run.num_failures or await self._line.turn(run.request.request_id, give_up):
            return
        if give_up >= run.deadline:
            raise run.late()
        raise Overloaded(
            f"request {run.request.request_id} waited {REFUSED_WAIT_S:g} s behind others that the workers have no "
            "place for. Try again later, or add workers."
        )

    async def _pause(self, run: Run) -> None:
        """Everybody asked has said no. Then all of them may be asked again."""
        left_s = run.deadline - asyncio.get_running_loop().time()
        pause_s = min(left_s, PAUSE_FIRST_S * 2 ** min(len(run.records), 10), PAUSE_MAX_S)
        if run.refused_since is not None and not run.num_failures:
            self._line.refused(run.request.request_id)
        await asyncio.sleep(pause_s)
        run.avoided.clear()

    def _roll_call(self) -> str:
        states = [f"{w.info.worker_id} is {w.state}" for w in self._fleet.workers() if w.info.role is Role.DECODE]
        return ", ".join(states) or "none has been registered"


@functools.lru_cache(maxsize=4096)
def _scope(fleet_scope: HashScope, tenant: str) -> HashScope:
    return dataclasses.replace(fleet_scope, tenant_salt=tenant)


def _merged(found: Sequence[Mapping[str, int]]) -> Mapping[str, int]:
    """Of several ways of hashing; each worker knows one of them."""
    if len(found) == 1:
        return found[0]
    together = ((name, num_blocks) for each in found for name, num_blocks in each.items())
    return dict(sorted(together, key=lambda one: -one[1]))
