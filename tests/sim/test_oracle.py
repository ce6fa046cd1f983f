"""The oracle can fail: worlds built with one broken part are caught, and by the check that should catch them.

The parts are broken by subclass, as a bad change would break them; everything else is production code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest

from baton.core.block_hash import HashScope
from baton.core.config import load
from baton.core.errors import PeerLost
from baton.core.handoff import LentBlock
from baton.core.messages import TokenChunk
from baton.core.request import FinishReason, Request, SamplingParams
from baton.core.worker import Role
from baton.engine.block_pool import BlockPool
from baton.kv_transfer.lease import LeaseTable
from baton.kv_transfer.puller import Link, Puller, _Transfer
from baton.models.hash_model import expected
from baton.sim.faults import Fault, Partition
from baton.sim.machine import Builders
from baton.sim.more_faults import BadPulls
from baton.sim.oracle import Oracle, OracleFailure
from baton.sim.plan import Plan, draw_plan
from baton.sim.simulate import simulate
from baton.sim.transport import PullFault, WireSpeed
from baton.sim.workload import Job

SEEDS = range(1, 4)


def dense(seed: int, fault: Fault, builders: Builders) -> Plan:
    """A world so busy, with pools so small, that a block that was given back is somebody else's soon."""
    plan = draw_plan(seed)
    longest = -(-plan.terms.max_model_len // plan.terms.block_size)
    num_blocks = {Role.PREFILL: 3 * longest, Role.DECODE: 2 * longest}
    terms = dataclasses.replace(plan.terms, num_blocks=num_blocks, speed=WireSpeed(late_s=1.1 + 0.1 * seed))
    shape = dataclasses.replace(plan.shape, mean_gap_s=0.02)
    return dataclasses.replace(plan, terms=terms, shape=shape, num_jobs=100, faults=(fault,), builders=builders)


def caught(builders: Builders, fault: Callable[[], Fault]) -> Iterator[str]:
    """What the oracle says of worlds with this broken part, each under a fault that needs the part, one by one."""
    reports = (simulate(seed, plan=dense(seed, fault(), builders)) for seed in SEEDS)
    return (r.failure for r in reports if not r.ok)

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(PullFault))
def test_the_unbroken_world_passes_where_the_broken_ones_are_caught(kind: PullFault) -> None:
    assert [*caught(Builders(), lambda: BadPulls(kind, 20))] == []


class TrustingPuller(Puller):
    """Believes the transport: no digest is compared."""

    def _outcome(self, transfer: _Transfer, blocks: Sequence[LentBlock], link: Link) -> str:
        return "verified"


class HastyPuller(Puller):
    """A pull that timed out gives its blocks back at once: no quarantine."""

    def _let_go(self, transfer: _Transfer, end: str) -> None:
        self._transfers.pop(id(transfer), None)


class LeakyPool(BlockPool):
    """Forgets to give the last block of a longer table back."""

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks[:-1] if len(blocks) > 8 else blocks)


class StickyCache(BlockPool):
    """An evicted block stays in the prefix map under its old hash."""

    def _take(self) -> int:
        block = next(reversed(self._free)) if self._free else next(iter(self._cached))
        self._refs[block] = 1
        self._generation[block] += 1
        self._settle(block)
        return block


class ForgetfulLeases(LeaseTable):
    """The timer expires nothing: a lease whose reader died is kept for ever."""

    def expire(self, now: float) -> tuple[str, ...]:
        return ()


class LateCredits(BlockPool):
    """Promises blocks without counting the promise."""

    def bind(self, credit: object) -> list[int]:
        blocks = super().bind(credit)  # type: ignore[arg-type]
        return [blocks[0]] * len(blocks)


@pytest.mark.slow
def test_a_puller_that_skips_digests_is_caught_by_the_tokens() -> None:
    failures = caught(Builders(puller=TrustingPuller), lambda: BadPulls(PullFault.CORRUPT, 20))
    assert any("an undisturbed run" in f for f in failures)


def test_a_puller_without_quarantine_is_caught_by_the_late_bytes_themselves() -> None:
    failures = caught(Builders(puller=HastyPuller), lambda: BadPulls(PullFault.LATE, 20))
    assert any("a pull wrote to block" in f for f in failures)


def test_a_pool_that_leaks_a_block_is_caught_by_the_ledger() -> None:
    failures = caught(Builders(pool=LeakyPool), lambda: BadPulls(PullFault.SLOW, 1))
    assert any("its owners" in f or "still holds" in f for f in failures)


def test_an_evicted_block_that_can_still_be_found_is_caught() -> None:
    assert any(caught(Builders(pool=StickyCache), lambda: BadPulls(PullFault.SLOW, 1)))


@pytest.mark.slow
def test_a_lease_that_never_expires_is_caught_when_the_world_is_quiet() -> None:
    failures = caught(Builders(leases=ForgetfulLeases), lambda: Partition("workers", True, 12.0))
    assert any("still holds" in f for f in failures)


def test_one_block_bound_twice_is_caught() -> None:
    assert any(caught(Builders(pool=LateCredits), lambda: BadPulls(PullFault.SLOW, 1)))


def test_tenants_that_share_a_prefix_share_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: hashes leave the tenant out. All tokens are right; the bytes are another tenant's."""
    root = HashScope.root
    monkeypatch.setattr(HashScope, "root", lambda scope: root(dataclasses.replace(scope, tenant_salt="")))
    failures = caught(Builders(), lambda: BadPulls(PullFault.SLOW, 1))
    assert any("of tenant" in f for f in failures)


# ---- what clients see ------------------------------------------------------------------------------------------------


REQUEST = Request("q", (1, 2, 3), SamplingParams(max_tokens=4, ignore_eos=True))
TOKENS = expected(REQUEST, 48)[0].token_ids


def watch(chunks: Iterable[TokenChunk], error: Exception | None = None, took_s: float = 1.0) -> None:
    oracle = Oracle(load(), 48)
    record = oracle.begins(Job(0.0, REQUEST), 0.0)
    for chunk in chunks:
        oracle.chunk(record, chunk)
    record.error = error if isinstance(error, PeerLost) else None
    oracle.ends(record, took_s)


def chunk(first: int, tokens: Sequence[int], finish: FinishReason | None = None) -> TokenChunk:
    return TokenChunk("q", 1, first, tuple(tokens), finish)


def test_the_right_answer_is_accepted() -> None:
    watch([chunk(0, TOKENS[:1]), chunk(1, TOKENS[1:], FinishReason.LENGTH)])


@pytest.mark.parametrize("chunks", [
    pytest.param([chunk(0, TOKENS[:2]), chunk(1, TOKENS[1:], FinishReason.LENGTH)], id="a repeated token"),
    pytest.param([chunk(0, TOKENS[:1]), chunk(2, TOKENS[2:], FinishReason.LENGTH)], id="a gap"),
    pytest.param([chunk(0, [(TOKENS[0] + 1) % 97])], id="a wrong token"),
    pytest.param([chunk(0, TOKENS[:3], FinishReason.LENGTH)], id="an early end"),
    pytest.param([chunk(0, TOKENS, FinishReason.STOP)], id="a wrong reason"),
    pytest.param([chunk(0, TOKENS, FinishReason.LENGTH), chunk(4, ())], id="news after the end"),
    pytest.param([chunk(0, TOKENS)], id="no end"),
])
def test_a_wrong_answer_is_not(chunks: list[TokenChunk]) -> None:
    with pytest.raises(OracleFailure):
        watch(chunks)


def test_a_failure_without_an_excuse_and_a_late_end_are_not_accepted() -> None:
    with pytest.raises(OracleFailure, match="failed with"):
        watch([chunk(0, TOKENS[:1])], PeerLost("gone"))
    with pytest.raises(OracleFailure, match="its limit was"):
        watch([chunk(0, TOKENS, FinishReason.LENGTH)], took_s=REQUEST.deadline_s + 10)
