"""Packed weights: 4-bit tensors of GGUF files as they are, and an arena that is made once and never half read."""

from __future__ import annotations

import asyncio
import ctypes
from pathlib import Path

import numpy as np
import pytest
from gguf import dequantize

from baton.core.config import EngineConfig
from baton.core.errors import SetupError
from baton.engine.backend import choose_backend, prepare
from baton.engine.host_runner import HostRunner
from baton.kernels.host import library
from baton.models.checkpoint import Int4
from baton.models.convert import ModelFiles, convert, read_checkpoint
from baton.models.gguf_int4 import unpack
from baton.models.packed import ARENA, open_packed, packed_file, quantise_int4
from baton.models.weights import Array
from tests.models.gguf_writer import Quant, write_gguf
from tests.models.reference import TinyLlama, chunk, every_logit, open_runner, shuffled_tables, write_tiny_llama

TOKENS = [(i * i * 7 + 3 * i + 1) % 64 for i in range(60)]
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
FOUR_BITS = dict.fromkeys(MATRICES, Quant.Q4_1) | {"attn_v": Quant.Q4_0}


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gguf")
    model = write_tiny_llama(home / "llama", TinyLlama(head_dim=16, hidden_size=96, intermediate_size=160))
    write_gguf(home / "m.gguf", model, FOUR_BITS)
    return home / "m.gguf"


@pytest.fixture
def files(gguf_path: Path, tmp_path: Path) -> ModelFiles:
    return convert(gguf_path, tmp_path / "cache")


def values_of(four: Int4) -> Array:
    groups = four.nibbles.reshape(*four.scale.shape, 32) * four.scale[..., None] - four.minimum[..., None]
    return np.asarray(groups.reshape(four.nibbles.shape), np.float32)


@pytest.mark.parametrize(("kind", "row_bytes"), [(Quant.Q4_0, 18 * 16), (Quant.Q4_1, 20 * 16), (Quant.Q4_K, 144 * 2)])
def test_unpacked_blocks_are_worth_what_ggufs_own_reader_says(kind: Quant, row_bytes: int) -> None:
    data = np.random.default_rng(3).integers(0, 256, (24, row_bytes), np.uint8)
    at = {Quant.Q4_0: (18, 1), Quant.Q4_1: (20, 2), Quant.Q4_K: (144, 2)}[kind]
    scales = np.random.default_rng(4).normal(0, 0.1, (data.size // at[0], at[1])).astype(np.float16)
    data.reshape(-1, at[0])[:, : 2 * at[1]] = scales.view(np.uint8)  # numbers, not whatever bytes may mean
    four = unpack(kind.name, data, (24, 512))
    assert four is not None
    np.testing.assert_array_equal(values_of(four), dequantize(data, kind))


def test_parts_in_four_bits_have_the_values_and_the_row_order_of_the_expanded_ones(gguf_path: Path) -> None:
    checkpoint = read_checkpoint(gguf_path)
    for leaf in ("q", "k", "v", "o", "gate", "up", "down"):
        four = checkpoint.read_int4(f"layers.1.{leaf}")
        assert four is not None
        np.testing.assert_array_equal(values_of(four), checkpoint.read(f"layers.1.{leaf}"), err_msg=leaf)
    assert checkpoint.read_int4("embed") is None


def test_int4_of_a_gguf_file_computes_with_the_files_own_weights(files: ModelFiles) -> None:
    """Torch computes with the expanded values; what is left is the rounding of activations."""
    backend = choose_backend(EngineConfig(backend="host", quantization="int4", kv_dtype="fp32"), files.spec.head_dim)
    layout, table = files.spec.layout(16, "fp32"), shuffled_tables([len(TOKENS)], 8)[0]
    runner = HostRunner(files, library.aligned(8 * layout.block_bytes).data, layout, 1, backend)
    ours = runner.logits([chunk([t], i, table) for i, t in enumerate(TOKENS)])
    asyncio.run(runner.close())
    with open_runner(files.directory, 8) as theirs:
        expected = every_logit(theirs, TOKENS, table).numpy()
    assert np.sqrt(np.mean((ours - expected) ** 2)) / expected.std() < 0.093


def test_quantising_meets_the_ends_of_each_group_and_is_nowhere_off_by_more_than_half_a_step() -> None:
    rows = np.random.default_rng(5).normal(0, 0.1, (6, 96)).astype(np.float32)
    rows[0, :32] = 0.25  # equal values have no step
    four = quantise_int4(rows)
    error = np.abs(values_of(four) - rows).reshape(*four.scale.shape, 32).max(axis=-1)
    assert (error <= 0.51 * four.scale + 1e-3 * np.abs(rows).max()).all()
    assert four.nibbles[1:].reshape(-1, 32).min(axis=1).tolist() == [0] * 15
    assert four.nibbles[1:].reshape(-1, 32).max(axis=1).tolist() == [15] * 15
    with pytest.raises(SetupError, match="multiple of 32, and one has 40"):
        quantise_int4(rows[:, :40])


def test_int4_without_the_file_that_holds_it_is_refused(files: ModelFiles, gguf_path: Path) -> None:
    away = gguf_path.with_suffix(".away")
    gguf_path.rename(away)
    try:
        with pytest.raises(SetupError, match="is gone or changed"):
            open_packed(files, "int4")
        open_packed(files, "int8").close()
    finally:
        away.rename(gguf_path)


def test_an_arena_is_made_once_and_one_cut_short_is_made_again(files: ModelFiles) -> None:
    open_packed(files, "bf16").close()
    (arena,) = files.directory.glob(f"packed-bf16-*/{ARENA}")
    made, content = arena.stat().st_mtime_ns, arena.read_bytes()
    open_packed(files, "bf16").close()
    assert arena.stat().st_mtime_ns == made
    (arena.parent.with_name("packed-bf16-of-older-code")).mkdir()
    arena.write_bytes(content[:-64])
    open_packed(files, "bf16").close()
    assert arena.read_bytes() == content
    assert [p for p in files.directory.glob("packed-*") if p.is_dir()] == [arena.parent], "nothing stale stays"


@pytest.mark.parametrize("quantization", ["bf16", "int4"])
def test_where_nothing_can_be_written_the_same_weights_are_packed_into_memory(
    files: ModelFiles, quantization: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory in the lock file's place keeps everybody from it, root too."""
    in_the_way = files.directory / f"packed-{quantization}-{library.pack_digest()}.lock"
    in_the_way.mkdir()
    said: list[str] = []
    prepare(EngineConfig(quantization=quantization), files, said.append)
    assert any("not kept" in line and "Set model.cache_dir" in line for line in said)
    packed = open_packed(files, quantization)
    assert "every start packs them" in caplog.text
    assert not [*files.directory.glob(f"**/{ARENA}")]
    size = max(m.offset + m.num_bytes for m in packed.matrices.values())
    content = ctypes.string_at(packed.address, size)
    packed.close()
    in_the_way.rmdir()
    assert packed_file(files, quantization).read_bytes() == content


def test_what_workers_would_make_at_their_start_is_prepared_once_and_said(files: ModelFiles) -> None:
    engine, said = EngineConfig(quantization="int8"), list[str]()
    library.load()
    prepare(engine, files, said.append)
    assert said == ["packing weights as int8"]
    prepare(engine, files, said.append)
    assert len(said) == 1
    prepare(EngineConfig(backend="torch"), files, said.append)
    assert len(said) == 1, "torch needs nothing packed"
    with pytest.raises(SetupError, match="fp32 alone"):
        prepare(EngineConfig(backend="torch", quantization="int4"), files, said.append)
