"""What becomes of a stack that is asked for more than it can do: real processes, workers of the hash model.

    baton bench overload [--times 5] [--seconds 120]

1. flood: half the capacity, its peak, `times` the peak in an open loop, ten seconds of peace, half again. How much is
   answered in time, how soon the rest is refused and whether it hears when to come back, what the router's memory does
2. cancels: 20 times 300 requests, all of them given up while they run; then nothing may be held
3. slow readers: 200 clients that read a byte a second, and what others notice of them, beside 200 that read at once

Latencies count from when a request was meant to leave. The machine's load average stands beside the figures: the client
and the stack share its cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from baton.bench.load.run import open_many_files
from baton.bench.stack import serving

MODEL, SERVED_NAME = "hash:step_s=0.01,token_s=0.002", "hash"
PROMPT_CHARS, OUTPUT_TOKENS = 32, 8
"""The hash model's tokens are characters: a prompt takes 0.07 s."""
TTFT_SLO_S, DEADLINE_S = 2.0, 4.0
CAPACITY = 12.0
"""Requests a second to look for the peak around."""
CALM_S, BACK_S = 30.0, 10.0
"""Half the load for so long, before the flood and so long after it, with equal arrivals."""
TIGHT = (
    f"model.name={MODEL}", f"router.request_timeout_s={DEADLINE_S}", "router.max_queue_wait_s=1",
    "router.worker_queue_s=0.3", "router.max_queued=64", "prefill.max_sequences=16", "decode.max_sequences=32",
)
ROOMY = ("model.name=hash:step_s=0.01,token_s=0.0002", "router.max_queued=400", "decode.max_sequences=256")
"""Everything that is asked for runs."""
STORMS, STORM = 20, 300
LONG_READERS, LONG_TOKENS = 200, 600
SMALL_WINDOW_BYTES = 4096
"""Of a slow reader's socket: what it has not read stays with the router."""
PARTS = ("flood", "cancels", "slow_readers")

Say = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """Of one request; times from when it was meant to leave."""

    status: int = 0
    retry_after: str = ""
    ttft_s: float | None = None
    took_s: float = 0.0
    whole: bool = False

    @property
    def in_time(self) -> bool:
        return self.whole and self.ttft_s is not None and self.ttft_s <= TTFT_SLO_S and self.took_s <= DEADLINE_S


@dataclass(frozen=True, slots=True)
class Door:
    """A router's HTTP port. Every request has a connection of its own."""

    host: str
    port: int

    async def ask(self, prompt: str, max_tokens: int = OUTPUT_TOKENS, meant_s: float | None = None) -> Outcome:
        """One streamed completion, read as fast as it comes. Cancelled: the connection is cut."""
        loop = asyncio.get_running_loop()
        outcome, meant_s = Outcome(), loop.time() if meant_s is None else meant_s
        try:
            async with asyncio.timeout(60), self.opened(prompt, max_tokens) as reader:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                outcome.status = int(head.split(" ", 2)[1])
                outcome.retry_after = head.partition("retry-after: ")[2].partition("\r\n")[0]
                last = b""
                while data := await reader.read(65_536):
                    if outcome.ttft_s is None and b'"text"' in data:
                        outcome.ttft_s = loop.time() - meant_s
                    last = last[-64:] + data
                outcome.whole = b"[DONE]" in last
        except (OSError, asyncio.IncompleteReadError, TimeoutError):
            outcome.status = outcome.status or -1
        outcome.took_s = loop.time() - meant_s
        return outcome

    @asynccontextmanager
    async def opened(self, prompt: str, max_tokens: int, window_bytes: int = 0) -> AsyncIterator[asyncio.StreamReader]:
        """The answer to a request that was sent; the connection is cut at the end."""
        body = json.dumps({"model": SERVED_NAME, "prompt": prompt, "max_tokens": max_tokens, "stream": True,
                           "ignore_eos": True}).encode()
        sock = socket.socket()
        if window_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=window_bytes or 1 << 16)
        except BaseException:
            sock.close()
            raise
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                         b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            yield reader
        finally:
            writer.transport.abort()


@dataclass(slots=True)
class Phase:
    seconds: float
    outcomes: list[Outcome] = field(default_factory=list)
    left_late_s: list[float] = field(default_factory=list)
    """Of each request: the client's own part of its times."""
    rss_bytes: int = 0
    """The router's, at most."""
    cpu_s: float = 0.0
    """The router's."""
    cpu_wait_s: float = 0.0
    """The router's, for a core that others had."""

    def figures(self) -> dict[str, Any]:
        answered = [o.took_s for o in self.outcomes if o.whole]
        refused = [o for o in self.outcomes if o.status == 429]
        return {
            "asked": len(self.outcomes),
            "goodput_per_s": round(sum(o.in_time for o in self.outcomes) / self.seconds, 2),
            "answered_p50_s": quantile(answered, 0.5), "answered_p99_s": quantile(answered, 0.99),
            "refused": len(refused),
            "refused_p50_s": quantile([o.took_s for o in refused], 0.5),
            "refused_p99_s": quantile([o.took_s for o in refused], 0.99),
            "left_late_p99_s": quantile(self.left_late_s, 0.99),
            "told_when_to_come_back": sum(bool(o.retry_after) for o in refused),
            "other_statuses": dict(Counter(o.status for o in self.outcomes if o.status not in (200, 429))),
            "router_rss_mb": round(self.rss_bytes / 1e6, 1),
            "router_waited_for_cores": round(self.cpu_wait_s / self.seconds, 3),
            "router_cpu_ms_per_request": round(1e3 * self.cpu_s / max(1, len(self.outcomes)), 2),
        }


def quantile(values: Sequence[float], share: float) -> float | None:
    ranked = sorted(values)
    return round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 4) if ranked else None


class Bench:
    def __init__(self, door: Door, router_pid: int, rng: random.Random, say: Say) -> None:
        self._door = door
        self._router = Path(f"/proc/{router_pid}")
        self._rng = rng
        self._say = say

    def rss_bytes(self) -> int:
        return int((self._router / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        user, system = (self._router / "stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def cpu_wait_s(self) -> float:
        """Of the thread that its event loop runs in: runnable, and not run."""
        return int((self._router / "schedstat").read_text().split()[1]) / 1e9

    def prompt(self) -> str:
        return "".join(self._rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(PROMPT_CHARS))

    async def load(self, rate: float, seconds: float, arrivals: random.Random | None = None) -> Phase:
        """An open loop; ends when the last answer has. `arrivals`: drawn from these dice."""
        dice = arrivals or self._rng
        loop, phase = asyncio.get_running_loop(), Phase(seconds)
        phase.cpu_s, phase.cpu_wait_s = -self.cpu_s(), -self.cpu_wait_s()
        began, at, clients = loop.time(), 0.0, list[asyncio.Task[Outcome]]()
        while (at := at + dice.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, began + at - loop.time()))
            phase.left_late_s.append(loop.time() - began - at)
            clients.append(asyncio.create_task(self._door.ask(self.prompt(), meant_s=began + at)))
            if len(clients) % 16 == 0:
                phase.rss_bytes = max(phase.rss_bytes, self.rss_bytes())
        phase.outcomes = list(await asyncio.gather(*clients))
        phase.rss_bytes = max(phase.rss_bytes, self.rss_bytes())
        phase.cpu_s += self.cpu_s()
        phase.cpu_wait_s += self.cpu_wait_s()
        self._say(f"{rate:6.1f}/s for {seconds:g} s: {json.dumps(phase.figures())}")
        return phase

    async def flood(self, times: float, seconds: float) -> dict[str, Any]:
        await self.load(CAPACITY, 10.0)  # the workers are no fresh ones, and have measured themselves
        calm = self._rng.random()
        before = await self.load(CAPACITY / 2, CALM_S, random.Random(calm))
        peak = max([await self.load(share * CAPACITY, 15.0) for share in (0.9, 1.1, 1.3, 1.5)],
                   key=lambda phase: phase.figures()["goodput_per_s"])
        goodput = peak.figures()["goodput_per_s"]
        flood = await self.load(times * goodput, seconds)
        await asyncio.sleep(BACK_S)
        after = await self.load(CAPACITY / 2, CALM_S, random.Random(calm))
        figures = {name: phase.figures() for name, phase in
                   (("before", before), ("peak", peak), ("flood", flood), ("after", after))}
        back = figures["after"]["answered_p99_s"] / figures["before"]["answered_p99_s"]
        return {**figures, "goodput_of_peak": round(figures["flood"]["goodput_per_s"] / goodput, 3),
                "router_rss_of_peak": round(flood.rss_bytes / peak.rss_bytes, 3),
                "p99_after_of_before": round(back, 3)}

    async def cancels(self) -> dict[str, Any]:
        """Each storm is cut off while it runs; then one request must be answered as one is on an idle stack."""
        alone = [(await self._door.ask(self.prompt())).took_s for _ in range(10)]
        after = []
        for _ in range(STORMS):
            storm = [asyncio.create_task(self._door.ask(self.prompt(), LONG_TOKENS)) for _ in range(STORM)]
            await asyncio.sleep(1.0)
            for client in storm:
                client.cancel()
            await asyncio.wait(storm)
            after.append((await self._door.ask(self.prompt())).took_s)
        await asyncio.sleep(2.0)
        return {"alone_p50_s": quantile(alone, 0.5), "after_storms_p50_s": quantile(after, 0.5),
                "after_storms_p99_s": quantile(after, 0.99), "held_afterwards": await self._held()}

    async def slow_readers(self) -> dict[str, Any]:
        """Others beside many long answers: those that are read at once, and those that are not."""
        await self.load(CAPACITY, 10.0)
        quick = await self._beside(lambda: self._door.ask(self.prompt(), LONG_TOKENS))
        slow = await self._beside(self._dawdle)
        return {"router_rss_more_mb": round((slow.rss_bytes - quick.rss_bytes) / 1e6, 1),
                "beside_quick_readers": quick.figures(), "beside_slow_readers": slow.figures()}

    async def _beside(self, read: Callable[[], Coroutine[Any, Any, object]]) -> Phase:
        readers = [asyncio.create_task(read()) for _ in range(LONG_READERS)]
        await asyncio.sleep(3.0)
        phase = await self.load(CAPACITY / 2, 15.0)
        for reader in readers:
            reader.cancel()
        await asyncio.wait(readers)
        await asyncio.sleep(3.0)
        return phase

    async def _dawdle(self) -> None:
        try:
            async with self._door.opened(self.prompt(), LONG_TOKENS, SMALL_WINDOW_BYTES) as reader:
                while await reader.read(1):  # noqa: ASYNC110 (the pace is the point)
                    await asyncio.sleep(1.0)
        except OSError:
            pass  # refused, or given up: that is the router's right

    async def _held(self) -> dict[str, float]:
        """What the router and the workers still hold: everything but free and cached blocks."""
        reader, writer = await asyncio.open_connection(self._door.host, self._door.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        gauges = ("baton_queued_requests", "baton_ledger_broken", *(
            f'state="{state}"' for state in ("active", "lent", "quarantined")))
        told = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in told
                if any(gauge in name for gauge in gauges) and float(value) != 0}


def router_of(serve_pid: int) -> int:
    """The process id of its router."""
    children = Path(f"/proc/{serve_pid}/task/{serve_pid}/children").read_text().split()
    (router,) = (int(pid) for pid in children if b"baton.cli.router_child" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return router


async def measure(asked: argparse.Namespace) -> dict[str, Any]:
    open_many_files()
    report: dict[str, Any] = {}
    for part in asked.only or PARTS:
        settings = (f"model.served_name={SERVED_NAME}", "router.local_prefill_max_tokens=0",
                    *(TIGHT if part == "flood" else ROOMY))
        async with serving([argument for setting in settings for argument in ("--set", setting)]) as (url, pid):
            parts = urlsplit(url)
            assert parts.hostname is not None, url
            assert parts.port is not None, url
            bench = Bench(Door(parts.hostname, parts.port), router_of(pid), random.Random(asked.seed), print)
            before = os.getloadavg()[0]
            if part == "flood":
                report[part] = await bench.flood(asked.times, asked.seconds)
            else:
                report[part] = await (bench.cancels() if part == "cancels" else bench.slow_readers())
            report[part]["load_average"] = [round(before, 1), round(os.getloadavg()[0], 1)]
    return report


def main(arguments: Sequence[str] | None = None, name: str = "python -m baton.bench.overload") -> None:
    parser = argparse.ArgumentParser(prog=name, description="A stack that is asked for more than it can do.")
    parser.add_argument("--times", type=float, default=5.0, help="The flood, in multiples of the peak.")
    parser.add_argument("--seconds", type=float, default=120.0, help="How long it lasts.")
    parser.add_argument("--only", action="append", choices=PARTS, help="Not the others.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="Write the report here.")
    asked = parser.parse_args(arguments)
    report = asyncio.run(measure(asked))
    text = json.dumps(report, indent=1)
    print(text)
    if asked.json:
        asked.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
