from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

Baton = Callable[..., subprocess.CompletedProcess[str]]


def test_the_same_seed_says_the_same_in_two_processes_and_another_seed_something_else(baton: Baton) -> None:
    first, again, other = (baton("simulate", "--seed", seed) for seed in ("5", "5", "6"))
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == again.stdout != other.stdout
    assert re.search(r"^seed 5: ok, [0-9]+ requests .* trace [0-9a-f]{16}$", first.stdout, re.MULTILINE)


def test_a_trace_shows_the_events_that_its_hash_covers(baton: Baton) -> None:
    lines = baton("simulate", "--seed", "5", "--trace").stdout.splitlines()
    (report,) = [line for line in lines if line.startswith("seed 5: ")]
    assert int(re.findall(r"(\d+) events", report)[0]) == lines.index(report)


def test_many_seeds_give_one_line(baton: Baton) -> None:
    done = baton("simulate", "--seed", "3", "--seeds", "3")
    assert (done.returncode, done.stdout) == (0, "3 of 3 worlds ok\n")
