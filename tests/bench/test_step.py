"""`baton bench step`: it runs, and its figures hang together."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.bench import step
from baton.core.errors import SetupError
from tests.models.reference import TinyLlama, write_tiny_llama


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["host", "torch"])
def test_each_batch_gets_a_row_whose_parts_add_up(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_llama(tmp_path / "llama", TinyLlama(head_dim=16))
    settings = {"model.name": tmp_path / "llama", "model.cache_dir": tmp_path / "cache", "engine.backend": backend,
                "engine.kv_memory_bytes": 1 << 20}
    overrides = [f"--set={name}={value}" for name, value in settings.items()]
    capsys.readouterr()
    step.main(["--batch", "1,3", "--steps", "12", *overrides])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["1", "3"]
    for row in rows:
        _, kernels_ms, gap_us, worst_us, loop_us, hidden, share = (float(x.rstrip("%")) for x in row.split())
        assert min(kernels_ms, gap_us, loop_us) > 0
        assert gap_us <= worst_us
        assert abs(hidden - 100 * loop_us / (loop_us + gap_us)) < 1
        assert 0 < share < 100


def test_the_hash_model_has_nothing_to_measure() -> None:
    with pytest.raises(SetupError, match="no kernels"):
        step.main(["--batch", "1", "--steps", "3", "--set", "model.name=hash", "--set", "engine.num_blocks=64"])
