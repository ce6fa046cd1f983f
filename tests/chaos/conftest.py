"""Tests of the network need namespaces; where there are none they say why they are skipped."""

from __future__ import annotations

import asyncio

import pytest

from baton.chaos.netns import why_no_namespaces


@pytest.fixture(scope="session")
def namespaces() -> None:
    why = asyncio.run(why_no_namespaces())
    if why is not None:
        pytest.skip(f"no network namespaces here: {why}")
