"""Rows of a draft on the host kernels: all of them are sampled, and each gets the bits that its token gets alone, also
after a draft that was wrong was written over."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from baton.core.step import ScheduledChunk
from baton.engine.host_runner import HostRunner
from baton.engine.sampler import Logits
from baton.kernels.host import library
from baton.models.convert import ModelFiles, convert
from tests.engine.test_host_runner import opened
from tests.models.reference import TinyLlama, chunk, shuffled_tables, write_tiny_llama

FORMATS = [("bf16", "bf16"), ("bf16", "int8"), ("int8", "bf16"), ("int8", "int8")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    home: Path = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(home / "llama", TinyLlama(head_dim=16, hidden_size=96, intermediate_size=160))
    return convert(home / "llama", home / "cache")


def every_row(runner: HostRunner, chunks: list[ScheduledChunk], vocabulary: int) -> Logits:
    """[rows of all chunks, vocab_size]: what the verification of drafts asks for."""
    tokens = np.array([t for c in chunks for t in c.token_ids], np.int32)
    blocks = np.array([b for c in chunks for b in c.block_table], np.int32)
    spans, row, block = [], 0, 0
    for c in chunks:
        spans.append((row, len(c.token_ids), c.start, block))
        row, block = row + len(c.token_ids), block + len(c.block_table)
    arrays = tokens, np.array(spans, np.int32), blocks, np.arange(row, dtype=np.int32)
    logits = np.empty((row, vocabulary), np.float32)
    batch = library.Batch(
        *(a.ctypes.data for a in arrays), runner._pool.ctypes.data, logits.ctypes.data, None, None, row, len(chunks),
        row)
    library.load().baton_step(runner._program, runner._team, batch, 0)
    return logits


def check_drafts(files: ModelFiles, vocabulary: int, num_tokens: int, **engine: str) -> None:
    rng = random.Random(3)
    sequences = [[rng.randrange(vocabulary) for _ in range(num_tokens)] for _ in range(3)]
    num_blocks = 3 * -(-num_tokens // 16)
    tables = shuffled_tables([num_tokens] * 3, num_blocks)
    with opened(files, num_blocks, **engine) as (runner, _):
        alone = [np.concatenate([runner.logits([chunk([t], i, table)]) for i, t in enumerate(tokens)])
                 for tokens, table in zip(sequences, tables, strict=True)]
    for threads in (1, 2, 3):
        with opened(files, num_blocks, threads=threads, **engine) as (runner, _):
            done = [rng.randint(1, 5) for _ in sequences]
            runner.logits([chunk(s[:n], 0, table) for s, n, table in zip(sequences, done, tables, strict=True)])
            while left := [i for i, n in enumerate(done) if n < num_tokens]:
                chunks, right = [], []
                for i in rng.sample(left, rng.randint(1, len(left))):
                    size = min(rng.randint(1, 8), num_tokens - done[i])
                    good = rng.randint(1, size)  # the first token is known, those behind it are drafted
                    rows = sequences[i][done[i] : done[i] + good] + [rng.randrange(vocabulary)] * (size - good)
                    chunks.append(chunk(rows, done[i], tables[i]))
                    right.append((i, done[i], good, size))
                    done[i] += good
                logits = every_row(runner, chunks, vocabulary)
                first = 0
                for i, start, good, size in right:
                    np.testing.assert_array_equal(logits[first : first + good], alone[i][start : start + good])
                    first += size


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_each_row_of_a_draft_gets_the_bits_of_its_token_alone(
    weights: str, kv: str, isa: str, files: ModelFiles
) -> None:
    if isa not in library.isas():
        pytest.skip(f"this CPU has no {isa}")
    check_drafts(files, 64, 60, quantization=weights, kv_dtype=kv, isa=isa)


@pytest.mark.model
@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_so_it_is_on_the_real_model(weights: str, kv: str, model_files: ModelFiles) -> None:
    check_drafts(model_files, 49152, 40, quantization=weights, kv_dtype=kv)
