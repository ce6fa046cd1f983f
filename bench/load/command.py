"""`baton bench serve` and `baton bench interference`: their options, and what they print. docs/load.md describes the
figures."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from baton.bench.load import interference as mode
from baton.bench.load import plots
from baton.bench.load.arrivals import Process
from baton.bench.load.openai import PATHS
from baton.bench.load.plan import Lengths, Scale, Shape
from baton.bench.load.record import Slo
from baton.bench.load.report import QUIET_CORES, Json, row, table, warnings
from baton.bench.load.run import Measuring, Target, Traffic, sweep
from baton.core.errors import SetupError

T = TypeVar("T")


def serve(arguments: Sequence[str], prog: str) -> None:
    """Raises SetupError if there is nothing that could be measured."""
    asked = serve_options(prog).parse_args(arguments)
    if asked.plot:
        plots.figure(1)  # a missing package is said before the runs, not after
    rates: list[float | None] = [*asked.rate] if asked.rate else [None] if asked.trace else [1.0]
    if None not in rates and 0.0 in rates:
        raise SetupError("a rate of 0 requests per second measures nothing; leave it out of --rate.")
    shape = Shape(
        asked.prompt_tokens, asked.output_tokens, asked.shared_prefix, asked.prefix_groups, asked.turns, asked.think_s
    )
    scale = Scale(asked.length_scale, asked.max_prompt_tokens, asked.max_output_tokens)
    traffic = Traffic(shape, asked.arrivals, asked.trace, asked.trace_from_s, scale, asked.seed)
    target = target_of(asked, asked.url, frozenset(asked.server_pid))
    report = finished(sweep(target, traffic, measuring_of(asked), rates, say))
    print("\n".join(table([row(run) for run in report["runs"]])))
    for run in report["runs"]:
        for text in warnings(run):
            print(f"  at {run['offered_rate']:.2f}/s: {text}")
    if any(vars(asked)[name] is not None for name in SLO_OPTIONS):
        best = report["largest_rate_within_slo"]
        print(f"largest rate within the SLO: {'none of these' if best is None else f'{best:g}/s'}")
    keep(report, asked.json)
    if asked.plot:
        plots.draw_sweep(report, asked.plot)


def interference(arguments: Sequence[str], prog: str) -> None:
    """Raises SetupError if there is nothing that could be measured."""
    asked = interference_options(prog).parse_args(arguments)
    if asked.plot:
        plots.figure(1)
    load = mode.Disturbance(
        decode_rate=asked.decode_rate,
        decode=Shape(asked.decode_prompt_tokens, asked.decode_output_tokens),
        long=Shape(asked.long_prompt_tokens, asked.long_output_tokens),
        shares=tuple(asked.long_share),
        rates=tuple(asked.long_rate) if asked.long_rate else None,
        seed=asked.seed,
    )
    report = finished(mode.compare(systems_of(asked), load, measuring_of(asked), asked.repeats, say))
    print("\n".join(mode.lines(report)))
    keep(report, asked.json)
    if asked.plot:
        plots.draw_interference(report, asked.plot)


def systems_of(asked: argparse.Namespace) -> dict[str, mode.Open]:
    """Name -> how to bring it up. Baton's come first, and so it is their capacity that is measured."""
    target, systems = target_of(asked, "", frozenset()), dict[str, mode.Open]()
    if asked.baton:
        settings = [word for item in asked.set for word in ("--set", item)]
        for name, own in mode.BATON.items():
            systems[f"baton {name}"] = functools.partial(mode.own_baton, (*own, *settings), target)
    for item in asked.url:
        name, sep, address = item.partition("=")
        if not sep or name in systems:
            raise SetupError(f"--url {item!r} is not of the form name=http://host:port, or its name is taken.")
        systems[name] = functools.partial(mode.elsewhere, replace(target, url=address))
    if not systems:
        raise SetupError("--no-baton leaves nothing to measure; name an endpoint with --url.")
    return systems


# ---- options ---------------------------------------------------------------------------------------------------------

SLO_OPTIONS = {"slo_ttft_ms": "TTFT", "slo_tpot_ms": "an answer's mean time per token", "slo_itl_ms": "its longest gap"}


def serve_options(prog: str) -> argparse.ArgumentParser:
    parser = _parser(prog, "Open-loop load on an OpenAI-compatible endpoint: TTFT, ITL, TPOT and goodput at each rate.")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the endpoint (%(default)s)")
    when = parser.add_argument_group("when requests come")
    when.add_argument("--rate", type=_numbers, metavar="R[,R...]",
                      help="sessions per second, a run for each (1; a trace: as recorded)")  # fmt: skip
    when.add_argument("--arrivals", type=_read(Process.parse), default=Process(), metavar="PROCESS",
                      help="poisson (default), constant, gamma:cv=3, or onoff:on_s=2,off_s=8")  # fmt: skip
    when.add_argument("--trace", type=Path, metavar="FILE", help="replay this instead: Mooncake or Azure, also .gz")
    when.add_argument("--trace-from-s", type=_seconds, default=0.0, metavar="S", help="leave out its beginning (0)")
    what = parser.add_argument_group("what they are")
    _lengths(what, "--prompt-tokens", "512", "of each prompt")
    _lengths(what, "--output-tokens", "64", "of each answer")
    what.add_argument("--shared-prefix", type=_share, default=0.0, metavar="SHARE",
                      help="of a prompt, in common with its group (0)")  # fmt: skip
    what.add_argument("--prefix-groups", type=_count, default=1, metavar="N", help="that share a prefix each (1)")
    what.add_argument("--turns", type=_count, default=1, metavar="N",
                      help="requests per session, each sending all that was said (1)")  # fmt: skip
    what.add_argument("--think-s", type=_seconds, default=1.0, metavar="S", help="between an answer and the next (1)")
    what.add_argument("--length-scale", type=_positive, default=1.0, metavar="F", help="on a trace's lengths (1)")
    what.add_argument("--max-prompt-tokens", type=_count, metavar="N", help="cut a trace's prompts")
    what.add_argument("--max-output-tokens", type=_count, metavar="N", help="cut a trace's answers")
    _common(parser)
    parser.add_argument("--server-pid", type=int, action="append", default=[], metavar="PID",
                        help="the server here, with its children (who listens at the URL)")  # fmt: skip
    return parser


def interference_options(prog: str) -> argparse.ArgumentParser:
    parser = _parser(prog, "ITL of a steady decode load while long prompts arrive: Baton disaggregated, then Baton in "
                           "one worker, both started here, and endpoints that are up already.")  # fmt: skip
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="also this endpoint, as it is")
    parser.add_argument("--no-baton", dest="baton", action="store_false", help="start nothing")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="passed on to `baton serve`")
    parser.add_argument("--repeats", type=_count, default=1, metavar="N", help="rounds over all systems, A B A B (1)")
    load = parser.add_argument_group("the load")
    load.add_argument("--decode-rate", type=_positive, default=1.0, metavar="R", help="decode requests per second (1)")
    _lengths(load, "--decode-prompt-tokens", "32", "of the decode load's prompts")
    _lengths(load, "--decode-output-tokens", "128", "of its answers")
    _lengths(load, "--long-prompt-tokens", "2048", "of the prompts that disturb")
    _lengths(load, "--long-output-tokens", "4", "of their answers")
    load.add_argument("--long-share", type=_numbers, default=[0.0, 0.2, 0.4], metavar="S[,S...]",
                      help="rates of long prompts, in shares of the capacity measured first (0,0.2,0.4)")  # fmt: skip
    load.add_argument("--long-rate", type=_numbers, metavar="R[,R...]", help="the same per second, instead")
    _common(parser)
    return parser


def _parser(prog: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=prog, description=about, allow_abbrev=False)


def _common(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("each run")
    run.add_argument("--duration-s", type=_positive, default=60.0, metavar="S", help="the measured window (60)")
    run.add_argument("--warmup-s", type=_seconds, default=5.0, metavar="S", help="before it, at the same rate (5)")
    run.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32),
                     help="equal seeds send equal requests, which a prefix cache knows again (a new one)")  # fmt: skip
    for name, of in SLO_OPTIONS.items():
        run.add_argument(f"--{name.replace('_', '-')}", type=_positive, metavar="MS", help=f"limit on {of}")
    run.add_argument("--slo-share", type=_share, default=0.9, metavar="SHARE", help="of requests that keep them (0.9)")
    run.add_argument("--attempts", type=_count, default=1, metavar="N",
                     help=f"while others use over {QUIET_CORES:g} cores; the quietest is kept (1)")  # fmt: skip
    run.add_argument("--max-in-flight", type=_count, metavar="N", help="later requests leave late (unbounded)")
    run.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    run.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves here")
    ask = parser.add_argument_group("how the endpoint is asked")
    ask.add_argument("--api", choices=sorted(PATHS), default="completions", help="(%(default)s)")
    ask.add_argument("--model", help="as the endpoint names it (the first it lists)")
    ask.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    ask.add_argument("--tokenizer", type=Path, metavar="PATH",
                     help="tokenizer.json, or the directory that `baton model pull` prints, for prompts of exact "
                          "lengths (tokens per word are measured with two probes)")  # fmt: skip
    ask.add_argument("--body", type=_read(_fields), default={}, metavar="JSON", help="more fields; they win over ours")
    ask.add_argument("--timeout-s", type=_positive, default=600.0, metavar="S", help="of a request (600)")


def _lengths(group: argparse._ArgumentGroup, name: str, default: str, of: str) -> None:
    group.add_argument(name, type=_read(Lengths.parse), default=Lengths.parse(default), metavar="N|N-M",
                       help=f"length {of} ({default})")  # fmt: skip


def _read(parse: Callable[[str], T]) -> Callable[[str], T]:
    """The sentence of a SetupError as argparse shows it."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except SetupError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return read


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
    return number


def _seconds(text: str) -> float:
    return _number(text, 0, 1e9, "number of seconds")


def _share(text: str) -> float:
    return _number(text, 0, 1, "share from 0 to 1")


def _positive(text: str) -> float:
    return _number(text, 1e-9, 1e9, "number above 0")


def _count(text: str) -> int:
    return int(_number(text if text.isdigit() else "", 1, 1e9, "whole number from 1"))


def _numbers(text: str) -> list[float]:
    return [_number(part, 0, 1e9, "list of numbers, as 0.5,1,2") for part in text.split(",")]


def _fields(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SetupError(f'{text!r} is no JSON object, as {{"temperature": 0.7}}.')
    return found


# ---- what both do ----------------------------------------------------------------------------------------------------


def target_of(asked: argparse.Namespace, url: str, server_pids: frozenset[int]) -> Target:
    return Target(
        url, asked.api, asked.model, asked.tokenizer, asked.api_key, asked.body, asked.timeout_s, server_pids
    )


def measuring_of(asked: argparse.Namespace) -> Measuring:
    ttft_s, tpot_s, itl_s = (ms and ms / 1e3 for ms in (asked.slo_ttft_ms, asked.slo_tpot_ms, asked.slo_itl_ms))
    slo = Slo(ttft_s, tpot_s, itl_s)
    return Measuring(slo, asked.slo_share, asked.duration_s, asked.warmup_s, asked.attempts, asked.max_in_flight)


def finished(work: Coroutine[Any, Any, Json]) -> Json:
    """The report. A signal ends the work, and whatever it started, without one; further signals change nothing."""

    async def unless_told() -> Json:
        loop, task, told = asyncio.get_running_loop(), asyncio.ensure_future(work), asyncio.Event()

        def end() -> None:
            if not told.is_set():
                told.set()
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end)
        return await task

    try:
        return asyncio.run(unless_told())
    except asyncio.CancelledError:
        say("stopped; nothing was written.")
        raise SystemExit(1) from None


def keep(report: Json, path: Path | None) -> None:
    if path:
        try:
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as e:
            raise SetupError(f"cannot write {path}: {e.strerror}.") from e


def say(text: str) -> None:
    """Progress; stdout holds the results."""
    print(text, file=sys.stderr, flush=True)
