"""Traces replayed through the production router: first come, first served, it must give what a few lines of arithmetic
give; with chunks, hand-off and decoding, what everybody expects of prefixes and queues."""

from __future__ import annotations

import json
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from baton.bench.load.traces import BLOCK_TOKENS, Traced, read_trace
from baton.bench.route.cell import at
from baton.bench.route.command import main
from baton.bench.route.plots import column
from baton.bench.route.questions import timed
from baton.bench.route.setup import PREFILL_TOKENS_PER_S, REQUEST_S, Setup
from baton.bench.route.world import replay
from baton.core.config import PolicyName, data_dir
from baton.core.errors import SetupError

HERE = Path(__file__).parent / "traces"
BLOCKS = 300
"""Of a worker: some of the conversations fit, not all."""


def conversations(num_requests: int = 300, seed: int = 3) -> list[Traced]:
    """People who ask again with everything said before: each prompt extends an earlier one."""
    rng, fresh, at_s, trace = random.Random(seed), iter(range(1, 1 << 20)), 0.0, list[Traced]()
    talks: list[tuple[int, ...]] = [()] * 40
    for number in range(num_requests):
        at_s += rng.expovariate(1.0)
        index = rng.randrange(10) + number // 10 * 10 % len(talks)
        if not 0 < len(talks[index]) <= 48:
            talks[index] = tuple(next(fresh) for _ in range(rng.randint(4, 30)))
        talks[index] += tuple(next(fresh) for _ in range(rng.randint(2, 12)))
        tokens = len(talks[index]) * BLOCK_TOKENS - rng.randrange(BLOCK_TOKENS)
        trace.append(Traced(at_s, tokens, rng.randint(20, 300), talks[index]))
    return trace


Choice = Callable[[int, Sequence[float], Sequence[int]], Sequence[float]]
"""(turn, seconds until each worker is free, its uncached tokens) -> a price for each worker."""
CHOICES: dict[PolicyName, Choice] = {
    "round_robin": lambda turn, waits, uncached: [(w - turn) % len(waits) for w in range(len(waits))],
    "cost": lambda turn, waits, uncached: [
        w + n / PREFILL_TOKENS_PER_S for w, n in zip(waits, uncached, strict=True)
    ],
}


def by_arithmetic(trace: Sequence[Traced], num_workers: int, num_blocks: int, choose: Choice) -> dict[str, float]:
    """One server per worker, one prompt after the other, a cache that forgets the full blocks used longest ago."""
    free_at, hits, total, ttft_s, rng = [0.0] * num_workers, 0, 0, list[float](), random.Random(1)
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_workers)]
    for turn, request in enumerate(trace):
        held = []
        for cache in caches:
            known = [block in cache for block in request.blocks] + [False]
            held.append(min(known.index(False), (request.prompt_tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS)
        waits = [max(0.0, t - request.at_s) for t in free_at]
        prices = choose(turn, waits, [request.prompt_tokens - h for h in held])
        chosen = min(range(num_workers), key=lambda w: (prices[w], rng.random()))
        service_s = REQUEST_S + (request.prompt_tokens - held[chosen]) / PREFILL_TOKENS_PER_S
        free_at[chosen] = max(request.at_s, free_at[chosen]) + service_s
        ttft_s.append(free_at[chosen] - request.at_s)
        hits, total = hits + held[chosen], total + request.prompt_tokens
        full = request.prompt_tokens // BLOCK_TOKENS
        for block in reversed(request.blocks[:full]):
            caches[chosen][block] = None
            caches[chosen].move_to_end(block)
        while len(caches[chosen]) > num_blocks:
            caches[chosen].popitem(last=False)
    return {"hit": hits / total, "mean": statistics.fmean(ttft_s), "p99": at(sorted(ttft_s), 0.99)}


def test_first_come_first_served_is_what_arithmetic_says() -> None:
    trace = conversations()
    cell = replay(trace, Setup("fcfs", "round_robin", num_prefill=3, num_decode=1, num_blocks=BLOCKS), 0.7)
    expected = by_arithmetic(timed(trace, Setup(num_prefill=3), 0.7), 3, BLOCKS, CHOICES["round_robin"])
    assert cell.num_failed == 0
    assert cell.hit == pytest.approx(expected["hit"], rel=0.02)
    assert cell.mean_ttft_s == pytest.approx(expected["mean"], rel=0.02)
    assert cell.p99_ttft_s == pytest.approx(expected["p99"], rel=0.02)


def test_the_cost_policy_is_nearly_as_good_as_one_that_knows_everything_at_once() -> None:
    """Reports of queues and blocks take their time. In a trace of a day that is lost in the noise (below)."""
    trace = conversations()
    cell = replay(trace, Setup("fcfs", "cost", num_prefill=3, num_decode=1, num_blocks=BLOCKS), 0.7)
    best = by_arithmetic(timed(trace, Setup(num_prefill=3), 0.7), 3, BLOCKS, CHOICES["cost"])
    blind = by_arithmetic(timed(trace, Setup(num_prefill=3), 0.7), 3, BLOCKS, CHOICES["round_robin"])
    assert cell.hit > best["hit"] - 0.25 * (best["hit"] - blind["hit"])
    assert cell.mean_ttft_s < best["mean"] + 0.25 * (blind["mean"] - best["mean"])


def test_a_coarser_grain_changes_no_figure_by_much() -> None:
    trace = conversations(100)
    fine, coarse = (replay(trace, Setup("fcfs", "round_robin", 2, 1, 1, BLOCKS, grain), 0.6) for grain in (8, 32))
    assert coarse.hit == pytest.approx(fine.hit, abs=0.01)
    assert coarse.mean_ttft_s == pytest.approx(fine.mean_ttft_s, rel=0.03)


def test_load_is_what_the_prompts_would_keep_the_workers_busy_for() -> None:
    trace = conversations(50)
    last = timed(trace, Setup(num_prefill=4), 0.5)[-1].at_s
    assert sum(r.prompt_tokens for r in trace) / (4 * PREFILL_TOKENS_PER_S) == pytest.approx(0.5 * last)


def test_two_replays_of_one_seed_are_equal() -> None:
    trace, setup = conversations(60), Setup("production", "least_work", 2, 1, num_blocks=BLOCKS)
    assert replay(trace, setup, 1.0) == replay(trace, setup, 1.0)


def test_in_production_every_request_is_answered_and_prefixes_are_found() -> None:
    trace = conversations(150)
    blind, seeing = (
        replay(trace, Setup("production", policy, 3, 2, num_blocks=BLOCKS), 1.1) for policy in ("round_robin", "cost")
    )
    assert blind.num_failed == seeing.num_failed == 0
    assert seeing.hit > blind.hit
    assert seeing.mean_ttft_s < blind.mean_ttft_s
    assert 0 < seeing.mean_tpot_s < 0.1


def test_a_policy_that_predicts_tells_its_regret_by_kind_of_prefill_and_another_has_none() -> None:
    trace = conversations(150)
    seeing, blind = (
        replay(trace, Setup("production", policy, 3, 2, num_blocks=BLOCKS), 1.5) for policy in ("cost", "sglang")
    )
    assert blind.regret_s is blind.regret_remote_s is blind.prediction_error_s is None
    told = seeing.regret_remote_s, seeing.regret_s, seeing.regret_local_s, seeing.prediction_error_s
    assert None not in told
    remote_s, both_s, local_s, error_s = (s or 0.0 for s in told)
    assert 0 < remote_s < both_s < local_s
    assert both_s < error_s < seeing.mean_ttft_s
    assert 0 < seeing.local < 0.1


def test_several_routers_share_one_fleet() -> None:
    trace = conversations(120)
    cell = replay(trace, Setup("production", "cost", 2, 1, num_routers=3, num_blocks=BLOCKS), 0.8)
    assert cell.num_failed == 0
    assert cell.num_requests == 120


def test_a_trace_without_block_names_has_no_hits() -> None:
    cell = replay(read_trace(HERE / "azure.csv"), Setup("fcfs", "cost", 2, 1), 0.5)
    assert cell.hit == pytest.approx(0.0)


def test_the_command_prints_and_keeps_a_row_for_each_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "rows.json"
    main(["--trace", str(HERE / "mooncake.jsonl"), "--policy", "cost", "sglang", "--workers", "1", "2",
          "--mode", "fcfs", "--json", str(kept)])
    rows: list[dict[str, Any]] = json.loads(kept.read_text())
    assert [(r["policy"], r["workers"]) for r in rows] == [("cost", 1), ("sglang", 1), ("cost", 2), ("sglang", 2)]
    assert {"hit", "mean_ttft_s", "p99_ttft_s", "imbalance", "util"} <= set(rows[0])
    assert capsys.readouterr().out.count("\n") == 5


def test_rows_that_were_kept_are_shown_and_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    kept, drawn = tmp_path / "rows.json", tmp_path / "rows.png"
    main(["--trace", str(HERE / "mooncake.jsonl"), "--policy", "cost", "sglang", "--workers", "1", "2",
          "--json", str(kept)])
    replayed = capsys.readouterr().out
    main(["--rows", str(kept), "--plot", str(drawn)])
    assert capsys.readouterr().out == replayed
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_column_of_the_plot_names_what_its_rows_have_in_common() -> None:
    row = {"policy": "cost", "workers": 8, "load": 1.2, "routers": 1, "world": "simulated"}
    assert column(row) == column({**row, "policy": "dynamo"}) == "8 workers\nload 1.2"
    assert column({**row, "routers": 4, "world": "real"}) == "8 workers\nload 1.2\n4 routers\nreal"


@pytest.mark.parametrize("wrong", [("--load", "0"), ("--pace", "-1"), ("--pace", "nan"), ("--workers", "0")])
def test_load_pace_and_workers_are_above_zero(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--trace", str(HERE / "mooncake.jsonl"), *wrong])
    assert f"{wrong[1]} is not a" in capsys.readouterr().err


def test_rows_that_cannot_be_read_are_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("policy")
    with pytest.raises(SetupError, match="rows"):
        main(["--rows", str(tmp_path / "rows.json")])


@pytest.mark.slow
def test_real_processes_replay_what_the_simulator_does(tmp_path: Path) -> None:
    """At a twentieth of the trace's pace, so that a busy machine changes little. What is found of the prompts and how
    much work is left are the same; the times are those of a real machine."""
    kept = tmp_path / "rows.json"
    main(["--trace", str(HERE / "mooncake.jsonl"), "--policy", "cost", "--workers", "2", "--pace", "0.05", "--real",
          "--json", str(kept)])
    simulated, real = json.loads(kept.read_text())
    assert (simulated["world"], real["world"]) == ("simulated", "real")
    assert real["num_failed"] == 0, real["failure"]
    assert real["hit"] == simulated["hit"] > 0
    assert real["util"] * real["took_s"] == pytest.approx(simulated["util"] * simulated["took_s"], rel=0.1)
    assert real["mean_ttft_s"] > 0.9 * simulated["mean_ttft_s"]


def test_real_processes_do_not_compute_one_prompt_after_the_other() -> None:
    with pytest.raises(SetupError, match="production"):
        main(["--trace", str(HERE / "mooncake.jsonl"), "--policy", "cost", "--mode", "fcfs", "--real"])


@pytest.mark.slow
def test_on_a_public_trace_baton_is_no_worse_than_the_published_cost_policy() -> None:
    """Synthetic trace, 4 workers, load 0.85. The simulation that docs/routing.md compares with gives hit 0.344, mean
    0.665 s, p99 3.14 s over five seeds, to a policy that knows each queue and cache at every instant."""
    data = data_dir()
    trace = data / "traces/mooncake_synthetic_trace.jsonl.gz" if data else None
    if trace is None or not trace.is_file():
        pytest.skip("BATON_DATA has no public traces")
    cell = replay(read_trace(trace), Setup("fcfs", "cost", num_prefill=4, num_decode=1), 0.85)
    assert cell.hit > 0.95 * 0.344
    assert cell.mean_ttft_s < 1.05 * 0.665
    assert cell.p99_ttft_s < 1.05 * 3.139
