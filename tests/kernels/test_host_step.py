"""A step as C runs it: where it stops and goes on, what it counts, what it refuses. What it computes is tested with
the runner (tests/engine/test_host_runner.py)."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from baton.core.errors import SetupError
from baton.kernels.host import library

HIDDEN, MLP, HEADS, KV_HEADS, DIM, VOCABULARY, LAYERS, BLOCK = 48, 80, 4, 2, 16, 33, 2, 16
QKV = (HEADS + 2 * KV_HEADS) * DIM
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8]
Floats = NDArray[np.float32]


def op(kind: str, layer: int = -1, matrix: int = -1, vector: Floats | None = None) -> library.Op:
    return library.Op(library.OPS.index(kind), layer, matrix, 1e-5, None if vector is None else vector.ctypes.data)


@dataclasses.dataclass
class Model:
    """Two random layers in fp32; what C points into is kept alive here."""

    embedding: Floats
    norm: Floats
    panels: list[NDArray[np.uint8]]
    matrices: list[library.Matrix]
    frequencies: Floats

    def ops(self) -> list[library.Op]:
        ops = [op("embed", vector=self.embedding)]
        for layer in range(LAYERS):
            ops += [
                op("rms_norm", vector=self.norm), op("linear", matrix=0), op("rope_write_kv", layer),
                op("attention", layer), op("linear_residual", matrix=1), op("rms_norm", vector=self.norm),
                op("linear", matrix=2), op("swiglu"), op("linear_residual", matrix=3),
            ]
        return [*ops, op("keep_sampled_rows"), op("rms_norm", vector=self.norm), op("lm_head", matrix=4)]

    def shape(self, **changes: int) -> library.Shape:
        sizes = dict(hidden_size=HIDDEN, intermediate_size=MLP, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM,
                     vocab_size=VOCABULARY, num_layers=LAYERS, block_size=BLOCK, kv_format=library.FORMATS["fp32"])
        return library.Shape(**(sizes | changes), rope_frequencies=self.frequencies.ctypes.data)


@pytest.fixture(scope="module")
def model() -> Model:
    rng = np.random.default_rng(1)

    def random(*shape: int) -> Floats:
        return rng.normal(0, 0.3, shape).astype(np.float32)

    weights = [random(QKV, HIDDEN), random(HIDDEN, HEADS * DIM), random(2 * MLP, HIDDEN), random(HIDDEN, MLP),
               random(VOCABULARY, HIDDEN)]
    panels = [library.aligned(library.packed_bytes("fp32", *w.shape)) for w in weights]
    for weight, place in zip(weights, panels, strict=True):
        library.pack(weight, "fp32", place)
    matrices = [library.Matrix(p.ctypes.data, *w.shape, 0, 0) for p, w in zip(panels, weights, strict=True)]
    return Model(random(VOCABULARY, HIDDEN), random(HIDDEN), panels, matrices, random(DIM // 2))


class Run:
    """One step over TOKENS, prefix of one sequence, of which the rows of `sampled` are sampled."""

    def __init__(
        self, model: Model, ops: Sequence[library.Op], sampled: Sequence[int] = (18,), num_rows: int = len(TOKENS)
    ) -> None:
        self.num_rows, self.logits = num_rows, np.zeros((len(sampled), VOCABULARY), np.float32)
        self.layers_done, self.largest = np.zeros(1, np.int32), np.zeros(len(sampled), np.int32)
        self._lib = library.load()
        self._program = library.new_program("scalar", model.shape(), ops, model.matrices)
        self._team = self._lib.baton_team_new(2, 20)
        self._pool = library.aligned(2 * LAYERS * KV_HEADS * 2 * BLOCK * DIM * 4)
        self._arrays = [np.array(a, np.int32) for a in (TOKENS, [0, self.num_rows, 0, 0], [1, 0], sampled)]
        places = [a.ctypes.data for a in self._arrays] + [
            a.ctypes.data for a in (self._pool, self.logits, self.largest, self.layers_done)]
        self._batch = library.Batch(*places, self.num_rows, int(num_rows > 0), len(sampled), 0)

    def go(self, first_op: int = 0) -> int:
        return int(self._lib.baton_step(self._program, self._team, self._batch, first_op))

    def hidden(self) -> Floats:
        pointer: Any = self._lib.baton_program_hidden(self._program)
        return np.ctypeslib.as_array(pointer, (self.num_rows, HIDDEN))

    def time_ops(self, seconds: NDArray[np.float64] | None) -> None:
        self._lib.baton_program_time(self._program, None if seconds is None else seconds.ctypes.data)

    def close(self) -> None:
        self._lib.baton_program_free(self._program)
        self._lib.baton_team_free(self._team)


@pytest.fixture
def undisturbed(model: Model) -> Iterator[Run]:
    run = Run(model, model.ops())
    assert run.go() == len(model.ops())
    yield run
    run.close()


@pytest.mark.parametrize("kind", ["capture", "collective"])
@pytest.mark.parametrize("at", [1, 6, 8, 10, 19])
def test_a_step_that_stops_goes_on_as_if_it_had_not(kind: str, at: int, model: Model, undisturbed: Run) -> None:
    ops = model.ops()
    run = Run(model, [*ops[:at], op(kind), *ops[at:]])
    assert run.go() == at
    assert int(run.layers_done[0]) == sum(1 for o in ops[:at] if library.OPS[o.kind] == "rope_write_kv")
    assert not run.logits.any()
    assert run.go(at + 1) == len(ops) + 1
    np.testing.assert_array_equal(run.logits, undisturbed.logits)
    run.close()


def test_what_the_caller_writes_while_a_step_is_stopped_is_what_goes_on(model: Model) -> None:
    """Two embeddings of half the size, summed at a collective, are one of the whole."""
    half = dataclasses.replace(model, embedding=model.embedding * np.float32(0.5))
    ops = half.ops()
    run, whole = Run(half, [ops[0], op("collective"), *ops[1:]]), Run(model, model.ops())
    run.go()
    np.testing.assert_array_equal(run.hidden(), model.embedding[TOKENS] / 2)
    run.hidden()[:] *= 2
    run.go(2)
    whole.go()
    np.testing.assert_array_equal(run.logits, whole.logits)
    run.close()
    whole.close()


def test_rows_that_are_not_sampled_leave_and_the_others_keep_their_bits(model: Model, undisturbed: Run) -> None:
    run = Run(model, model.ops(), sampled=(0, 7, 18))
    run.go()
    np.testing.assert_array_equal(run.logits[2], undisturbed.logits[0])
    assert len({row.tobytes() for row in run.logits}) == 3
    np.testing.assert_array_equal(run.largest, run.logits.argmax(axis=1))
    run.close()


def test_a_step_that_samples_nothing_ends_when_the_last_layer_is_stored(model: Model) -> None:
    run = Run(model, model.ops(), sampled=())
    assert run.go() == len(model.ops())
    assert int(run.layers_done[0]) == LAYERS
    run.close()


def test_a_step_of_no_rows_is_over_at_once(model: Model) -> None:
    run = Run(model, model.ops(), sampled=(), num_rows=0)
    assert run.go() == len(model.ops())
    run.close()


def test_ops_add_up_their_seconds_only_while_somebody_asks(model: Model) -> None:
    ops = model.ops()
    run, seconds = Run(model, ops), np.zeros(len(ops))
    run.time_ops(seconds)
    run.go()
    once = seconds.copy()
    assert (once > 0).all()
    run.go()
    assert (seconds > once).all()
    twice = seconds.copy()
    run.time_ops(None)
    run.go()
    np.testing.assert_array_equal(seconds, twice)
    run.close()


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("size", [20_000, 20_003])
@pytest.mark.parametrize("spoil", [None, np.nan, np.inf])
def test_the_greatest_is_the_first_of_equals_and_no_number_is_greater_than_all(
    spoil: float | None, size: int, isa: str, model: Model
) -> None:
    """As torch.argmax and numpy.argmax have it; vocabularies are longer than the kernels' chunks, and so many logits
    pass the caches by, where their rows begin at a cache line."""
    rng = np.random.default_rng(2)
    head = np.zeros((size, HIDDEN), np.float32)
    head[[7, 127, 128, 19_999]] = rng.normal(0, 1, HIDDEN)
    head[100:120] = -head[7]
    if spoil is not None:
        head[12_345] = spoil
    panels = library.aligned(library.packed_bytes("fp32", *head.shape))
    library.pack(head, "fp32", panels)
    matrices = [library.Matrix(panels.ctypes.data, *head.shape, 0, 0)]
    ops = [op("embed", vector=model.embedding), op("rms_norm", vector=model.norm), op("lm_head", matrix=0)]
    logits = library.aligned(len(TOKENS) * size * 4).view(np.float32).reshape(len(TOKENS), size)
    largest = np.zeros(len(TOKENS), np.int32)
    lib = library.load()
    program = library.new_program(isa, model.shape(vocab_size=size), ops, matrices)
    team = lib.baton_team_new(2, 20)
    tokens, spans = np.array(TOKENS, np.int32), np.array([0, len(TOKENS), 0, 0], np.int32)
    blocks = np.zeros(2, np.int32)
    pool = library.aligned(LAYERS * KV_HEADS * 2 * BLOCK * DIM * 4)
    lib.baton_step(program, team, library.Batch(
        tokens.ctypes.data, spans.ctypes.data, blocks.ctypes.data, None, pool.ctypes.data, logits.ctypes.data,
        largest.ctypes.data, None, len(TOKENS), 1, len(TOKENS), 0), 0)
    lib.baton_program_free(program)
    lib.baton_team_free(team)
    np.testing.assert_array_equal(largest, logits.argmax(axis=1))
    assert set(largest) <= ({7, 100, 0} if spoil is None else {12_345})
    if spoil is None:
        x = model.embedding[TOKENS]
        x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * model.norm
        np.testing.assert_allclose(logits, x @ head.T, rtol=1e-4, atol=1e-5)


WRONG: dict[str, tuple[dict[str, int], list[str], str]] = {
    "head size": ({"head_dim": 24}, [], "the head size must be a multiple of 16"),
    "heads": ({"num_heads": 3}, [], "the sizes do not fit together"),
    "block size": ({"block_size": 24}, [], "the block size must be a multiple of 16"),
    "KV format": ({"kv_format": 3}, [], "unknown KV format"),
    "no x": ({}, ["linear"], "a matrix does not fit what it is applied to"),
    "no q": ({}, ["rms_norm", "attention"], "attention has no q"),
    "no rotation": ({}, ["rms_norm", "linear", "attention"], "attention has no q"),
    "a late rotation": ({}, ["rms_norm", "linear", "capture", "rope_write_kv"], "something stands between"),
    "no gate": ({}, ["rms_norm", "swiglu"], "SwiGLU has no gate and up"),
    "residual": ({}, ["rms_norm", "linear_residual"], "a residual has another size than the hidden state"),
    "vocabulary": ({}, ["rms_norm", "lm_head"], "the LM head has another size than the vocabulary"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_program_that_makes_no_sense_is_refused_with_the_reason(what: str, model: Model) -> None:
    changes, kinds, reason = WRONG[what]
    products = ("linear", "linear_residual", "lm_head")
    ops = [op(k, 0, 0 if k in products else -1, model.norm if k == "rms_norm" else None) for k in kinds]
    with pytest.raises(SetupError, match=reason):
        library.new_program("scalar", model.shape(**changes), ops, model.matrices)


def test_an_instruction_set_that_nobody_has_is_refused(model: Model) -> None:
    assert library.load().baton_has_isa(b"mmx") == 0
    with pytest.raises(SetupError, match="lacks the instruction set"):
        library.new_program("mmx", model.shape(), model.ops(), model.matrices)


def test_the_mirrors_of_c_structures_have_their_sizes() -> None:
    """Of abi.h on every 64-bit machine: a field added on one side alone shifts all that follow."""
    sizes = {library.Matrix: 24, library.Op: 24, library.Shape: 48, library.Span: 16, library.Batch: 80,
             library.Choice: 48, library.Source: 8, library.Job: 144}
    assert {kind: ctypes.sizeof(kind) for kind in sizes} == sizes
