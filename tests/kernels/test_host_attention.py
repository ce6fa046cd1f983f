"""Attention of the host kernels: against attention by definition in float64, for each instruction set and KV format;
and that a row's bits depend on that row alone.

Pools are made here, byte by byte, and filled with NaN first: what no token wrote must not be seen."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.kernels.host import library

Floats = NDArray[np.float32]
FORMATS = ("fp32", "bf16", "int8")
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
NUM_LAYERS, LAYER = 3, 1


@dataclass(frozen=True)
class Heads:
    num_kv_heads: int
    group: int
    head_dim: int

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


SMOL = Heads(3, 3, 64)
SHAPES = [SMOL, Heads(1, 4, 128), Heads(2, 1, 32), Heads(1, 7, 80), Heads(1, 2, 256), Heads(2, 2, 16), Heads(1, 2, 8)]


@dataclass(frozen=True)
class Part:
    """Rows [start, start + num_rows) of a sequence."""

    sequence: int
    start: int
    num_rows: int


class Pool:
    """Sequences' keys and values in blocks whose ids are a permutation drawn from `seed`."""

    def __init__(self, heads: Heads, format: str, block_size: int, lengths: Sequence[int], seed: int = 0,
                 rubbish: int = 0xFF) -> None:
        self.heads, self.format, self.block_size = heads, format, block_size
        needs = [-(-length // block_size) for length in lengths]
        ids = np.random.default_rng(seed).permutation(sum(needs) + 2).tolist()
        self.tables = [[ids.pop() for _ in range(need)] for need in needs]
        elements = block_size * heads.head_dim * ELEMENT_BYTES[format]
        self.run_bytes = elements + 4 * block_size * (format == "int8")
        size = (sum(needs) + 2) * NUM_LAYERS * heads.num_kv_heads * 2 * self.run_bytes
        room = np.full(size + 64, rubbish, dtype=np.uint8)  # 0xff: NaN as fp32 and as bf16; int8 scales are NaN
        self.bytes = room[-room.ctypes.data % 64 :][:size]
        self.runs = self.bytes.reshape(-1, NUM_LAYERS, heads.num_kv_heads, 2, self.run_bytes)
        self.seen: dict[tuple[int, int], Tensor] = {}

    def write(self, sequence: int, kv: Tensor) -> None:
        """kv [tokens, 2, num_kv_heads, head_dim] fp32, from position 0. Keeps what they stand for in `seen`."""
        for token, values in enumerate(kv):
            block, slot = self.tables[sequence][token // self.block_size], token % self.block_size
            self.seen[sequence, token] = self._write_token(block, slot, values.transpose(0, 1).contiguous())

    def _write_token(self, block: int, slot: int, values: Tensor) -> Tensor:
        dim = self.heads.head_dim
        runs = self.runs[block, LAYER]
        row_bytes = dim * ELEMENT_BYTES[self.format]
        at = slice(slot * row_bytes, (slot + 1) * row_bytes)
        if self.format == "fp32":
            runs[:, :, at] = values.numpy().view(np.uint8)
            return values.double()
        if self.format == "bf16":
            stored = values.bfloat16()
            runs[:, :, at] = stored.view(torch.uint8).numpy()
            return stored.double()
        scale = values.abs().amax(-1, keepdim=True) / 127
        whole = (values / scale).round().to(torch.int8)
        runs[:, :, at] = whole.numpy().view(np.uint8)
        scales = self.block_size * dim
        runs[:, :, scales + 4 * slot : scales + 4 * slot + 4] = scale.numpy().view(np.uint8)
        return whole.double() * scale.double()

    def context(self, sequence: int, length: int) -> Tensor:
        """[num_kv_heads, 2, length, head_dim] float64, as stored."""
        return torch.stack([self.seen[sequence, token] for token in range(length)], dim=2)


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in library.isas():
        pytest.skip(f"this CPU has no {request.param}")
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def team() -> Iterator[int]:
    host = library.load()
    handle = host.baton_team_new(2, 20)
    yield handle
    host.baton_team_free(handle)


def attention(isa: str, team: int, pool: Pool, parts: Sequence[Part], q: Floats) -> Floats:
    """q [rows of all parts, num_heads, head_dim]; returns the same shape."""
    heads = pool.heads
    shape = library.Shape()
    shape.num_heads, shape.num_kv_heads, shape.head_dim = heads.num_heads, heads.num_kv_heads, heads.head_dim
    shape.num_layers, shape.block_size, shape.kv_format = NUM_LAYERS, pool.block_size, library.FORMATS[pool.format]
    spans = (library.Span * len(parts))()
    blocks: list[int] = []
    row = 0
    for span, part in zip(spans, parts, strict=True):
        used = -(-(part.start + part.num_rows) // pool.block_size)
        span.row, span.num_rows, span.start, span.first_block = row, part.num_rows, part.start, len(blocks)
        blocks += pool.tables[part.sequence][:used]
        row += part.num_rows
    assert q.shape == (row, heads.num_heads, heads.head_dim)
    table = np.array(blocks, dtype=np.int32)
    batch = library.Batch(spans=ctypes.addressof(spans), blocks=table.ctypes.data, pool=pool.bytes.ctypes.data,
                          num_rows=row, num_spans=len(parts))
    q, out = np.ascontiguousarray(q), np.full(q.shape, np.nan, dtype=np.float32)
    library.load().baton_attention(isa.encode(), team, ctypes.byref(shape), ctypes.byref(batch), LAYER,
                                   q.ctypes.data, out.ctypes.data)
    return out


def in_bf16(isa: str, format: str) -> bool:
    """Whether products are of bf16 values (with fp32 sums)."""
    return isa in ("avx512", "amx") and format != "fp32"


def by_definition(pool: Pool, part: Part, q: Floats, rounded: bool) -> tuple[Tensor, Tensor]:
    """[rows, num_heads, head_dim] float64: attention, and how far fp32 sums may be off it.

    A score is a sum of up to sum(|q| |k|); its rounding shifts a weight by that part of itself. Weights in bf16 are off
    by at most 2^-8 of themselves. Both come out as a part of the weighted mean of |value|."""
    heads = pool.heads
    context = pool.context(part.sequence, part.start + part.num_rows)
    scale = np.float32(math.log2(math.e) / math.sqrt(heads.head_dim))
    asked = torch.from_numpy(q * scale)
    asked = (asked.bfloat16() if rounded else asked).double().view(-1, heads.num_kv_heads, heads.group, heads.head_dim)
    scores = torch.einsum("rhgd,htd->rhgt", asked, context[:, 0]) * math.log(2)
    last = part.start + torch.arange(part.num_rows)
    hidden = torch.arange(context.shape[2]) > last[:, None]
    weights = torch.softmax(scores.masked_fill(hidden[:, None, None, :], -math.inf), dim=-1)
    mean = torch.einsum("rhgt,htd->rhgd", weights, context[:, 1])
    size = torch.einsum("rhgt,htd->rhgd", weights, context[:, 1].abs())
    reach = torch.einsum("rhgd,htd->rhgt", asked.abs(), context[:, 0].abs()).amax(-1, keepdim=True)
    part_off = 2.0**-21 * (8 + reach) + (2.0**-8 + 3e-4) * rounded
    return mean.flatten(1, 2), (part_off * size + 1e-6).flatten(1, 2)


def filled(heads: Heads, format: str, block_size: int, lengths: Sequence[int], seed: int = 0,
           rubbish: int = 0xFF, steepest: float = 1.0) -> Pool:
    """Later keys are larger, up to `steepest`: at 8, each row's reference rises at tiles of its own."""
    pool = Pool(heads, format, block_size, lengths, seed, rubbish)
    random = torch.Generator().manual_seed(7)
    for sequence, length in enumerate(lengths):
        kv = torch.randn(length, 2, heads.num_kv_heads, heads.head_dim, generator=random)
        kv[:, 0] *= torch.linspace(1.0, steepest, length)[:, None, None]
        pool.write(sequence, kv)
    return pool


def queries(heads: Heads, num_rows: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((num_rows, heads.num_heads, heads.head_dim), dtype=np.float32)


def check(isa: str, team: int, pool: Pool, parts: Sequence[Part], q: Floats) -> None:
    got = torch.from_numpy(attention(isa, team, pool, parts, q)).double()
    row = 0
    for part in parts:
        mine = slice(row, row + part.num_rows)
        expected, bound = by_definition(pool, part, q[mine], in_bf16(isa, pool.format))
        error = (got[mine] - expected).abs()
        assert torch.all(error <= bound), (part, (error / bound).max())
        row = mine.stop


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_attention_is_attention_by_definition(isa: str, team: int, format: str, heads: Heads) -> None:
    parts = [Part(0, 0, 70), Part(1, 40, 1), Part(2, 127, 1), Part(3, 31, 5), Part(4, 0, 1), Part(5, 128, 1)]
    pool = filled(heads, format, 16, [part.start + part.num_rows for part in parts])
    check(isa, team, pool, parts, queries(heads, sum(part.num_rows for part in parts)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_key_tiles_may_span_blocks(isa: str, team: int, format: str, block_size: int) -> None:
    parts = [Part(0, 0, 150), Part(1, 300, 3), Part(2, 95, 1), Part(3, 96, 1)]
    pool = filled(SMOL, format, block_size, [part.start + part.num_rows for part in parts])
    check(isa, team, pool, parts, queries(SMOL, 155))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("height", [10, 80])
def test_scores_that_rise_along_the_context_are_rescaled(isa: str, team: int, format: str, height: int) -> None:
    """Each tile's scores pass the greatest so far by far, then fall: what was summed up first must shrink to nothing
    and what comes last must not count. From the greater height, weights by the first reference would be infinite."""
    pool = Pool(SMOL, format, 16, [600])
    random = torch.Generator().manual_seed(3)
    kv = torch.randn(600, 2, 3, 64, generator=random)
    steep = torch.cat([torch.arange(400), torch.arange(400, 0, -2)]) * (height / 400)
    kv[:, 0] *= 0.02
    kv[:, 0] += steep[:, None, None]
    pool.write(0, kv)
    check(isa, team, pool, [Part(0, 500, 100)], np.abs(queries(SMOL, 100)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("offset", [-100.0, 100.0])
def test_a_number_added_to_all_scores_changes_nothing_much(isa: str, team: int, format: str, offset: float) -> None:
    pool = Pool(SMOL, format, 16, [90])
    kv = torch.randn(90, 2, 3, 64, generator=torch.Generator().manual_seed(4))
    kv[:, 0, :, 0] = offset
    pool.write(0, kv)
    q = queries(SMOL, 90)
    q[:, :, 0] = 16
    check(isa, team, pool, [Part(0, 0, 90)], q)


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_rounding_to_bf16_costs_less_than_half_a_percent(isa: str, team: int, format: str) -> None:
    """Against attention over the same stored values with nothing rounded."""
    pool, q = filled(SMOL, format, 16, [256]), queries(SMOL, 64)
    exact, _ = by_definition(pool, Part(0, 192, 64), q, rounded=False)
    error = torch.from_numpy(attention(isa, team, pool, [Part(0, 192, 64)], q)) - exact
    assert error.square().mean().sqrt() < 0.005 * exact.square().mean().sqrt()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("heads", [SMOL, Heads(1, 4, 128), Heads(1, 1, 64), Heads(1, 7, 80)], ids=str)
def test_a_row_s_bits_do_not_depend_on_its_chunk(isa: str, team: int, format: str, heads: Heads) -> None:
    """The same rows at once, one at a time, in chunks of any split: equal, bit for bit."""
    length = 300
    pool, q = filled(heads, format, 16, [length], steepest=8.0), queries(heads, length)
    whole = attention(isa, team, pool, [Part(0, 0, length)], q)
    assert np.isfinite(whole).all()
    random = np.random.default_rng(5)
    cuts = [*(sorted(random.choice(length, size=9, replace=False).tolist()) for _ in range(4)), list(range(1, 65))]
    for cut in cuts:
        ends = [*cut, length]
        begin = 0
        for end in ends:
            if end > begin:
                some = attention(isa, team, pool, [Part(0, begin, end - begin)], q[begin:end])
                assert np.array_equal(some.view(np.int32), whole[begin:end].view(np.int32)), (begin, end)
            begin = end
    for row in [0, 15, 16, 31, 32, 33, 127, 128, 129, 299]:
        alone = attention(isa, team, pool, [Part(0, row, 1)], q[row : row + 1])
        assert np.array_equal(alone.view(np.int32), whole[row : row + 1].view(np.int32)), row


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_s_bits_do_not_depend_on_the_batch_the_blocks_or_what_follows(isa: str, team: int, format: str) -> None:
    """Among other sequences, through another block table, with other tokens written after it."""
    lengths = [200, 33, 97, 128, 1]
    pool = filled(SMOL, format, 16, lengths, steepest=8.0)
    parts = [Part(2, 60, 37), Part(0, 199, 1), Part(1, 0, 33), Part(3, 120, 8), Part(4, 0, 1)]
    q = queries(SMOL, sum(part.num_rows for part in parts))
    together = attention(isa, team, pool, parts, q)
    moved = filled(SMOL, format, 16, lengths, seed=9, steepest=8.0)
    assert moved.tables != pool.tables
    row = 0
    for part in parts:
        mine = slice(row, row + part.num_rows)
        assert np.array_equal(attention(isa, team, moved, [part], q[mine]), together[mine]), part
        first = Part(part.sequence, part.start, 1)  # others of its sequence lie behind it now
        assert np.array_equal(attention(isa, team, pool, [first], q[row : row + 1]), together[row : row + 1])
        row = mine.stop


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 127, 129])
def test_slots_that_nobody_wrote_do_not_matter(isa: str, team: int, format: str, length: int) -> None:
    """Bit for bit: NaN behind the last row, and then numbers."""
    pool, q = filled(SMOL, format, 64, [length]), queries(SMOL, length)
    got = attention(isa, team, pool, [Part(0, 0, length)], q)
    assert np.isfinite(got).all()
    assert not np.isfinite(pool.runs.view(np.float32)).all()
    again = filled(SMOL, format, 64, [length], rubbish=0x3F)
    assert np.array_equal(attention(isa, team, again, [Part(0, 0, length)], q), got)


def test_instruction_sets_agree_to_rounding_in_fp32(isa: str, team: int) -> None:
    pool, q = filled(SMOL, "fp32", 32, [190]), queries(SMOL, 190)
    mine = attention(isa, team, pool, [Part(0, 0, 190)], q)
    np.testing.assert_allclose(mine, attention("scalar", team, pool, [Part(0, 0, 190)], q), atol=3e-6)
