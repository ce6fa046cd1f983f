"""`baton bench serve` and `baton bench interference` against a real stack with the hash model, and what they write."""

from __future__ import annotations

import asyncio
import json
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.bench.load.command import interference, interference_options, measuring_of, serve, serve_options
from baton.bench.load.run import Measuring, Target
from baton.bench.stack import serving
from baton.core.errors import SetupError

MODEL = ("--set", "model.name=hash:head_dim=64,step_s=0.002,token_s=0.0001")
DOCS = (Path(__file__).parents[2] / "docs/load.md").read_text()
TIMEOUT_S = 120
SPREAD = {"count", "mean", "p50", "p90", "p99", "max"}


def keys(found: Any) -> Iterator[str]:
    if isinstance(found, dict):
        for name, value in found.items():
            yield name
            yield from keys(value)
    elif isinstance(found, list):
        for value in found:
            yield from keys(value)


def undocumented(report: Any, *names: str) -> set[str]:
    """Names that a test chose are no keys."""
    return set(keys(report)) - set(re.findall(r"`([a-z0-9_ ]+)`", DOCS)) - set(names)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of a stack, on a loop that runs in a thread of its own: the commands bring theirs."""
    up, down, loop = queue.Queue[str](), asyncio.Event(), asyncio.new_event_loop()

    async def main() -> None:
        async with serving(["--prefill", "1", "--decode", "1", *MODEL]) as (address, _):
            up.put(address)
            await down.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    try:
        yield up.get(timeout=TIMEOUT_S)
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join(TIMEOUT_S)
        loop.close()


@pytest.mark.slow
def test_a_sweep_over_a_real_stack_sends_everything_and_bills_what_was_asked(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "load.json"
    serve(["--url", url, "--rate", "8,16", "--duration-s", "1.5", "--warmup-s", "0.5", "--prompt-tokens", "60-120",
           "--output-tokens", "4-9", "--shared-prefix", "0.5", "--slo-ttft-ms", "60000",
           "--json", str(out)], "b")  # fmt: skip
    report = json.loads(out.read_text())
    assert not undocumented(report)
    assert [run["rate"] for run in report["runs"]] == [8, 16]
    assert report["largest_rate_within_slo"] == 16
    for run in report["runs"]:
        assert run["requests"]["errors"] == {}
        assert run["requests"]["sent"] == run["requests"]["ok"] == run["ttft_s"]["count"] > 0
        tokens = run["tokens"]
        assert (tokens["counted_by"], tokens["output_short"]) == ("usage", 0)
        assert tokens["output"] == tokens["output_asked"]
        assert tokens["prompt"] == pytest.approx(tokens["prompt_asked"], rel=0.1)
        assert set(run["itl_s"]) == SPREAD
        assert run["cpu_cores"] is None or run["cpu_cores"]["server"] > 0
    assert "largest rate within the SLO: 16/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_chat_of_several_turns_finds_its_own_prefix_again(url: str, tmp_path: Path) -> None:
    out = tmp_path / "chat.json"
    serve(["--url", url, "--api", "chat", "--turns", "3", "--think-s", "0.05", "--rate", "3", "--duration-s", "3",
           "--warmup-s", "0", "--prompt-tokens", "100", "--output-tokens", "8", "--arrivals", "constant",
           "--json", str(out)], "b")  # fmt: skip
    (run,) = json.loads(out.read_text())["runs"]
    assert run["requests"]["errors"] == {}
    assert run["requests"]["ok"] > 9, "three turns each"
    assert run["tokens"]["prompt"] == pytest.approx(run["tokens"]["prompt_asked"], rel=0.05)
    assert run["tokens"]["prompt_cached"] > 30


@pytest.mark.slow
def test_a_trace_is_replayed_at_the_rate_that_was_asked(url: str, tmp_path: Path) -> None:
    out, trace = tmp_path / "trace.json", Path(__file__).parent / "traces/mooncake.jsonl"
    serve(["--url", url, "--trace", str(trace), "--rate", "5", "--length-scale", "0.1", "--max-output-tokens", "2",
           "--duration-s", "2", "--warmup-s", "0", "--json", str(out)], "b")  # fmt: skip
    report = json.loads(out.read_text())
    assert not undocumented(report)
    assert report["runs"][0]["requests"]["ok"] == 5


@pytest.mark.slow
def test_interference_is_measured_on_endpoints_that_are_up(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "interference.json"
    interference(["--no-baton", "--url", f"one={url}", "--url", f"two={url}", "--decode-rate", "4",
                  "--decode-output-tokens", "8", "--long-prompt-tokens", "400", "--long-share", "0,0.2",
                  "--duration-s", "1.5", "--warmup-s", "0.5", "--repeats", "2", "--json", str(out)], "b")  # fmt: skip
    report = json.loads(out.read_text())
    assert not undocumented(report, "one", "two")
    assert report["capacity_prompts_per_s"] > 0
    assert {name: len(runs) for name, runs in report["systems"].items()} == {"one": 4, "two": 4}
    for runs in report["systems"].values():
        assert {run["long_rate"] for run in runs} == {0, 0.2 * report["capacity_prompts_per_s"]}
        assert all(run["labels"]["decode"]["itl_s"]["count"] > 0 for run in runs)
    said = capsys.readouterr().out
    assert "ITL p99" in said
    assert len([line for line in said.splitlines() if line.split()[0] in {"one", "two"} and " at " not in line]) == 4


@pytest.mark.slow
def test_interference_starts_both_of_its_own_systems_and_ends_them(tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    interference([*MODEL, "--decode-rate", "4", "--decode-output-tokens", "4", "--long-prompt-tokens", "200",
                  "--long-rate", "2", "--duration-s", "1", "--warmup-s", "0", "--json", str(out)], "b")  # fmt: skip
    report = json.loads(out.read_text())
    assert list(report["systems"]) == ["baton disaggregated", "baton aggregated"]
    for (run,) in report["systems"].values():
        assert run["requests"]["errors"] == {}
        assert run["labels"]["decode"]["requests"]["ok"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("while_at", ["Workers", "beside"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_told_to_end_takes_its_stack_with_it(number: signal.Signals, while_at: str) -> None:
    command = [sys.executable, "-m", "baton.cli.main", "bench", "interference", *MODEL, "--long-rate", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        assert any(while_at in line for line in process.stderr)
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(TIMEOUT_S) == 1
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "x"], "no list of numbers"),
        (["--rate", "-1"], "no list of numbers"),
        (["--arrivals", "pareto"], "pareto"),
        (["--prompt-tokens", "9-3"], "no number of tokens"),
        (["--shared-prefix", "1.5"], "no share"),
        (["--turns", "0"], "no whole number"),
        (["--duration-s", "0"], "no number above 0"),
        (["--body", "[]"], "no JSON object"),
        (["--rat", "1"], "unrecognized arguments"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_in_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        serve_options("baton bench serve").parse_args(arguments)
    assert exit.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "0,1"], "a rate of 0"),
        (["--url", "nowhere"], "no address"),
        (["--trace", "missing.csv"], "cannot read the trace"),
        (["--tokenizer", "missing"], "no tokenizer"),
    ],
)
def test_a_load_that_cannot_begin_says_why(arguments: list[str], says: str) -> None:
    with pytest.raises(SetupError, match=says):
        serve(["--model", "m", *arguments], "baton bench serve")


@pytest.mark.parametrize(
    "arguments", [["--no-baton"], ["--url", "http://x"], ["--url", "a=http://x", "--url", "a=http://y"]]
)
def test_systems_need_a_name_and_an_address_each(arguments: list[str]) -> None:
    with pytest.raises(SetupError, match="name"):
        interference(arguments, "baton bench interference")


def test_the_defaults_of_the_command_are_those_of_the_documentation() -> None:
    load, asked = serve_options("b").parse_args([]), interference_options("b").parse_args([])
    assert measuring_of(load) == measuring_of(asked) == Measuring()
    assert load.timeout_s == Target("").timeout_s
    assert "32 tokens in, 128 out, one request a second" in DOCS
    assert (asked.decode_prompt_tokens.low, asked.decode_output_tokens.low, asked.decode_rate) == (32, 128, 1)
    assert asked.long_share == [0, 0.2, 0.4]


def test_two_runs_without_a_seed_have_different_ones() -> None:
    assert serve_options("b").parse_args([]).seed != serve_options("b").parse_args([]).seed
