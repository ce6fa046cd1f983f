"""Row operations of the host kernels against the oracle in float64, and the bytes that K and V become."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from baton.kernels import reference
from baton.kernels.host import library

Floats = NDArray[np.float32]
EPS32 = 2.0**-23
"""One unit in the last place of a number in [1, 2)."""


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest) -> bytes:
    if request.param not in library.isas():
        pytest.skip(f"this CPU has no {request.param}")
    name: str = request.param
    return name.encode()


def numbers(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def rms_norm(isa: bytes, x: Floats, weight: Floats, eps: float) -> Floats:
    out = np.full_like(x, np.nan)
    library.load().baton_rms_norm(isa, x.ctypes.data, weight.ctypes.data, eps, len(x), out.ctypes.data)
    return out


def swiglu(isa: bytes, gate_up: Floats) -> Floats:
    out = np.full(len(gate_up) // 2, np.nan, dtype=np.float32)
    library.load().baton_swiglu(isa, gate_up.ctypes.data, len(out), out.ctypes.data)
    return out


def store(isa: bytes, values: Floats, format: str, block_size: int, slot: int) -> NDArray[np.uint8]:
    """A run of one block, 0xee where nothing was written."""
    row_bytes = {"fp32": 4, "bf16": 2, "int8": 1}[format] * len(values)
    room = np.full(block_size * (row_bytes + 4 * (format == "int8")) + 64, 0xEE, dtype=np.uint8)
    run = room[-room.ctypes.data % 64 :][: len(room) - 64]
    library.load().baton_store_kv(isa, values.ctypes.data, library.FORMATS[format], len(values), block_size, slot,
                                  run.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
    return run


@pytest.mark.parametrize("n", [1, 15, 16, 24, 64, 576, 577, 4096])
def test_rms_norm_is_the_oracle_s_to_four_units(isa: bytes, n: int) -> None:
    x, weight = numbers(n, seed=n) * 3, numbers(n, seed=n + 1)
    exact = reference.rms_norm(torch.from_numpy(x).double(), torch.from_numpy(weight).double(), 1e-5).numpy()
    assert np.all(np.abs(rms_norm(isa, x, weight, 1e-5) - exact) <= 4 * EPS32 * np.abs(exact))


@pytest.mark.parametrize("n", [1, 15, 16, 40, 1536, 1537])
def test_swiglu_is_the_oracle_s_to_six_units(isa: bytes, n: int) -> None:
    gate_up = numbers(2 * n, seed=n) * 8
    exact = reference.swiglu(torch.from_numpy(gate_up).double()).numpy()
    assert np.all(np.abs(swiglu(isa, gate_up) - exact) <= 6 * EPS32 * np.abs(exact))


def test_swiglu_of_numbers_far_out_is_finite_and_of_nan_is_nan(isa: bytes) -> None:
    gates = np.array([-1e30, -200, -90, -80, -0.0, 0, 80, 90, 200, 1e30, np.nan], dtype=np.float32)
    got = swiglu(isa, np.concatenate([gates, np.ones_like(gates)]))
    exact = gates.astype(np.float64) / (1 + np.exp(-np.clip(gates, -500, 500).astype(np.float64)))
    assert np.isnan(got[-1])
    np.testing.assert_allclose(got[1:-1], exact[1:-1], rtol=6 * EPS32, atol=1e-33)
    assert abs(got[0]) < 1e-6


@pytest.mark.parametrize("head_dim", [2, 8, 16, 64, 128, 256])
def test_rope_is_the_oracle_s_at_positions_up_to_8192(isa: bytes, head_dim: int) -> None:
    positions = torch.tensor([0, 1, 31, 1000, 8191, 8192])
    cos, sin = reference.rope_tables(positions, head_dim, 10_000.0)
    for i in range(len(positions)):
        head = numbers(head_dim, seed=i)
        exact = torch.from_numpy(head.copy()).double()[None, None]
        reference.rope_(exact, cos[i : i + 1].double(), sin[i : i + 1].double())
        table = torch.cat([cos[i, 0], sin[i, 0]]).numpy()
        library.load().baton_rope(isa, head.ctypes.data, table.ctypes.data, head_dim)
        rotated = exact[0, 0].numpy()
        length = np.tile(np.hypot(*np.split(rotated, 2)), 2)
        assert np.all(np.abs(head - rotated) <= 2 * EPS32 * length)


@pytest.mark.parametrize("head_dim", [8, 16, 64, 128])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8"])
def test_a_stored_row_is_its_nearest_value_in_the_format(isa: bytes, format: str, head_dim: int) -> None:
    block_size, slot = 16, 5
    values = numbers(head_dim, seed=head_dim)
    run = store(isa, values, format, block_size, slot)
    row_bytes = {"fp32": 4, "bf16": 2, "int8": 1}[format] * head_dim
    mine = run[slot * row_bytes :][:row_bytes]
    if format == "fp32":
        assert np.array_equal(mine.view(np.float32), values)
    elif format == "bf16":
        assert np.array_equal(mine.view(np.int16), torch.from_numpy(values).bfloat16().view(torch.int16).numpy())
    else:
        scale = run[block_size * head_dim :].view(np.float32)[slot]
        whole = mine.view(np.int8)
        assert scale == np.abs(values).max() / np.float32(127)
        assert np.abs(whole).max() == 127
        assert np.all(np.abs(whole * np.float64(scale) - values) <= 0.5 * scale * (1 + 1e-5))
    touched = np.flatnonzero(run != 0xEE)
    allowed = set(range(slot * row_bytes, (slot + 1) * row_bytes))
    if format == "int8":
        allowed |= set(range(block_size * head_dim + 4 * slot, block_size * head_dim + 4 * slot + 4))
    assert set(touched) <= allowed, "a neighbour was written"


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_every_instruction_set_stores_the_same_bytes(isa: bytes, format: str) -> None:
    """So that blocks of workers with different processors agree, ties and all."""
    values = numbers(128, seed=3)
    values[:4] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 0.0
    assert np.array_equal(store(isa, values, format, 16, 3), store(b"scalar", values, format, 16, 3))


STRANGE = [np.inf, -np.inf, *np.array([0x7FC00000, 0xFFC00000, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)]
"""NaN also as rubbish in memory has it, and where rounding alone would make it -0 or infinite."""


@pytest.mark.parametrize("head_dim", [8, 24, 64])
@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_a_row_that_is_no_number_at_any_place_is_stored_as_none(isa: bytes, format: str, head_dim: int) -> None:
    for lane in range(head_dim):
        for value in STRANGE:
            values = numbers(head_dim, seed=lane)
            values[lane] = value
            run = store(isa, values, format, 16, 3)
            assert np.array_equal(run, store(b"scalar", values, format, 16, 3))
            if format == "bf16":
                kept = (run[6 * head_dim : 8 * head_dim].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
                np.testing.assert_array_equal(np.isfinite(kept), np.isfinite(values))
            else:
                scale = run[16 * head_dim :].view(np.float32)[3]
                assert np.isnan(scale) if np.isnan(value) else scale == np.inf
                assert not run[3 * head_dim : 4 * head_dim].any()


def test_a_row_of_zeros_is_stored_as_zeros(isa: bytes) -> None:
    run = store(isa, np.zeros(64, dtype=np.float32), "int8", 16, 0)
    assert not run[:64].any()
    assert run[16 * 64 :].view(np.float32)[0] == 0
