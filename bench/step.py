"""What a decode step costs in Python, and how much of that the engine waits for.

A whole worker (node, scheduler, step loop, streams, message encoding) runs in this process on the engine that the
configuration gives, and requests decode together on it. Measured per step:

    kernels    from the beginning of the engine's step to its end
    gap        from there to the beginning of the next: what is not hidden, and on a busy machine what others did
               meanwhile
    loop       CPU time of the event loop's thread: schedule, commit, listeners, messages. Hidden, while gaps stay small
    hidden     loop / (loop + gap)
    share      gap / (gap + kernels): of a step, what Python costs its requests

    baton bench step --batch 1,8,32 --set engine.quantization=bf16 --set engine.threads=2
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from baton.core.config import Config, load
from baton.core.errors import SetupError
from baton.core.messages import Hello, StepMessage, Submit, UpMessage
from baton.core.request import Request, SamplingParams
from baton.core.step import Runner, Step, StepResult
from baton.core.worker import Route
from baton.decode_node.policy import decode_policy
from baton.engine.hash_runner import HashRunner
from baton.engine.host_runner import HostRunner
from baton.models.catalog import open_model
from baton.wire import codec
from baton.wire.client import GrpcDial
from baton.worker.assembly import open_node
from baton.worker.node import WorkerNode

PROMPT_TOKENS, WARM_UP_STEPS = 32, 8


@dataclasses.dataclass(frozen=True)
class Spell:
    """One step in the engine."""

    began_s: float
    ended_s: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds per step, medians."""

    kernels_s: float
    gap_s: float
    worst_gap_s: float
    """One gap in ten is as long."""
    loop_s: float
    """The mean: not every step has all of it."""

    @property
    def row(self) -> str:
        hidden, share = self.loop_s / (self.loop_s + self.gap_s), self.gap_s / (self.gap_s + self.kernels_s)
        return (f"{self.kernels_s * 1e3:10.2f} {self.gap_s * 1e6:8.0f} {self.worst_gap_s * 1e6:8.0f} "
                f"{self.loop_s * 1e6:8.0f} {hidden:8.0%} {share:8.1%}")


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Raises SetupError if there is nothing that could be measured."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,8,32", help="requests that decode together")
    parser.add_argument("--steps", type=int, default=100, help="measured steps of each batch")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.NAME=VALUE", dest="overrides")
    asked = parser.parse_args(arguments)
    most = WARM_UP_STEPS + 2 * asked.steps
    sampling = SamplingParams(max_tokens=most, temperature=asked.temperature, ignore_eos=True)
    config = load({}, asked.overrides)
    print(f"{'batch':>5} {'kernels ms':>10} {'gap us':>8} {'p90 us':>8} {'loop us':>8} "
          f"{'hidden':>8} {'share':>8}")
    for batch in (int(n) for n in asked.batch.split(",")):
        print(f"{batch:5} {asyncio.run(measured(config, batch, asked.steps, sampling)).row}")


async def measured(config: Config, batch: int, num_steps: int, sampling: SamplingParams) -> Cost:
    files = open_model(config.model)
    async with contextlib.AsyncExitStack() as stack:
        dial = GrpcDial()
        stack.push_async_callback(dial.close)
        policy = decode_policy(config, files.spec.eos_token_ids)
        node = await open_node(files, config, "bench", policy, dial, stack)
        spells = watch_kernels(node.parts.runner)
        turning = asyncio.create_task(node.run())
        try:
            return await _decode(node, spells, batch, num_steps, sampling)
        finally:
            turning.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await turning  # what broke the worker says more than its broken stream


def watch_kernels(runner: Runner) -> list[Spell]:
    """When the engine's part of each step began and ended, from now on. Raises SetupError for the hash model."""
    if isinstance(runner, HashRunner):
        raise SetupError("the hash model has no kernels to wait for. Set model.name to a real one.")
    spells: list[Spell] = []

    def logits(*arguments: Any) -> Any:
        began_s = time.perf_counter()
        answer = computed(*arguments)
        spells.append(Spell(began_s, time.perf_counter()))
        return answer

    if isinstance(runner, HostRunner):
        vars(runner)["execute"] = _watched(runner, runner.execute, spells)
    else:
        computed = vars(type(runner))["logits"].__get__(runner)
        vars(runner)["logits"] = logits
    return spells


def _watched(
    runner: HostRunner, execute: Callable[..., Awaitable[StepResult]], spells: list[Spell]
) -> Callable[[Step, Callable[[int], None] | None], asyncio.Future[StepResult]]:
    def watched(step: Step, on_layers: Callable[[int], None] | None = None) -> asyncio.Future[StepResult]:
        done = asyncio.ensure_future(execute(step, on_layers))
        job = runner._works[-1].job
        done.add_done_callback(lambda _: spells.append(Spell(job.began_s, job.ended_s)))
        return done

    return watched


async def _decode(node: WorkerNode, spells: list[Spell], batch: int, num_steps: int, sampling: SamplingParams) -> Cost:
    up: asyncio.Queue[UpMessage] = asyncio.Queue()
    up.put_nowait(Hello("bench"))
    for i in range(batch):
        prompt = tuple((7 * i + j) % 50 + 5 for j in range(PROMPT_TOKENS))
        up.put_nowait(Submit(Request(f"r{i}", prompt, sampling), Route("bench", None), 0))
    told = [0] * batch
    async with contextlib.aclosing(_stream(node, up)) as messages:
        await _read(messages, told, WARM_UP_STEPS)
        first, cpu_s = len(spells), time.thread_time()
        await _read(messages, told, WARM_UP_STEPS + num_steps)
        seen, cpu_s = spells[first:], time.thread_time() - cpu_s
    gaps = [after.began_s - before.ended_s for before, after in zip(seen, seen[1:], strict=False)]
    return Cost(
        statistics.median(spell.ended_s - spell.began_s for spell in seen),
        statistics.median(gaps),
        statistics.quantiles(gaps, n=10)[-1],
        cpu_s / len(seen),
    )


async def _stream(node: WorkerNode, up: asyncio.Queue[UpMessage]) -> AsyncGenerator[StepMessage, None]:
    """Messages, each encoded as the worker's server does."""

    async def asked() -> AsyncIterator[UpMessage]:
        while True:
            yield await up.get()

    async for message in node.stream(asked()):
        codec.STEP.encode(message).SerializeToString()
        yield message


async def _read(messages: AsyncIterator[StepMessage], told: list[int], num_tokens: int) -> None:
    """Until every request has so many tokens."""
    while min(told) < num_tokens:
        for chunk in (await anext(messages)).chunks:
            assert not chunk.error_code, chunk.error_message
            told[int(chunk.request_id[1:])] += len(chunk.token_ids)


if __name__ == "__main__":
    main()
