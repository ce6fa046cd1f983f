"""`baton bench attention`: it runs, its figures hang together, and what it times is attention."""

from __future__ import annotations

import pytest

from baton.bench import attention


def test_each_chunk_format_and_instruction_set_gets_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    attention.main(["--chunks", "1@20,5@0", "--kv", "fp32,bf16,int8", "--isas", "scalar", "--pool-mb", "1",
                    "--seconds", "0.01"])  # fmt: skip
    _, _, *rows = capsys.readouterr().out.splitlines()
    asked = [[chunk, kv, "scalar"] for chunk in ("1@20", "5@0") for kv in ("fp32", "bf16", "int8")]
    assert [row.split()[:3] for row in rows] == asked
    for row in rows:
        us, _, rate, _, torch_us, ratio = (float(x.rstrip("%")) for x in row.split()[3:])
        assert min(us, rate, torch_us) > 0
        assert abs(ratio - torch_us / us) < 0.01 + 0.06 / us


def test_a_chunk_multiplies_what_its_rows_see() -> None:
    assert attention.Chunk.of("3@2").flop == 4 * 9 * 64 * (3 + 4 + 5)
    assert attention.Chunk.of("7").start == 0


@pytest.mark.parametrize(("kv", "token_bytes"), [("fp32", 256), ("bf16", 128), ("int8", 68)])
def test_a_pool_holds_whole_sequences_and_says_what_a_call_reads(kv: str, token_bytes: int) -> None:
    pool = attention.Pool(kv, 33, 8 << 20)
    assert pool.num_bytes == 48 * 3 * 2 * token_bytes
    assert pool.num_sequences == max(1, (8 << 20) // (30 * pool.num_bytes))
    assert sorted(pool.tables.ravel()) == list(range(3 * pool.num_sequences))
