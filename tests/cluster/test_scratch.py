"""What a killed owner left is swept at the next start, and nothing else is."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from baton.cluster.processes import gone
from baton.cluster.scratch import private_dir, sweep

OWNER = """
import subprocess, sys
from baton.cluster.scratch import private_dir
directory = private_dir("log")
with (directory / "x.log").open("w") as log:
    writer = subprocess.Popen(["sleep", "600"], stdout=log, start_new_session=True)
print(directory, writer.pid, flush=True)
input()
"""


def test_only_what_a_dead_owner_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        name, pid = owner.stdout.readline().split()
        left = Path(name)
        with (left / "x.log").open() as log:
            reader = subprocess.Popen(["sleep", "600"], stdin=log)
        asyncio.run(sweep())
        assert left.is_dir(), "its owner lives"
        owner.kill()
    mine = private_dir("log")
    elsewhere = tmp_path / f"baton-log-{owner.pid}-elsewhere"
    elsewhere.mkdir()
    (elsewhere / "owner").write_text("another machine")
    unmarked = tmp_path / f"baton-log-{owner.pid}-unmarked"
    unmarked.mkdir()
    asyncio.run(sweep())
    assert {path for path in tmp_path.iterdir() if path.name.startswith("baton-")} == {mine, elsewhere, unmarked}
    assert gone(int(pid))
    assert reader.poll() is None, "it only reads"
    reader.kill()
    reader.wait()
