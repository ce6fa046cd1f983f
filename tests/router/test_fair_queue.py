"""Who goes first."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from baton.core.config import TenantConfig
from baton.router.fair_queue import MAX_TENANTS, FairQueue, Waiter

TERMS = {
    "paying": TenantConfig(priority="high"),
    "batch": TenantConfig(priority="low"),
    "double": TenantConfig(weight=2.0),
}


def drained(queue: FairQueue[Waiter]) -> list[Waiter]:
    order = []
    while head := queue.head(1):
        order.append(head[0].waiter)
        queue.called(head[0])
    return order


def test_one_tenant_goes_by_arrival() -> None:
    queue: FairQueue[str] = FairQueue({})
    for name in "abc":
        queue.enter("t", 10, name)
    assert drained(queue) == ["a", "b", "c"]


def test_a_higher_class_goes_before_all_of_a_lower_one() -> None:
    queue: FairQueue[str] = FairQueue(TERMS)
    for tenant in ("batch", "other", "paying", "batch", "paying"):
        queue.enter(tenant, 10, tenant)
    assert drained(queue) == ["paying", "paying", "other", "batch", "batch"]


def test_a_tenant_that_comes_late_does_not_wait_for_all_that_another_has_sent_before() -> None:
    queue: FairQueue[str] = FairQueue({})
    for _ in range(100):
        queue.enter("flood", 10, "flood")
    queue.enter("late", 10, "late")
    assert drained(queue).index("late") <= 1


def test_who_was_away_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue({})
    for _ in range(50):
        queue.enter("a", 10, "a")
    for _ in range(30):
        queue.called(*queue.head(1))
    for _ in range(20):
        queue.enter("b", 10, "b")
    head = Counter(drained(queue)[:20])
    assert abs(head["a"] - head["b"]) <= 1


def test_shares_are_counted_in_tokens_and_by_weight() -> None:
    queue: FairQueue[str] = FairQueue(TERMS)
    for _ in range(60):
        queue.enter("double", 10, "double")
        queue.enter("long", 30, "long")
    head = Counter(drained(queue)[:56])
    assert (head["double"], head["long"]) == (48, 8), "2 to 1 in tokens, and theirs are three times as long"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), min_size=1, max_size=60), st.data())
def test_while_two_wait_neither_gets_a_request_more_than_its_share(sent: list[tuple[str, int]], data: st.DataObject
                                                                   ) -> None:
    """The bound of start-time fair queueing: the difference of what two backlogged flows got is at most the longest
    request of each."""
    queue: FairQueue[tuple[str, int]] = FairQueue({})
    for tenant, tokens in sent:
        queue.enter(tenant, tokens, (tenant, tokens))
    waiting = Counter(tenant for tenant, _ in sent)
    longest = {tenant: max(tokens for t, tokens in sent if t == tenant) for tenant in waiting}
    got: Counter[str] = Counter()
    for tenant, tokens in drained(queue):
        got[tenant] += tokens
        waiting[tenant] -= 1
        backlogged = [t for t in waiting if waiting[t]]
        for one in backlogged:
            for other in backlogged:
                assert got[one] - got[other] <= longest[one] + longest[other]


def test_what_is_before_a_newcomer_is_known_before_it_comes() -> None:
    queue: FairQueue[str] = FairQueue(TERMS)
    for _ in range(10):
        queue.enter("flood", 10, "flood")
    assert queue.tokens_before("flood") == 100
    assert queue.tokens_before("late") <= 10
    assert queue.tokens_before("paying") == 0
    assert queue.tokens_before("batch") == queue.tokens == 100


def test_a_seat_given_up_twice_or_in_the_middle_harms_nobody() -> None:
    queue: FairQueue[str] = FairQueue({})
    seats = [queue.enter("t", 10, name) for name in "abc"]
    queue.leave(seats[1])
    queue.leave(seats[1])
    assert drained(queue) == ["a", "c"]
    assert queue.tokens_before("t") == len(queue) == 0


def test_a_request_may_go_in_a_class_below_its_tenants_and_never_below_the_lowest() -> None:
    queue: FairQueue[str] = FairQueue(TERMS)
    queue.enter("paying", 10, "nightly", lower=1)
    queue.enter("batch", 10, "batch", lower=5)
    queue.enter("other", 10, "other")
    queue.enter("paying", 10, "urgent")
    assert queue.tokens_before("paying") == 10
    assert queue.tokens_before("paying", lower=1) == 30
    assert queue.tokens_before("paying", lower=2) == 40
    assert drained(queue) == ["urgent", "nightly", "other", "batch"]


def test_who_gives_up_a_seat_moves_up_what_its_tenant_has_in_that_class_alone() -> None:
    queue: FairQueue[str] = FairQueue({})
    given_up = queue.enter("t", 10, "given up", lower=1)
    queue.enter("t", 10, "own class")
    queue.enter("u", 10, "own class, too")
    queue.enter("t", 10, "moves up", lower=1)
    queue.enter("u", 15, "equal", lower=1)
    queue.enter("u", 10, "later", lower=1)
    queue.leave(given_up)
    assert drained(queue) == ["own class", "own class, too", "moves up", "equal", "later"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.booleans()), max_size=30))
def test_who_gives_up_leaves_the_queue_as_if_he_had_never_come(sent: list[tuple[str, int, bool]]) -> None:
    queue, without = FairQueue[int]({}), FairQueue[int]({})
    queue.enter("a", 10, -1)
    without.enter("a", 10, -1)
    seats = []
    for i, (tenant, tokens, gives_up) in enumerate(sent):
        seat = queue.enter(tenant, tokens, i)
        if gives_up:
            seats.append(seat)
        else:
            without.enter(tenant, tokens, i)
    for seat in seats:
        queue.leave(seat)
    assert [queue.tokens_before(tenant) for tenant in "abcd"] == [without.tokens_before(tenant) for tenant in "abcd"]
    assert drained(queue) == drained(without)


def test_names_that_clients_make_up_are_not_remembered_without_bound() -> None:
    queue: FairQueue[None] = FairQueue({})
    queue.enter("waits", 10, None)
    for i in range(MAX_TENANTS + 10):
        queue.enter(f"made-up-{i}", 10, None)
        queue.called(*queue.head(1))
    assert len(queue._ends) == MAX_TENANTS
