"""The figures: what each row of the table sends, and what it takes from the answers.

A row is a closed loop: so many requests, so many of them at once, all prompts different unless the row is about equal
ones. Every request is streamed over HTTP with the load generator's own client, which runs on the same cores. What else
used the CPU meanwhile is kept with each figure.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.bench.load import interference
from baton.bench.load.drive import drive
from baton.bench.load.host import PROC, Watch, family
from baton.bench.load.interference import Disturbance
from baton.bench.load.plan import Session, Turn
from baton.bench.load.record import Record
from baton.bench.load.report import Json
from baton.bench.load.run import Measuring, Met, Say, quietest

Value = Callable[[Sequence[Record]], float]
LONG_SHARE = 0.4
"""Of the rate at which one core computes long prompts: how many arrive beside a decode load."""
LONG_TOKENS = Disturbance().long.prompt.high
HOT = 2
"""How often a row about prefix hits sends each prompt again."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure and the load that it is measured with."""

    name: str
    title: str
    unit: str
    higher_is_better: bool = True
    prompt_tokens: int = 0
    output_tokens: int = 1
    concurrency: int = 1
    num_requests: int = 0
    again: int = 0
    """How often each prompt is sent once more, next."""
    warm_up: int = 0
    """Requests at the beginning that do not count."""
    value: Value = lambda records: 0.0

    @property
    def asks(self) -> bool:
        """It sends requests; else it is looked at from outside."""
        return self.num_requests > 0


# ---- what is taken from the answers ----------------------------------------------------------------------------------


def first_token_s(record: Record) -> float:
    """From when it was sent: in a closed loop, a request waits for its turn with the client."""
    assert record.sent_s is not None
    return record.event_s[0] - record.sent_s


def prefill_rate(records: Sequence[Record]) -> float:
    return statistics.median((r.prompt_tokens or r.asked_prompt_tokens) / first_token_s(r) for r in records)


def decode_rate(records: Sequence[Record]) -> float:
    return statistics.median(1 / r.tpot_s for r in records if r.tpot_s)


def output_rate(records: Sequence[Record]) -> float:
    """Of the whole, from the first request to the last token: all prompts count as time, none as output."""
    begin_s, end_s = min(r.sent_s or 0.0 for r in records), max(r.event_s[-1] for r in records)
    return sum(r.output_tokens for r in records) / (end_s - begin_s)


def hot_ms(records: Sequence[Record]) -> float:
    """Of the prompts that had been sent before."""
    return 1e3 * statistics.median(first_token_s(r) for i, r in enumerate(records) if i % (1 + HOT))


def cold_ms(records: Sequence[Record]) -> float:
    return 1e3 * statistics.median(first_token_s(r) for i, r in enumerate(records) if not i % (1 + HOT))


ROWS = (
    Row("prefill_512", "prefill, 512 tokens", "tok/s", True, 512, 1, 1, 6, warm_up=1, value=prefill_rate),
    Row("prefill_2048", "prefill, 2,048 tokens", "tok/s", True, 2048, 1, 1, 4, warm_up=1, value=prefill_rate),
    Row("decode_1", "decode, batch 1", "tok/s", True, 32, 128, 1, 4, warm_up=1, value=decode_rate),
    Row("out_8", "output, 8 at once", "tok/s", True, 128, 128, 8, 16, value=output_rate),
    Row("out_32", "output, 32 at once", "tok/s", True, 128, 128, 32, 64, value=output_rate),
    Row("prefix_hit", "TTFT, 2,048-token prefix hit", "ms", False, 2048, 1, 1, 2, again=HOT, value=hot_ms),
    Row("itl_long", "ITL p99 beside long prompts", "ms", False),
    Row("start", "start-up to first token", "s", False),
    Row("memory", "resident memory (PSS)", "MB", False),
)


def quick(row: Row) -> Row:
    """With half of the requests."""
    return replace(row, num_requests=max((row.num_requests + 1) // 2, row.warm_up + 1)) if row.asks else row


# ---- measuring -------------------------------------------------------------------------------------------------------


async def measure(row: Row, met: Met, seed: str, attempts: int) -> Json:
    """The figure of the least disturbed attempt. `value` is None, and `failed` says why, if a request failed."""
    return await quietest(lambda number: _attempt(row, met, f"{seed}/{row.name}/{number}"), attempts)


async def _attempt(row: Row, met: Met, seed: str) -> Json:
    sessions = planned(row, met, seed)
    async with Watch(met.server_pids) as watch:
        _, records = await drive(sessions, met.asker, row.concurrency)
    return figure(row, records) | {"cpu_cores": cores(watch), "loop_lag_s": watch.loop_lag_s}


def cores(watch: Watch) -> Json | None:
    """Whose they were in the mean, as `others_cores` reads it."""
    used = watch.mean
    return None if used is None else {"client": used.client, "server": used.server, "others": used.others}


def planned(row: Row, met: Met, seed: str) -> list[Session]:
    sessions = []
    for number in range(row.num_requests):
        text = met.prose.text(row.prompt_tokens - met.prose.frame_tokens, random.Random(f"{seed}/{number}"))
        turn = Turn((text,), row.prompt_tokens, row.output_tokens)
        sessions += [Session(0.0, (turn,))] * (1 + row.again)
    return sessions


def figure(row: Row, records: Sequence[Record]) -> Json:
    counted = list(records)[row.warm_up :]
    wrong = next((r for r in records if not r.ok or not r.event_s), None)
    if wrong is not None:
        return {"value": None, "failed": f"{wrong.error or 'no token'}: {wrong.message[:200]}"}
    found: Json = {"value": row.value(counted), "requests": len(counted)}
    found["prompt_tokens"] = statistics.fmean(r.prompt_tokens or r.asked_prompt_tokens for r in counted)
    found["output_tokens"] = statistics.fmean(r.output_tokens for r in counted)
    if row.again:
        hot = [r.cached_tokens for i, r in enumerate(counted) if i % (1 + row.again) and r.cached_tokens is not None]
        found |= {"cold_ms": cold_ms(counted), "cached_tokens": statistics.median(hot) if hot else None}
    return found


async def beside_long_prompts(met: Met, long_rate: float, seed: str, measuring: Measuring, say: Say) -> Json:
    """The gaps between the tokens of a steady decode load, while so many long prompts a second arrive."""
    (run,) = await interference.measure(met, Disturbance(), measuring, [long_rate], seed, say)
    decode = run["labels"][interference.DECODE]
    if errors := decode["requests"]["errors"]:
        return {"value": None, "failed": f"decode requests: {errors}"}
    itl = decode["itl_s"]
    return {"value": 1e3 * itl["p99"], "itl_p50_ms": 1e3 * itl["p50"], "long_rate": long_rate,
            "cpu_cores": run["cpu_cores"], "attempts_others_cores": run["attempts_others_cores"]}  # fmt: skip


async def start_alone(command: Sequence[str], attempts: int) -> Json:
    """Seconds until a child that ends at its first token has said so. Raises RuntimeError if it fails."""
    return await quietest(lambda _: _start_alone(command), attempts)


async def _start_alone(command: Sequence[str]) -> Json:
    now = asyncio.get_running_loop().time
    async with Watch(frozenset()) as watch:
        began_s = now()
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            line = await process.stdout.readline()
            took_s = now() - began_s
        finally:
            code = await process.wait()
    if not line or code:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {code} before a first token")
    return {"value": took_s, "cpu_cores": cores(watch)}


def resident_mb(pids: frozenset[int]) -> dict[str, float]:
    """PSS of each of these processes and their children, by `pid name`: the module it runs, else the program. Shared
    pages are split between those that map them, so that the sum is what the machine would have back."""
    found = {}
    for pid in sorted(family(pids)):
        try:
            rollup = (PROC / str(pid) / "smaps_rollup").read_text()
            words = (PROC / str(pid) / "cmdline").read_text().split("\0")
            name = (PROC / str(pid) / "comm").read_text().strip()
        except OSError:
            continue
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else name
        found[f"{pid} {module}"] = pss_kb(rollup) * 1024 / 1e6
    return found


def pss_kb(rollup: str) -> int:
    return next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
