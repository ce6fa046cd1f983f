from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest
import typer

from baton.cli.simulate import simulate
from baton.engine.block_pool import BlockPool

Baton = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_the_same_seed_says_the_same_in_two_processes_and_another_seed_something_else(baton: Baton) -> None:
    first, again, other = (baton("simulate", "--seed", seed) for seed in ("5", "5", "6"))
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == again.stdout != other.stdout
    assert re.search(r"^seed 5: ok, [0-9]+ requests .* trace [0-9a-f]{16} of [0-9]+ lines$", first.stdout, re.MULTILINE)


@pytest.mark.slow
def test_a_trace_shows_the_lines_that_its_hash_covers(baton: Baton) -> None:
    lines = baton("simulate", "--seed", "5", "--trace").stdout.splitlines()
    (report,) = [line for line in lines if line.startswith("seed 5: ")]
    assert int(re.findall(r"of (\d+) lines", report)[0]) == lines.index(report)


@pytest.mark.slow
def test_many_seeds_in_two_processes_give_one_summary(baton: Baton) -> None:
    done = baton("simulate", "--seed", "3", "--seeds", "3", "--jobs", "2")
    assert done.returncode == 0
    first, *rest = done.stdout.splitlines()
    assert first == "3 of 3 worlds ok"
    assert any("faults landed in the middle of work" in line for line in rest)
    assert any("simulated seconds in" in line for line in rest)
    assert done.stderr.splitlines()[-1].startswith("3 of 3 worlds, 0 failed")


def test_a_world_can_be_cut_down_to_some_of_its_faults_and_clients(baton: Baton) -> None:
    whole = baton("simulate", "--seed", "2").stdout
    part = baton("simulate", "--seed", "2", "--faults", "none", "--jobs-kept", "7").stdout
    assert "no faults" in part
    assert "no faults" not in whole
    assert "seed 2: ok, 7 requests" in part


@pytest.mark.parametrize("wrong", [("--faults", "one"), ("--seeds", "2", "--trace")])
def test_what_makes_no_sense_is_refused(baton: Baton, wrong: tuple[str, ...]) -> None:
    done = baton("simulate", *wrong)
    assert done.returncode == 2
    assert wrong[0] in done.stderr or "--trace" in done.stderr


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_world_that_fails_prints_the_command_that_replays_the_smallest_like_it(
    seeds: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planted: every pool forgets a block whenever it gives some back. One client is enough, and no fault."""
    release = BlockPool.release
    monkeypatch.setattr(BlockPool, "release", lambda pool, blocks: release(pool, blocks[1:]))
    with pytest.raises(typer.Exit) as end:
        simulate(seed=6, seeds=seeds)
    assert end.value.exit_code == 1
    out = capsys.readouterr().out
    assert "seed 6: FAILED" in out
    (command,) = set(re.findall(r"replay: baton simulate (--seed 6 --faults none --jobs-kept \d+) --trace", out))
    with pytest.raises(typer.Exit) as end:
        simulate(seed=6, faults="none", jobs_kept=int(command.split()[-1]))
    assert end.value.exit_code == 1
