"""Many worlds in processes, and the smallest world that still fails."""

from __future__ import annotations

import pytest

from baton.engine.block_pool import BlockPool
from baton.sim.campaign import Summary, run_many, shrink
from baton.sim.more_faults import draw_faults
from baton.sim.simulate import simulate

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
def test_worlds_in_two_processes_are_the_same_worlds() -> None:
    seeds = range(40, 43)
    alone = {r.seed: r for r in run_many(seeds, 1)}
    assert {r.seed: r for r in run_many(seeds, 2)} == alone
    assert sorted(alone) == list(seeds)


@pytest.mark.slow
def test_a_summary_adds_up() -> None:
    reports, summary = [simulate(seed) for seed in (1, 2)], Summary()
    for report in reports:
        summary.add(report)
    assert summary.num_requests == sum(r.num_requests for r in reports)
    assert summary.landed.total() == sum(len(r.faults) for r in reports)
    text = "\n".join(summary.lines(wall_s=0.5))
    assert "2 of 2 worlds ok" in text
    assert f"{round(summary.virtual_s / 0.5):,} times faster than real" in text
    assert all(name in text for r in reports for name, _ in r.faults)


@pytest.mark.slow
def test_what_is_kept_of_a_world_is_kept_and_the_rest_is_as_before() -> None:
    seed = next(s for s in range(100) if len(draw_faults(s)) == 3)
    whole, part = simulate(seed), simulate(seed, kept_faults=(0, 2), kept_jobs=9)
    assert [name for name, _ in part.faults] == [whole.faults[0][0], whole.faults[2][0]]
    assert part.num_requests == 9
    assert part.replay == f"baton simulate --seed {seed} --faults 0,2 --jobs-kept 9 --trace"
    again = simulate(seed, kept_faults=(0, 2), kept_jobs=9)
    assert again == part
    assert simulate(seed, kept_faults=()).faults == ()


@pytest.mark.slow
def test_a_failing_world_is_shrunk_to_the_fault_and_the_clients_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: what returns from quarantine leaks. Only a pull that does not end in time meets it."""
    unquarantine = BlockPool.unquarantine

    def leaks(pool: BlockPool, block: int) -> None:
        pool._refs[block] += 1
        unquarantine(pool, block)

    monkeypatch.setattr(BlockPool, "unquarantine", leaks)
    failed = next(r for r in map(simulate, range(200)) if not r.ok and len(r.faults) > 1)
    small = shrink(failed)
    assert not small.ok
    kept = small.kept_faults or ()
    assert len(kept) < len(failed.faults), small
    assert all(simulate(small.seed, kept_faults=[k for k in kept if k != one]).ok for one in kept), "each is needed"
    assert small.num_requests < failed.num_requests, small
    assert small == shrink(failed), "shrinking is deterministic"
    again = simulate(small.seed, kept_faults=small.kept_faults, kept_jobs=small.kept_jobs)
    assert again == small, "its command replays it"
