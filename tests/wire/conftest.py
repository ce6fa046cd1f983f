from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.wire.echo_worker import one_loop


@pytest.fixture(scope="session", autouse=True)
def _close_the_loop() -> Iterator[None]:
    yield
    one_loop.close()


@pytest.fixture(autouse=True)
def _no_noise(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing but a bug is logged as an error: not a client that leaves, not a peer that dies."""
    caplog.set_level(logging.INFO)
    yield
    if "bug" not in request.node.name:
        assert not [r for r in caplog.get_records("call") if r.levelno >= logging.ERROR]
