from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Baton = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def baton(tmp_path: Path) -> Baton:
    """Runs the real command in an empty directory, with an empty model cache."""

    def run(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in {"BATON_CONFIG", "BATON_CACHE"}}
        return subprocess.run(
            [sys.executable, "-m", "baton.cli.main", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env={**inherited, "BATON_CACHE": str(tmp_path / "cache"), "COLUMNS": "200", **(env or {})},
        )

    return run
