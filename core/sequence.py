"""A sequence is `num_computed_tokens` catching up with `num_tokens`. Chunked prefill, prefix hits, received KV,
decode and draft tokens are all that one case, so the scheduler has no phases and the engine no roles."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from baton.core.block_hash import BlockHash
from baton.core.request import Choice, FinishReason, Request


@dataclass(slots=True)
class BlockTable:
    """Physical block ids of a sequence, in order. Append-only while the sequence runs; the pool owns the blocks."""

    block_size: int
    blocks: list[int] = field(default_factory=list)

    @property
    def capacity_tokens(self) -> int:
        return len(self.blocks) * self.block_size


@dataclass(slots=True)
class SequenceState:
    """One running generation on one worker. Owned by the scheduler between `add` and `remove`."""

    request: Request
    epoch: int
    tokens: list[int]
    """prompt + output; while there are several choices, the prompt."""
    block_table: BlockTable
    choices: tuple[int, ...]
    """Indices of the answers that begin with these tokens. Several: the sequence ends with the first token of each."""
    max_output_tokens: int
    """End after this many output tokens: sampling.max_tokens, cut to the context; on a prefill worker
    one more than it begins with."""
    num_computed_tokens: int = 0
    """Tokens whose KV is in the blocks (committed steps only)."""
    num_tokens_in_flight: int = 0
    """Tokens of this sequence inside steps that were scheduled but not committed; one of them may be unknown still."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix map or received: not computed here."""
    num_expected_blocks: int = 0
    """Leading blocks that the prefix map had when it was last looked at, while the sequence waited."""
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Of the full blocks of `tokens`, as far as they were needed."""
    converted: bool = False
    """Some of its KV came in another format and was converted: none of its blocks may enter the prefix map, where a
    block is what its tokens alone give."""
    finish: FinishReason | None = None
    num_preemptions: int = 0
    arrival: int = 0
    """Order of arrival at the scheduler; the youngest is preempted first."""

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_uncomputed_tokens(self) -> int:
        """What a step could still take: tokens known, neither computed nor in flight. -1 while it runs ahead."""
        return len(self.tokens) - self.num_computed_tokens - self.num_tokens_in_flight


def new_sequence(request: Request, epoch: int, block_size: int, max_output_tokens: int) -> SequenceState:
    """A sequence that has computed nothing. Delivered tokens of an only choice are part of its tokens: they are
    replayed."""
    choices = tuple(choice.index for choice in request.choices)
    return SequenceState(request, epoch, [*request.shared], BlockTable(block_size), choices, max_output_tokens)


def fork_sequence(leader: SequenceState, choice: Choice, blocks: list[int], max_output_tokens: int) -> SequenceState:
    """One choice of a sequence of several, after its prompt: `blocks` are its own references (full blocks shared,
    the partial tail copied) and hold the KV of `leader.num_computed_tokens` tokens."""
    request_id = f"{leader.request_id}.{choice.index}"
    sampling = leader.request.seeded_sampling
    request = dataclasses.replace(leader.request, choices=(choice,), request_id=request_id, sampling=sampling)
    child = new_sequence(request, leader.epoch, leader.block_table.block_size, max_output_tokens)
    child.block_table.blocks.extend(blocks)
    child.num_computed_tokens = leader.num_computed_tokens
    child.num_cached_tokens = leader.num_cached_tokens
    child.converted = leader.converted
    child.block_hashes = leader.block_hashes[: leader.num_computed_tokens // leader.block_table.block_size]
    return child
