"""The committed code is what the protos say, to the byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_committed_code_is_generated_from_the_committed_protos(tmp_path: Path) -> None:
    protos = sorted((ROOT / "proto/baton/wire").glob("*.proto"))
    assert protos
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}",
         f"--grpc_python_out={tmp_path}", *map(str, (p.relative_to(ROOT) for p in protos))],
        cwd=ROOT, check=True, timeout=120,
    )
    fresh = {p.name: p.read_bytes() for p in (tmp_path / "baton/wire").iterdir()}
    committed = {p.name: p.read_bytes() for p in (ROOT / "wire").glob("*_pb2*.py*")}
    assert set(fresh) == set(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"{stale}: generate them again with the grpcio-tools version that pyproject.toml names"
