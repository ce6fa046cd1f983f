"""Every interleaving of one lender and one reader within the bounds: nothing stale or foreign is ever visible, no byte
lands in a block that is not its pull's, and from every state everything comes back."""

from __future__ import annotations

from typing import Any

import pytest

from baton.kv_transfer.digest import digest
from tests.protocol.bounds import Bounds, content
from tests.protocol.explore import explore

LEASE = "p:boot1:1"


def published(lease_id: str = LEASE) -> tuple[Any, ...]:
    """What the lender says of its first call's only block."""
    return "published", "a", lease_id, ((0, 1, digest(content("a", 0))),), 1


IN_QUARANTINE = (
    ("start", "a"), ("deliver", ("call", "a")), ("hand", "a"), ("deliver", published()), ("deliver", ("state", "a")),
    ("clock at D",), ("deliver", ("release", LEASE, "a")), ("deliver", ("answer", LEASE, True)),
)
"""The pull of `a` timed out, its lease is released, and its bytes may still land."""
TWO_LEASES = (("start", "a"), ("start", "a'"), ("deliver", ("call", "a")), ("deliver", ("call", "a'")))
"""On the same block."""

EXPLORED = {
    "late bytes while blocks are reused": Bounds(
        limits={"reuse at P": 1, "reuse at D": 1, "fence fails": 1, "break": 1}),
    "messages are lost and repeated": Bounds(limits={"drop": 1, "duplicate": 1}),
    "the reader renews its lease": Bounds(limits={"renew": 2}, races=False),
    "the lender crashes and comes back": Bounds(limits={"crash at P": 1, "reuse at P": 1}),
    "the reader crashes and comes back": Bounds(limits={"crash at D": 1, "reuse at D": 1, "drop": 1}, races=False),
    "a pull of two blocks": Bounds(blocks_each=2, limits={"reuse at P": 1}),
    "the next pull beside one in quarantine": Bounds(
        ("a", "b"), before=IN_QUARANTINE, races=False, limits={"clock at P": 0}),
    "two leases on one block": Bounds(
        ("a", "a'"), before=TWO_LEASES, side_by_side=True, races=False, lender_blocks=1,
        limits={"cancel": 0, "no answer": 0, "clock at D": 0, "clock at P": 1, "reuse at P": 1}),
}
QUICK = {"a pull of two blocks"}
FEWEST_STATES = 1_000
"""Each is larger: fewer means that the bounds, or what they allow, went missing."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in EXPLORED])
def test_no_interleaving_shows_foreign_kv_or_keeps_a_block(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    explored = explore(EXPLORED[name])
    with capsys.disabled():
        print(f"\n{name}: {explored}")
    assert explored.num_states > FEWEST_STATES
