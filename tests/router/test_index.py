"""The prefix index against a naive model: a set of hashes per worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.block_hash import BlockHash
from baton.core.messages import KVEvents, KVSnapshot
from baton.router.index import PrefixIndex


def h(i: int) -> BlockHash:
    return BlockHash(i.to_bytes(16, "little"))


HASHES = st.lists(st.integers(0, 7), max_size=6).map(lambda ids: tuple(h(i) for i in ids))
WORKERS = st.sampled_from(["a", "b", "c", "d"])
ACTIONS = st.one_of(
    st.tuples(st.just("events"), WORKERS, HASHES, HASHES),
    st.tuples(st.just("snapshot"), WORKERS, HASHES, HASHES),
    st.tuples(st.just("drop"), WORKERS, HASHES, HASHES),
)


def leading(held: set[BlockHash], hashes: tuple[BlockHash, ...]) -> int:
    n = 0
    while n < len(hashes) and hashes[n] in held:
        n += 1
    return n


@given(st.lists(st.tuples(ACTIONS, HASHES), max_size=30))
def test_it_answers_like_a_set_of_hashes_per_worker(
    actions: list[tuple[tuple[str, str, tuple[BlockHash, ...], tuple[BlockHash, ...]], tuple[BlockHash, ...]]],
) -> None:
    index = PrefixIndex()
    held: dict[str, set[BlockHash]] = {}
    seqs: dict[str, int] = {}
    for (kind, worker, stored, removed), asked in actions:
        match kind:
            case "snapshot":
                held[worker], seqs[worker] = set(stored), len(removed)
                index.apply_snapshot(worker, "boot", KVSnapshot(seqs[worker], stored))
            case "drop":
                held.pop(worker, None)
                index.drop(worker)
            case "events" if worker in held:
                held[worker] = (held[worker] - set(removed)) | set(stored)
                seqs[worker] += 1
                assert index.apply(worker, "boot", KVEvents(seqs[worker], stored, removed))
            case _:
                assert not index.apply(worker, "boot", KVEvents(1, stored, removed))
        naive = {w: leading(hashes, asked) for w, hashes in held.items()}
        assert index.match(asked) == {w: n for w, n in naive.items() if n}
        assert index.num_blocks == len(set().union(*held.values()))
        assert all(index.num_held(w) == len(held.get(w, ())) for w in "abcd")


def loaded() -> PrefixIndex:
    index = PrefixIndex()
    index.apply_snapshot("a", "boot-1", KVSnapshot(7, (h(1), h(2))))
    return index


def test_a_gap_in_the_events_is_refused_and_changes_nothing() -> None:
    index = loaded()
    assert not index.apply("a", "boot-1", KVEvents(9, stored=(h(3),)))
    assert index.match([h(1), h(2), h(3)]) == {"a": 2}
    assert index.apply("a", "boot-1", KVEvents(8, stored=(h(3),)))
    assert index.match([h(1), h(2), h(3)]) == {"a": 3}


@pytest.mark.parametrize("seq", [1, 6, 7])
def test_an_event_that_the_snapshot_already_holds_changes_nothing(seq: int) -> None:
    index = loaded()
    assert index.apply("a", "boot-1", KVEvents(seq, removed=(h(1),)))
    assert index.match([h(1), h(2)]) == {"a": 2}


def test_events_of_another_boot_are_refused() -> None:
    index = loaded()
    assert not index.apply("a", "boot-2", KVEvents(8, stored=(h(3),)))


def test_a_snapshot_of_a_new_boot_voids_everything_said_before() -> None:
    index = loaded()
    index.apply_snapshot("a", "boot-2", KVSnapshot(0, (h(5),)))
    assert index.match([h(1)]) == {}
    assert index.match([h(5)]) == {"a": 1}
    assert index.num_blocks == 1
    assert index.apply("a", "boot-2", KVEvents(1, stored=(h(6),)))


def test_a_block_in_the_middle_does_not_count_without_its_head() -> None:
    assert loaded().match([h(9), h(1), h(2)]) == {}


def test_a_worker_that_comes_after_another_left_does_not_inherit_its_blocks() -> None:
    index = loaded()
    index.drop("a")
    index.apply_snapshot("b", "boot", KVSnapshot(0, ()))
    assert index.match([h(1)]) == {}
    assert index.num_blocks == 0


def test_more_workers_than_bits_in_a_machine_word() -> None:
    index = PrefixIndex()
    for i in range(100):
        index.apply_snapshot(f"w{i}", "boot", KVSnapshot(0, tuple(h(j) for j in range(i))))
    assert index.match([h(j) for j in range(100)]) == {f"w{i}": i for i in range(1, 100)}
