"""KV from one element type to another: the bytes that a step would have stored, and how far a round trip leads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from baton.core.layout import CONVERTIBLE, KVLayout
from baton.kernels.host import library
from baton.kernels.host.convert import convert_kv
from tests.kernels.kv_bytes import BLOCK_SIZE, Bytes, Floats, read, run_bytes, stored

PAIRS = list(itertools.permutations(CONVERTIBLE, 2))


def converted(runs: Bytes, source: str, destination: str, head_dim: int) -> Bytes:
    out = np.full((len(runs) + 1, run_bytes(destination, head_dim)), 0xEE, np.uint8)
    theirs, ours = (KVLayout(1, 1, head_dim, BLOCK_SIZE, dtype) for dtype in (source, destination))
    convert_kv(theirs, ours, np.ascontiguousarray(runs).data.cast("B"), out[:-1].data.cast("B"))
    assert np.all(out[-1] == 0xEE), "a neighbour was written"
    return out[:-1]


def values_of(num_runs: int, head_dim: int, seed: int = 3) -> Floats:
    """Rows of very different size; the last tokens of each run are not filled."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((num_runs, BLOCK_SIZE, head_dim), dtype=np.float32)
    values *= np.exp2(rng.integers(-12, 6, (num_runs, BLOCK_SIZE, 1))).astype(np.float32)
    values[:, 11:] = 0
    return values


@pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_converted_bytes_are_those_of_the_values_stored_in_the_other_type(
    source: str, destination: str, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = stored(values_of(5, head_dim), source)
    expected = stored(read(theirs, source, head_dim), destination)
    for isa in library.isas():
        with monkeypatch.context() as patch:
            patch.setattr(library, "isas", lambda isa=isa: (isa,))
            np.testing.assert_array_equal(converted(theirs, source, destination, head_dim), expected, isa)


def test_slots_that_are_not_filled_stay_zeros() -> None:
    for source, destination in PAIRS:
        runs = converted(stored(values_of(3, 64), source), source, destination, 64)
        row_bytes = {"fp32": 256, "bf16": 128, "int8": 64}[destination]
        assert not runs[:, 11 * row_bytes : BLOCK_SIZE * row_bytes].any()
        assert not read(runs, destination, 64)[:, 11:].any()


@pytest.mark.parametrize(("source", "destination"), PAIRS)
def test_a_row_that_is_no_number_is_none_in_the_other_type_and_its_neighbours_do_not_change(
    source: str, destination: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lane spoils it. In int8 it is the scale that does."""
    lanes, size = 64, {"fp32": 4, "bf16": 2, "int8": 1}[source]
    sound = stored(values_of(1, lanes), source)
    for isa in library.isas():
        with monkeypatch.context() as patch:
            patch.setattr(library, "isas", lambda isa=isa: (isa,))
            wanted = read(converted(sound, source, destination, lanes), destination, lanes)
            for lane in range(1 if source == "int8" else lanes):
                runs = sound.copy()
                where = BLOCK_SIZE * lanes + 4 * 5 if source == "int8" else (5 * lanes + lane) * size
                runs[0, where : where + max(size, 4 * (source == "int8"))] = 0xFF
                found = read(converted(runs, source, destination, lanes), destination, lanes)
                spoiled = np.isnan(found[0, 5])
                assert spoiled[lane], (isa, lane)
                assert spoiled.all() == ("int8" in (source, destination)), (isa, lane)
                np.testing.assert_array_equal(np.delete(found, 5, axis=1), np.delete(wanted, 5, axis=1))


def test_from_bf16_to_int8_a_value_moves_by_half_a_step_at_most() -> None:
    theirs = stored(values_of(40, 64), "bf16")
    before, after = (read(runs, dtype, 64).astype(np.float64)
                     for runs, dtype in ((theirs, "bf16"), (converted(theirs, "bf16", "int8", 64), "int8")))
    step = np.abs(before).max(axis=2, keepdims=True) / 127
    assert np.all(np.abs(after - before) <= 0.5 * step * (1 + 1e-5))


def test_there_and_back_again_an_int8_element_moves_by_one_at_most() -> None:
    """bf16 keeps eight bits of 127 * scale: the scale comes back up to 2^-8 off, so large elements may round apart."""
    mine = stored(values_of(40, 64), "int8")
    back = converted(converted(mine, "int8", "bf16", 64), "bf16", "int8", 64)
    elements = 64 * BLOCK_SIZE
    moved = mine[:, :elements].view(np.int8).astype(int) - back[:, :elements].view(np.int8)
    assert np.abs(moved).max() <= 1
    scales, returned = (runs[:, elements:].copy().view(np.float32) for runs in (mine, back))
    np.testing.assert_allclose(returned, scales, rtol=2.0**-8)


def test_by_way_of_fp32_bf16_comes_back_exactly_and_int8_to_the_last_bit_of_its_scales() -> None:
    mine = stored(values_of(40, 64), "bf16")
    np.testing.assert_array_equal(converted(converted(mine, "bf16", "fp32", 64), "fp32", "bf16", 64), mine)
    mine = stored(values_of(40, 64), "int8")
    back = converted(converted(mine, "int8", "fp32", 64), "fp32", "int8", 64)
    elements = 64 * BLOCK_SIZE
    np.testing.assert_array_equal(back[:, :elements], mine[:, :elements])
    scales, returned = (runs[:, elements:].copy().view(np.float32) for runs in (mine, back))
    np.testing.assert_allclose(returned, scales, rtol=2.0**-23)
