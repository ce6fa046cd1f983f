"""The ucx transport lives in processes that have not loaded NIXL: each brings a UCX library of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.config import child_env
from baton.core.errors import SetupError
from tests.kv_transfer.pair import reader

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_contract_holds_for_ucx_in_processes_of_its_own() -> None:
    pytest.importorskip("ucxx._version")
    files = ("test_transport_contract.py", "test_landing.py", "test_ucx_alone.py")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(str(Path(__file__).with_name(name)) for name in files)],
        env={**child_env(1), "BATON_TEST_TRANSPORT": "ucx"}, cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]


def test_ucx_and_nixl_in_one_process_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu13", sys)

    async def main() -> None:
        async with reader(("ucx",)):
            pass

    with pytest.raises(SetupError, match="keep one of nixl and ucx"):
        asyncio.run(main())
