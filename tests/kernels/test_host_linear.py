"""Matrix products of the host kernels: each format against a plain model of it, on every instruction set of this CPU;
and that a row's bits depend on that row alone."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from baton.kernels.host import library
from tests.kernels.formats import GROUP, ROTATED, Floats, as_bytes, rotated

SHAPES = [(48, 64), (16, 32), (100, 96), (7, 544), (130, 576), (33, 1536), (45, 70), (1, 1)]
"""(n, k): multiples of the panel and of the padding, and neither. int4 is left out where k is not in whole groups."""
NUM_ROWS = (1, 2, 7, 16, 17, 33, 200)


@dataclass
class Team:
    handle: int
    num_threads: int


@pytest.fixture(scope="module", params=[1, 3], ids=lambda n: f"{n}-threads")
def team(request: pytest.FixtureRequest) -> Iterator[Team]:
    host = library.load()
    handle = host.baton_team_new(request.param, 20)
    yield Team(handle, request.param)
    host.baton_team_free(handle)


@pytest.fixture(scope="module")
def one() -> Iterator[Team]:
    host = library.load()
    handle = host.baton_team_new(1, 20)
    yield Team(handle, 1)
    host.baton_team_free(handle)


def isas() -> tuple[str, ...]:
    return library.isas()


def cases(*formats: str) -> list[tuple[str, int, int]]:
    return [(f, n, k) for f in formats for n, k in SHAPES if f != "int4" or k % GROUP == 0]


def aligned(num_bytes: int) -> NDArray[np.uint8]:
    room = np.zeros(num_bytes + 64, dtype=np.uint8)
    return room[-room.ctypes.data % 64 :][:num_bytes]


@dataclass
class Weight:
    """A matrix as the kernels have it, and what it means."""

    matrix: library.Matrix
    panels: NDArray[np.uint8]
    meant: Floats
    """[n, k] what the packed values stand for; int8's are rotated, and k padded."""
    format: str


def pack(format: str, w: Floats) -> Weight:
    host = library.load()
    n, k = w.shape
    number = library.FORMATS[format]
    panels = aligned(host.baton_packed_bytes(number, n, k))
    matrix = library.Matrix(panels.ctypes.data, n, k, number, 0)
    if format == "int4":
        low, high = w.reshape(n, -1, GROUP).min(-1), w.reshape(n, -1, GROUP).max(-1)
        scale = np.maximum((high - low) / 15, np.float32(1e-4)).astype(np.float16).astype(np.float32)
        minimum = (-low).astype(np.float16).astype(np.float32)
        q = np.rint((w.reshape(n, -1, GROUP) + minimum[..., None]) / scale[..., None]).clip(0, 15).astype(np.uint8)
        q, scale, minimum = q.reshape(n, k), np.ascontiguousarray(scale), np.ascontiguousarray(minimum)
        host.baton_pack_int4(q.ctypes.data, scale.ctypes.data, minimum.ctypes.data, n, k, panels.ctypes.data)
        meant = q * np.repeat(scale, GROUP, axis=1) - np.repeat(minimum, GROUP, axis=1)
        return Weight(matrix, panels, meant.astype(np.float32), format)
    getattr(host, f"baton_pack_{format}")(w.ctypes.data, n, k, panels.ctypes.data)
    if format == "int8":
        return Weight(matrix, panels, as_bytes(rotated(w)) / ROTATED, format)
    return Weight(matrix, panels, to_bf16(w) if format == "bf16" else w, format)


def to_bf16(x: Floats) -> Floats:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def linear(isa: str, team: Team, x: Floats, weight: Weight, onto: Floats | None = None) -> Floats:
    y = np.full((len(x), weight.matrix.n), np.nan, np.float32) if onto is None else onto.copy()
    library.load().baton_linear(
        isa.encode(), team.handle, x.ctypes.data, len(x), ctypes.byref(weight.matrix), y.ctypes.data, onto is not None)
    return y


def expected(x: Floats, weight: Weight) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In float64, of what is kept of x and W: the product, and the sum of magnitudes that rounding scales with."""
    if weight.format == "bf16":
        kept = to_bf16(x).astype(np.float64)
    elif weight.format == "int8":
        kept = as_bytes(rotated(x)).astype(np.float64)
    elif weight.format == "int4":
        kept = as_bytes(x.reshape(len(x), -1, GROUP)).reshape(x.shape).astype(np.float64)
    else:
        kept = x.astype(np.float64)
    meant = weight.meant.astype(np.float64)
    return kept @ meant.T, np.abs(kept) @ np.abs(meant).T


def random(shape: tuple[int, ...], seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    # Rows of different magnitude, so that a mixed-up scale shows.
    return (rng.standard_normal(shape) * rng.uniform(0.1, 10, (shape[0], 1))).astype(np.float32)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("format", "n", "k"), cases(*library.FORMATS))
def test_a_product_is_that_of_what_the_format_keeps(isa: str, format: str, n: int, k: int, one: Team) -> None:
    weight = pack(format, random((n, k), n * k))
    for num_rows in NUM_ROWS:
        x = random((num_rows, k), num_rows)
        product, magnitude = expected(x, weight)
        error = np.abs(linear(isa, one, x, weight) - product) / magnitude
        # fp32 sums of k terms; int8 and int4 round a handful of times after exact integer sums.
        bound = 1e-6 if format in ("int8", "int4") else 6e-8 * k**0.5 * 2
        assert error.max() < bound, (num_rows, error.max(), bound)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("format", library.FORMATS)
@pytest.mark.parametrize(("n", "k"), [(130, 576), (33, 1536), (64, 96)])
def test_a_rows_bits_do_not_depend_on_the_other_rows(
    isa: str, format: str, n: int, k: int, team: Team, one: Team
) -> None:
    weight = pack(format, random((n, k), n * k))
    x = random((200, k), 7)
    alone = np.concatenate([linear(isa, one, x[i : i + 1], weight) for i in range(len(x))])
    for num_rows in NUM_ROWS:
        for first in {0, len(x) - num_rows}:
            together = linear(isa, team, x[first : first + num_rows], weight)
            assert together.tobytes() == alone[first : first + num_rows].tobytes(), (num_rows, first)


@pytest.mark.parametrize(("format", "n", "k"), cases("int8", "int4"))
def test_quantised_products_are_the_same_bits_on_every_instruction_set(format: str, n: int, k: int, one: Team) -> None:
    weight = pack(format, random((n, k), n * k))
    x, onto = random((37, k), 1), random((37, n), 2)
    first, *others = [linear(isa, one, x, weight, onto).tobytes() for isa in isas()]
    assert all(other == first for other in others)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("format", library.FORMATS)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_accumulating_adds_the_product_once_and_writes_nothing_else(
    isa: str, format: str, num_rows: int, team: Team
) -> None:
    weight = pack(format, random((100, 96), 3))
    x, onto = random((num_rows, 96), 4), random((num_rows, 100), 5)
    room = np.full((num_rows + 1, 100), 3.0, np.float32)  # the row after the last is not ours
    room[:num_rows] = onto
    library.load().baton_linear(
        isa.encode(), team.handle, x.ctypes.data, num_rows, ctypes.byref(weight.matrix), room.ctypes.data, 1)
    assert room[:num_rows].tobytes() == (onto + linear(isa, team, x, weight)).tobytes()
    assert (room[num_rows] == 3.0).all()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("format", library.FORMATS)
def test_rows_of_nothing_give_nothing_and_a_nan_stays_in_its_row(isa: str, format: str, one: Team) -> None:
    weight = pack(format, random((20, 64), 3))
    x = random((19, 64), 4)
    clean = linear(isa, one, x, weight)
    x[3], x[5, 17], x[18, 0] = 0.0, np.nan, np.inf
    x[7] *= np.float32(1e-38)
    y = linear(isa, one, x, weight)
    assert (y[3] == 0).all()
    assert np.isnan(y[5]).all()
    assert np.abs(y[7]).max() < (1e-35 if format in ("fp32", "bf16") else 1e-45)  # too small for 127 / magnitude
    assert not np.isfinite(y[18]).any()
    untouched = [i for i in range(19) if i not in (3, 5, 7, 18)]
    assert y[untouched].tobytes() == clean[untouched].tobytes()


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("format", "most"), [("int8", 0.12), ("int4", 0.12)])
def test_what_is_a_hundred_times_larger_than_the_rest_of_a_row_does_not_drown_it(
    isa: str, format: str, most: float, one: Team
) -> None:
    """As in real models, where a few columns are always so: with one plain scale per row, the rest keeps one
    bit and loses half of itself."""
    w, x = random((64, 576), 1), random((8, 576), 2)
    x[:, [17, 300]] *= 100
    weight = pack(format, w)
    exact = x.astype(np.float64) @ (w if format == "int8" else weight.meant).astype(np.float64).T
    rest = np.delete(x, [17, 300], axis=1).astype(np.float64) @ np.delete(w, [17, 300], axis=1).astype(np.float64).T
    lost = np.linalg.norm(linear(isa, one, x, weight) - exact, axis=0) / np.linalg.norm(rest, axis=0)
    assert np.median(lost) < most


def test_a_column_of_tiny_weights_packs_to_zeros_in_int8(one: Team) -> None:
    w = random((3, 64), 1)
    w[1] *= np.float32(1e-38)
    y = linear("scalar", one, random((2, 64), 2), pack("int8", w))
    assert (y[:, 1] == 0).all()
    assert (y[:, [0, 2]] != 0).all()
