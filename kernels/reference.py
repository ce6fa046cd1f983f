"""The decoder's arithmetic in plain torch: the oracle that every faster kernel is compared with, and the CPU path.

Owns the maths on tensors: norm, rotary embedding, writing K and V into the paged pool, attention over block tables.
Does not know requests, models or scheduling: a batch is a list of `Span`s.

Life of a batch:
1. `plan_batch` turns spans into row ids and masks, once per step; every layer uses them with an offset.
2. `clear_fresh_blocks` zeroes blocks that this batch begins but does not fill, so that a tail block's bytes (and
   hence its digest) depend on its tokens alone.
3. per layer: `rope_`, `write_kv`, `paged_attention`. Attention reads K and V back from the pool, its own rows' too.

The pool is `[num_blocks, layer, kv_head, K|V, token, dim]` fp32, contiguous, so that the tokens of one (block, layer,
head, K|V) are one run of memory; gathering copies such runs, and the group of query heads that share a KV head
becomes extra query rows of one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_TILE = 64
"""Query rows per attention tile: scores stay in cache and the part above the diagonal is not computed. 512 rows over
2,048 keys took 24 ms in tiles of 32 to 128 and 50 ms in tiles of 256 or more (9 heads x 64, one thread, measured)."""

MAX_GATHERED_TOKENS = 16_384
"""Context tokens copied out of the pool at once, per layer: 25 MB at 3 KV heads x 64. Bounds what many sequences with
one long shared prefix can ask for; a single sequence may exceed it."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence: tokens at positions [start, start + num_tokens), KV at `blocks`."""

    start: int
    num_tokens: int
    blocks: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Query rows [begin, end) of each sequence of a group, over keys [0, num_keys)."""

    begin: int
    end: int
    num_keys: int
    mask_from: int
    """Keys before this one are visible to every row of the tile."""
    hidden: Tensor
    """[num_sequences, 1, end - begin, 1, num_keys - mask_from] bool: keys a row must not see."""


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences with equally many query rows and alike contexts, attended to together."""

    rows: Tensor
    """[num_sequences * num_rows] int64: their rows in the batch."""
    num_sequences: int
    kv_runs: Tensor
    """[2 * num_sequences * num_kv_heads * max_blocks] int64: runs of layer 0 in the pool, K first."""
    tiles: tuple[AttentionTile, ...]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    positions: Tensor
    """[num_tokens] int64."""
    kv_slots: Tensor
    """[num_tokens * 2 * num_kv_heads] int64: (token, dim) rows of layer 0 in the pool."""
    fresh_blocks: Tensor
    """Blocks begun but not filled by this batch."""
    groups: tuple[AttentionGroup, ...]


def plan_batch(spans: Sequence[Span], num_layers: int, num_kv_heads: int, block_size: int) -> BatchPlan:
    """Row ids and masks of a batch whose rows are the spans' tokens in order. Spans must not be empty."""
    positions, owners, fresh = [], [], []
    groups: dict[tuple[int, int], list[tuple[int, Span]]] = {}
    row = 0
    for span in spans:
        assert 0 < span.num_tokens <= span.end <= len(span.blocks) * block_size, span
        where = torch.arange(span.start, span.end)
        positions.append(where)
        owners.append(torch.tensor(span.blocks)[where // block_size])
        if span.end % block_size and span.start <= span.end - span.end % block_size:
            fresh.append(span.blocks[span.end // block_size])
        # Single rows are batched with contexts at most twice as long, so that padding at most doubles what is read.
        context = (-(-span.end // block_size)).bit_length()
        groups.setdefault((1, context) if span.num_tokens == 1 else (span.num_tokens, -row), []).append((row, span))
        row += span.num_tokens
    position, owner = torch.cat(positions), torch.cat(owners)
    runs = _runs(owner, num_layers, num_kv_heads)
    slots = runs * block_size + (position % block_size)[:, None]
    return BatchPlan(
        position,
        torch.stack([slots, slots + block_size], dim=1).flatten(),
        torch.tensor(fresh, dtype=torch.int64),
        tuple(
            _plan_group(members, num_layers, num_kv_heads, block_size)
            for alike in groups.values() for members in _bounded(alike)),
    )


def _bounded(members: list[tuple[int, Span]]) -> Iterator[list[tuple[int, Span]]]:
    size = max(1, MAX_GATHERED_TOKENS // max(span.end for _, span in members))
    for first in range(0, len(members), size):
        yield members[first : first + size]


def _runs(blocks: Tensor, num_layers: int, num_kv_heads: int) -> Tensor:
    """[..., num_kv_heads] ids of the K runs of layer 0 of `blocks`; the V run is the next one."""
    return 2 * (blocks[..., None] * (num_layers * num_kv_heads) + torch.arange(num_kv_heads))


def _plan_group(members: list[tuple[int, Span]], num_layers: int, num_kv_heads: int, block_size: int) -> AttentionGroup:
    num_rows = members[0][1].num_tokens
    width = max(-(-span.end // block_size) for _, span in members)
    table = torch.empty(len(members), width, dtype=torch.int64)
    for line, (_, span) in zip(table, members, strict=True):
        used = -(-span.end // block_size)
        line[:used] = torch.tensor(span.blocks[:used])
        # Padding is masked, but 0 * NaN is NaN: it must be memory that holds numbers, such as the sequence's own.
        line[used:] = span.blocks[0]
    runs = _runs(table, num_layers, num_kv_heads).transpose(1, 2)
    starts = torch.tensor([span.start for _, span in members])
    rows = torch.tensor([first for first, _ in members])[:, None] + torch.arange(num_rows)
    tiles = []
    for begin in range(0, num_rows, QUERY_TILE):
        end = min(begin + QUERY_TILE, num_rows)
        num_keys, mask_from = int(starts.max()) + end, int(starts.min()) + begin + 1
        last_seen = starts[:, None] + torch.arange(begin, end)
        hidden = torch.arange(mask_from, num_keys) > last_seen[:, :, None]
        tiles.append(AttentionTile(begin, end, num_keys, mask_from, hidden[:, None, :, None, :]))
    return AttentionGroup(rows.flatten(), len(members), torch.stack([runs, runs + 1]).flatten(), tuple(tiles))


def clear_fresh_blocks(pool: Tensor, plan: BatchPlan) -> None:
    if len(plan.fresh_blocks):
        pool.index_fill_(0, plan.fresh_blocks, 0.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., hidden]: x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, eq. 4)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each [num_tokens, 1, head_dim / 2] fp32; frequency i is theta^(-2i / head_dim) (Su et al. 2021)."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions.to(torch.float32)[:, None, None] * inverse
    return angles.cos(), angles.sin()


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x [num_tokens, num_heads, head_dim] in place; pairs are (i, i + head_dim / 2), the half-split form."""
    low, high = x.chunk(2, dim=-1)
    rotated = low * cos - high * sin
    high.copy_(high * cos + low * sin)
    low.copy_(rotated)


def write_kv(pool: Tensor, layer: int, kv: Tensor, plan: BatchPlan) -> None:
    """Store kv [num_tokens, 2, num_kv_heads, head_dim] (rotated K, then V) of one layer into the pool."""
    num_kv_heads, block_size, head_dim = pool.shape[2], pool.shape[4], pool.shape[5]
    slots = plan.kv_slots + layer * num_kv_heads * 2 * block_size
    pool.view(-1, head_dim).index_copy_(0, slots, kv.reshape(-1, head_dim))


def paged_attention(pool: Tensor, layer: int, q: Tensor, plan: BatchPlan) -> Tensor:
    """Causal attention of q [num_tokens, num_heads, head_dim] (rotated) over each sequence's whole context.

    Returns [num_tokens, num_heads * head_dim]. Reads the pool alone: chunked, cached and received KV are one case.
    """
    out = torch.empty_like(q)
    if len(plan.groups) == 1:  # the rows are in order: no need to pick and put back
        return _attend(pool, layer, q, plan.groups[0]).flatten(1)
    for group in plan.groups:
        out.index_copy_(0, group.rows, _attend(pool, layer, q.index_select(0, group.rows), group))
    return out.flatten(1)


def _attend(pool: Tensor, layer: int, q: Tensor, group: AttentionGroup) -> Tensor:
    """q [num_sequences * num_rows, num_heads, head_dim] of one group; returns the same shape."""
    _, _, num_kv_heads, _, block_size, head_dim = pool.shape
    batch, num_heads = group.num_sequences, q.shape[1]
    runs = group.kv_runs + layer * num_kv_heads * 2
    kv = pool.view(-1, block_size * head_dim).index_select(0, runs).view(2, batch * num_kv_heads, -1, head_dim)
    # [sequence, kv head, row, head of the group, dim]
    queries = (q * (1.0 / math.sqrt(head_dim))).view(batch, -1, num_kv_heads, num_heads // num_kv_heads, head_dim)
    queries = queries.transpose(1, 2)
    out = torch.empty_like(queries)
    for tile in group.tiles:
        part = queries[:, :, tile.begin : tile.end]
        rows = part.reshape(batch * num_kv_heads, -1, head_dim)
        scores = torch.bmm(rows, kv[0, :, : tile.num_keys].transpose(1, 2))
        late = scores.view(*part.shape[:-1], tile.num_keys)[..., tile.mask_from :]
        late.masked_fill_(tile.hidden, -math.inf)
        mixed = torch.bmm(torch.softmax(scores, dim=-1), kv[1, :, : tile.num_keys])
        out[:, :, tile.begin : tile.end] = mixed.view(part.shape)
    return out.transpose(1, 2).reshape(q.shape)


def swiglu(gate_up: Tensor) -> Tensor:
    """[num_tokens, 2 * intermediate], gate first: silu(gate) * up (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
