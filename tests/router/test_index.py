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
WORD = st.tuples(st.sampled_from(["events", "snapshot", "drop"]), WORKERS, HASHES, HASHES)
"""(what is said, of whom, stored, removed)."""
Word = tuple[str, str, tuple[BlockHash, ...], tuple[BlockHash, ...]]


def leading(held: set[BlockHash], hashes: tuple[BlockHash, ...]) -> int:
    n = 0
    while n < len(hashes) and hashes[n] in held:
        n += 1
    return n


class Naive:
    """A set of hashes per worker, told the same as an index."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.held: dict[str, set[BlockHash]] = {}
        self._seqs: dict[str, int] = {}

    def say(self, kind: str, worker: str, stored: tuple[BlockHash, ...], removed: tuple[BlockHash, ...]) -> None:
        match kind:
            case "snapshot":
                self.held[worker], self._seqs[worker] = set(stored), len(removed)
                self.index.apply_snapshot(worker, "boot", KVSnapshot(len(removed), stored))
            case "drop":
                self.held.pop(worker, None)
                self.index.drop(worker)
            case "events" if worker in self.held:
                self.held[worker] = (self.held[worker] - set(removed)) | set(stored)
                self._seqs[worker] += 1
                assert self.index.apply(worker, "boot", KVEvents(self._seqs[worker], stored, removed))
            case _:
                assert not self.index.apply(worker, "boot", KVEvents(1, stored, removed))

    def match(self, hashes: tuple[BlockHash, ...]) -> dict[str, int]:
        counts = {worker: leading(held, hashes) for worker, held in self.held.items()}
        return {worker: n for worker, n in counts.items() if n}


@given(st.lists(st.tuples(WORD, HASHES), max_size=30))
def test_it_answers_like_a_set_of_hashes_per_worker(words: list[tuple[Word, tuple[BlockHash, ...]]]) -> None:
    index = PrefixIndex()
    naive = Naive(index)
    for word, asked in words:
        naive.say(*word)
        found = index.match(asked)
        assert found == naive.match(asked)
        assert list(found.values()) == sorted(found.values(), reverse=True), "most first"
        assert len(found) == len(list(found))
        assert index.num_blocks == len(set().union(*naive.held.values()))
        assert index.num_entries == sum(map(len, naive.held.values()))
        assert all(index.num_held(w) == len(naive.held.get(w, ())) for w in "abcd")


@given(st.lists(st.tuples(WORD, HASHES), max_size=40))
def test_however_slowly_it_sweeps_nothing_is_said_of_who_is_gone(
    words: list[tuple[Word, tuple[BlockHash, ...]]],
) -> None:
    """Bits are used again, by new workers and by new boots of old ones, while old entries are still there."""
    index = PrefixIndex(slice_entries=1)
    naive = Naive(index)
    for word, asked in words:
        naive.say(*word)
        assert index.match(asked) == naive.match(asked)
        assert index.num_blocks >= len(set().union(*naive.held.values()))
    for _ in range(100):
        index.drop("nobody")
        naive.say("snapshot", "a", (), ())
    assert index.num_blocks == len(set().union(*naive.held.values())), "in the end all is swept"


@given(st.lists(st.tuples(WORD, HASHES), max_size=40), st.integers(1, 12))
def test_a_full_index_claims_no_block_that_is_not_held_and_counts_what_it_drops(
    words: list[tuple[Word, tuple[BlockHash, ...]]], limit: int
) -> None:
    index = PrefixIndex(max_entries=limit, slice_entries=2)
    naive = Naive(index)
    for word, asked in words:
        before = index.num_dropped
        naive.say(*word)
        truth = naive.match(asked)
        assert all(n <= truth.get(worker, 0) for worker, n in index.match(asked).items())
        assert index.num_entries <= limit
        assert all(index.num_held(w) <= len(naive.held.get(w, ())) for w in "abcd")
        if word[0] == "snapshot" and len(set(word[2])) > limit:
            assert index.num_dropped > before
    if sum(map(len, naive.held.values())) > limit:
        assert index.num_dropped > 0


def test_what_prompts_ask_for_outlives_what_nobody_asked_for() -> None:
    index = PrefixIndex(max_entries=64, slice_entries=8)
    hot = [h(i) for i in range(4)]
    index.apply_snapshot("a", "boot", KVSnapshot(0, tuple(h(i) for i in range(64))))
    for seq in range(1, 200):
        assert index.match(hot) == {"a": 4}
        index.apply("a", "boot", KVEvents(seq, stored=(h(1000 + seq),)))
    assert index.num_dropped >= 100


def test_the_worker_that_holds_most_makes_room() -> None:
    index = PrefixIndex(max_entries=40, slice_entries=4)
    index.apply_snapshot("few", "boot", KVSnapshot(0, tuple(h(i) for i in range(8))))
    index.apply_snapshot("many", "boot", KVSnapshot(0, tuple(h(i) for i in range(100, 300))))
    assert (index.num_held("few"), index.num_held("many")) == (8, 32)
    assert index.num_dropped == 168


def test_a_worker_that_comes_while_another_is_swept_out_has_a_bit_of_its_own() -> None:
    index = PrefixIndex(slice_entries=1)
    index.apply_snapshot("a", "boot", KVSnapshot(0, tuple(h(i) for i in range(9))))
    index.drop("a")
    assert index.num_blocks == 8, "one was swept at once"
    index.apply_snapshot("b", "boot", KVSnapshot(0, ()))
    index.apply_snapshot("a", "boot-2", KVSnapshot(0, (h(0),)))
    assert index.match([h(i) for i in range(9)]) == {"a": 1}


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
