"""How cores are counted and shared among workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from baton.cluster.cores import threads_per_worker, usable_cores

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "cores"), [
    ("max 100000\n", HERE), ("100000 100000\n", 1), ("50000 100000\n", 1), ("99900000 100000\n", HERE),
    ("rubbish", HERE),
])
def test_a_containers_quota_limits_the_cores_and_never_to_none(tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert usable_cores(tmp_path / "cpu.max") == cores


def test_without_a_quota_all_cores_that_we_may_run_on_count(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none") == HERE


def test_workers_share_the_cores_equally_unless_told_otherwise() -> None:
    assert [threads_per_worker(None, workers, 8) for workers in (0, 1, 2, 3, 9)] == [8, 8, 4, 2, 1]
    assert threads_per_worker(3, 2, 8) == 3
