"""Prefixes that are on their way: blocks that workers will hold once they have computed what was sent to them.

The index (index.py) says what is held, and only that can be fetched. A place to compute may be chosen by what is coming
as well: whoever comes behind a prompt with the same prefix finds it computed. So a burst of equal prefixes does not
make every worker compute the same.

Only the worker that computes is counted. One that gets the blocks from another has them too late for whoever comes
meanwhile: those are pulled, or computed, again.

Life of an entry: `expect` at dispatch -> `settle` with the first token (the worker's own events have told of the blocks
by then, or it does not keep them), or when the attempt ends, is refused or lost. Entries name a boot: its successor
inherits nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from baton.core.block_hash import BlockHash

STRIDE = 8
"""Every so many blocks of a prompt have an entry: what is coming is known to 128 tokens, at an eighth of the cost."""


class Coming:
    """One thread, no waits. Memory: an entry for every STRIDE blocks of the prompts that are being computed."""

    def __init__(self, stride: int = STRIDE) -> None:
        self._stride = stride
        self._boots: dict[BlockHash, dict[str, int]] = {}
        """How many prompts bring a block to each boot. A boot that computes a block computes all before it."""
        self._prompts: dict[Hashable, tuple[str, Sequence[BlockHash]]] = {}

    @property
    def num_entries(self) -> int:
        return len(self._boots)

    def expect(self, boot_id: str, key: Hashable, hashes: Sequence[BlockHash]) -> None:
        """That boot will compute a prompt with these blocks. `key` is of one attempt, and not used again before it is
        settled."""
        assert key not in self._prompts, f"{key} is expected already"
        marks = hashes[self._stride - 1 :: self._stride]
        for mark in marks:
            counts = self._boots.setdefault(mark, {})
            counts[boot_id] = counts.get(boot_id, 0) + 1
        self._prompts[key] = boot_id, marks

    def settle(self, key: Hashable) -> None:
        """It was computed, or will not be. An unknown one is no error."""
        boot_id, marks = self._prompts.pop(key, ("", ()))
        for mark in marks:
            counts = self._boots[mark]
            counts[boot_id] -= 1
            if not counts[boot_id]:
                del counts[boot_id]
                if not counts:
                    del self._boots[mark]

    def match(self, hashes: Sequence[BlockHash]) -> Mapping[str, int]:
        """Leading blocks that each boot will have, most first."""
        groups: list[dict[str, int]] = []
        before: Mapping[str, int] = {}
        depth = 0
        for mark in hashes[self._stride - 1 :: self._stride]:
            boots: Mapping[str, int] = self._boots.get(mark, {})
            if len(boots) != len(before):  # they only get fewer
                groups.append(dict.fromkeys((b for b in before if b not in boots), depth))
            if not boots:
                break
            before, depth = boots, depth + self._stride
        else:
            groups.append(dict.fromkeys(before, depth))
        return {boot: num_blocks for group in reversed(groups) for boot, num_blocks in group.items()}
