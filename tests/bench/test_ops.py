"""`baton bench ops`: it runs, and its figures hang together."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.bench import ops
from baton.core.errors import SetupError
from baton.models import packed
from baton.models.convert import convert
from tests.models.reference import TinyLlama, chunk, write_tiny_llama


def settings(tmp_path: Path, backend: str) -> list[str]:
    write_tiny_llama(tmp_path / "llama", TinyLlama(head_dim=16))
    values = {"model.name": tmp_path / "llama", "model.cache_dir": tmp_path / "cache", "engine.backend": backend}
    return [f"--set={name}={value}" for name, value in values.items()]


@pytest.mark.slow
def test_each_step_gets_its_operations_whose_shares_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "prefill:40,decode:3", "--context", "20", "--seconds", "0.05", *settings(tmp_path, "host")]
    capsys.readouterr()
    ops.main(arguments)
    limits, *steps = capsys.readouterr().out.split("\n\n")
    assert "memory is read at" in limits
    assert [step.partition(":")[0] for step in steps] == ["prefill", "decode"]
    for step in steps:
        rows = {line[:18].strip(): line[18:].split() for line in step.splitlines()[2:]}
        assert {"qkv", "attention", "o", "gate_up", "down", "lm_head"} <= set(rows)
        assert abs(sum(float(row[1].rstrip("%")) for row in rows.values()) - 100) < 1
        for kind in ("qkv", "attention", "lm_head"):
            assert all(float(figure.rstrip("%")) >= 0 for figure in rows[kind])


def test_what_a_step_must_read_and_multiply_is_told_by_its_chunks(tmp_path: Path) -> None:
    """Of a prompt: every weight once, every position's keys so far, the last layer's rest for the sampled row alone."""
    write_tiny_llama(tmp_path / "llama", TinyLlama(head_dim=16))
    spec = convert(tmp_path / "llama", tmp_path / "cache").spec
    prompt = (chunk(list(range(40)), 0, (0, 1, 2)),)
    work = ops.works_of(spec, spec.layout(16, "bf16"), packed.plan(spec, "bf16"), prompt)
    hidden, width, mlp, vocabulary = 24, 4 * 16, 40, 64
    qkv = 2 * hidden * (width + 2 * 2 * 16)
    rest = 2 * hidden * (width + 3 * mlp)
    attention = 4 * width * (40 * 41 / 2)
    assert sum(flop for _, flop in work) == 2 * (40 * qkv + attention) + 41 * rest + 2 * hidden * vocabulary
    keys = 2 * 40 * (2 * 2 * 16 * 2)
    weights = sum(m.num_bytes for m in packed.plan(spec, "bf16").values())
    assert sum(num_bytes for num_bytes, _ in work) == keys + weights


def test_only_the_host_kernels_have_operations_to_time(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="only the host kernels"):
        ops.main(settings(tmp_path, "torch"))
    with pytest.raises(SetupError, match="hash model"):
        ops.main(["--set", "model.name=hash"])
