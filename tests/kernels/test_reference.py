"""The oracle against definitions written out one number at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.kernels import reference
from baton.kernels.reference import (
    QUERY_TILE,
    Span,
    clear_fresh_blocks,
    paged_attention,
    plan_batch,
    rms_norm,
    rope_,
    rope_tables,
    swiglu,
    write_kv,
)

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 3, 4


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """q [rows, heads, dim], k and v [context, kv_heads, dim] in order of position -> [rows, heads * dim]."""
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            seen = slice(0, start + row + 1)
            scores = (k[seen, head // GROUP] @ q[row, head]) / math.sqrt(q.shape[2])
            weights = torch.exp(scores - scores.max())
            out[row, head] = (weights / weights.sum()) @ v[seen, head // GROUP]
    return out.flatten(1)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from([1, 1, 2, 3, 9])), min_size=1, max_size=6),
    st.sampled_from([2, 3, 16]),
    st.integers(0, 2**32),
)
def test_attention_over_shuffled_tables_is_attention_by_definition(
    sizes: list[tuple[int, int]], block_size: int, seed: int
) -> None:
    """Any mix of contexts and chunk lengths; what no sequence wrote is NaN-free rubbish that must not matter."""
    check_attention(sizes, block_size, seed)


@pytest.mark.parametrize("rows", [QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1, 3 * QUERY_TILE])
def test_attention_in_tiles_is_attention_by_definition(rows: int) -> None:
    check_attention([(0, rows), (17, rows), (5, 1)], 16, rows)


@pytest.mark.parametrize("at_once", [1, 20, 45])
def test_a_large_batch_is_attended_to_in_bounded_parts(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(reference, "MAX_GATHERED_TOKENS", at_once)
    assert len(plan_batch([Span(19, 1, [0, 1])] * 5, 1, 1, 16).groups) == {1: 5, 20: 5, 45: 3}[at_once]
    check_attention([(18, 1), (19, 1), (2, 1), (20, 1), (17, 1), (3, 4)], 16, at_once)


def check_attention(sizes: list[tuple[int, int]], block_size: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    needs = [-(-(start + num) // block_size) for start, num in sizes]
    pool = torch.full((sum(needs) + 3, LAYERS, KV_HEADS, 2, block_size, DIM), 1e6)
    order = torch.randperm(len(pool), generator=random).tolist()
    tables = [[order.pop() for _ in range(need)] for need in needs]
    kv = [torch.randn(start + num, 2, KV_HEADS, DIM, generator=random) for start, num in sizes]

    def run(spans: list[Span], parts: list[Tensor]) -> Tensor:
        plan = plan_batch(spans, LAYERS, KV_HEADS, block_size)
        clear_fresh_blocks(pool, plan)
        rows = torch.cat(parts)
        write_kv(pool, 1, rows, plan)
        q = torch.randn(len(rows), KV_HEADS * GROUP, DIM, generator=random)
        got = paged_attention(pool, 1, q, plan)
        assert got.shape == (len(rows), KV_HEADS * GROUP * DIM)
        first = 0
        for span in spans:
            mine = slice(first, first + span.num_tokens)
            owner = tables.index(list(span.blocks))
            expected = attention_by_definition(q[mine], kv[owner][:, 0], kv[owner][:, 1], span.start)
            torch.testing.assert_close(got[mine], expected, atol=1e-5, rtol=1e-4)
            first = mine.stop
        return got

    before = [(Span(0, start, t), c[:start]) for (start, _), t, c in zip(sizes, tables, kv, strict=True) if start]
    if before:
        run([span for span, _ in before], [part for _, part in before])
    run([Span(start, num, t) for (start, num), t in zip(sizes, tables, strict=True)],
        [c[start:] for (start, _), c in zip(sizes, kv, strict=True)])
    untouched = pool[order]
    assert torch.equal(untouched, torch.full_like(untouched, 1e6)), "a block of nobody was written"
    written = sorted(block for table in tables for block in table)
    assert torch.all((pool[written, 0] == 1e6) | (pool[written, 0] == 0)), "the other layer was written"


def test_kv_is_stored_at_block_layer_head_and_slot() -> None:
    pool = torch.zeros(4, LAYERS, KV_HEADS, 2, 2, DIM)
    kv = torch.arange(3 * 2 * KV_HEADS * DIM, dtype=torch.float32).view(3, 2, KV_HEADS, DIM) + 1
    write_kv(pool, 1, kv, plan_batch([Span(1, 3, [3, 0])], LAYERS, KV_HEADS, 2))
    for row, (block, slot) in enumerate([(3, 1), (0, 0), (0, 1)]):
        for head in range(KV_HEADS):
            for k_or_v in range(2):
                assert torch.equal(pool[block, 1, head, k_or_v, slot], kv[row, k_or_v, head])
    assert pool.count_nonzero() == kv.numel()


@pytest.mark.parametrize(
    ("span", "fresh"),
    [
        (Span(0, 4, [7, 8]), []),  # fills what it begins
        (Span(0, 5, [7, 8]), [8]),
        (Span(4, 1, [7, 8]), [8]),
        (Span(5, 1, [7, 8]), []),  # begun by an earlier step
        (Span(5, 3, [7, 8]), []),
        (Span(2, 4, [7, 8]), [8]),
        (Span(0, 1, [7, 8]), [7]),
    ],
    ids=str,
)
def test_only_blocks_that_are_begun_and_not_filled_are_cleared(span: Span, fresh: list[int]) -> None:
    assert plan_batch([span], 1, 1, 4).fresh_blocks.tolist() == fresh


def test_rope_turns_each_pair_by_its_frequency_times_position() -> None:
    positions, theta, dim = torch.tensor([0, 1, 5, 4000]), 100.0, 6
    x = torch.randn(4, 2, dim, generator=torch.Generator().manual_seed(1))
    turned = x.clone()
    rope_(turned, *rope_tables(positions, dim, theta))
    for row, position in enumerate(positions.tolist()):
        for pair in range(dim // 2):
            angle = position * theta ** (-2 * pair / dim)
            low, high = x[row, :, pair].double(), x[row, :, pair + dim // 2].double()
            expected = torch.stack([low * math.cos(angle) - high * math.sin(angle),
                                    high * math.cos(angle) + low * math.sin(angle)])
            got = torch.stack([turned[row, :, pair], turned[row, :, pair + dim // 2]])
            torch.testing.assert_close(got.double(), expected, atol=1e-3 if position > 100 else 1e-6, rtol=0)


def test_rms_norm_and_swiglu_are_their_formulas() -> None:
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.5])
    torch.testing.assert_close(rms_norm(x, weight, 0.5), x * weight / math.sqrt(12.5 + 0.5))
    gate_up = torch.tensor([[1.0, -2.0, 10.0, 3.0]])
    expected = torch.tensor([[10.0 / (1 + math.exp(-1)), 3.0 * -2.0 / (1 + math.exp(2))]])
    torch.testing.assert_close(swiglu(gate_up), expected)
