"""The harness catches the bugs it is there for: each planted one on its recorded seed. `make nightly` hunts from seed
0 again."""

from __future__ import annotations

import pytest

from tests.planted.hunt import caught, names, planted, simulate


def test_at_least_fifteen_bugs_are_planted_and_each_has_a_seed() -> None:
    assert len(names()) >= 15
    assert set(names()) == set(caught()), "run `python -m tests.planted.hunt NAME --write` for the difference"
    assert all(seed < 2000 for seed in caught().values())


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_planted_bug_is_caught_on_its_seed(name: str) -> None:
    seed = caught()[name]
    with planted(name) as copy:
        found, said = simulate(copy, seed, 1, timeout_s=300.0)
    assert found == seed, f"{name} went unnoticed on seed {seed}:\n{said[-1500:]}"
