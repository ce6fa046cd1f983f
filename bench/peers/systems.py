"""What is measured: Baton, llama.cpp's server and vLLM, each as it is started, and the way up and down again.

1. a `System` says how it is started, and with what
2. `up` starts it on a free port and asks for one token: the time from the start to that token is its start-up
3. rows.py asks it over HTTP
4. it and its children end with `up`

All hold as much KV in all (KV_BYTES), and as many sequences may run as any row sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from baton.bench.load.client import Client, Failed
from baton.bench.load.host import Watch
from baton.bench.load.openai import Dialect, first_model, probe
from baton.bench.load.report import Json
from baton.bench.load.run import Met, Target, meet, quietest
from baton.bench.peers.builds import environment
from baton.bench.peers.limits import kv_bytes_per_token
from baton.bench.peers.rows import ROWS, cores
from baton.bench.stack import free_port, serving
from baton.cli.stack import end_group
from baton.core.errors import SetupError
from baton.models.spec import ModelSpec

KV_BYTES = 2 << 30
NUM_SEQUENCES = 32
APART_ROWS = frozenset({"prefill_512", "prefill_2048", "decode_1", "out_8", "prefix_hit", "itl_long", "memory"})
"""Of a disaggregated Baton, which is what `baton serve` starts: what it is for, and what it costs in speed and memory
beside one worker with every thread. Not what takes longest, or is the same for both."""
ALL_ROWS = frozenset(row.name for row in ROWS)
PLAIN_ROWS = ALL_ROWS - {"itl_long"}
"""Of who is not asked what long prompts do to others."""
LLAMA_CONTEXT_STEP = 256
START_TIMEOUT_S, STOP_TIMEOUT_S, POLL_S = 600.0, 30.0, 0.05
LAST_LINES = 12
VLLM_ALLOCATOR, VLLM_OPENMP = "tcmalloc_minimal", "libiomp5.so"
"""vLLM warns that it is slow without them. The first is the system's, where it has it, the second its environment's."""


@dataclass(frozen=True, slots=True)
class System:
    name: str
    peer: str
    """Whose it is: baton, llama.cpp or vllm."""
    form: str
    """Of the weights, in Baton's words."""
    start: Callable[[], contextlib.AbstractAsyncContextManager[tuple[str, int]]]
    """Up when entered, at (base URL, process id); gone afterwards."""
    alone: tuple[str, ...] | None = None
    """A command that starts the engine without a server, and ends when it has a first token."""
    rows: frozenset[str] = PLAIN_ROWS
    apart: bool = False
    """Several engines with fewer threads each: the machine's limits are not those of one of them."""


@dataclass(frozen=True, slots=True)
class Up:
    """A system that answers."""

    met: Met
    pids: frozenset[int]
    started: Json
    """`value`: seconds to its first token; and who used the CPU meanwhile."""


@contextlib.asynccontextmanager
async def up(system: System, tokenizer: Path, seed: str, attempts: int = 1) -> AsyncIterator[Up]:
    """Started again while others disturb its start, up to so many times in all: the last one stays up, the quietest
    one's figure counts. Raises SetupError if it does not come up."""
    async with contextlib.AsyncExitStack() as running:
        last: list[Up] = []

        async def once(_: int) -> Json:
            await running.aclose()
            last[:] = [await running.enter_async_context(_up_once(system, tokenizer, seed))]
            return last[0].started

        started = await quietest(once, attempts)
        yield replace(last[0], started=started)


@contextlib.asynccontextmanager
async def _up_once(system: System, tokenizer: Path, seed: str) -> AsyncIterator[Up]:
    now = asyncio.get_running_loop().time
    async with contextlib.AsyncExitStack() as running:
        async with Watch(frozenset()) as watch:
            began_s = now()
            url, pid = await running.enter_async_context(system.start())
            watch.add_servers(frozenset({pid}))
            async with Client(url) as client:
                dialect = Dialect("completions", await first_model(client))
                _, first = await probe(client, dialect, " river")
        target = Target(url, model=dialect.model, tokenizer=tokenizer, server_pids=frozenset({pid}))
        async with meet(target, seed) as met:
            yield Up(met, target.server_pids, {"value": first.event_s[0] - began_s, "cpu_cores": cores(watch)})


# ---- Baton -----------------------------------------------------------------------------------------------------------


def baton(form: str, threads: int, settings: Sequence[str], python: str) -> System:
    """One worker that does both, with every thread. It gets a prefill worker's budgets: nobody prefills for it."""
    chosen = (*settings, f"engine.quantization={form}", f"engine.threads={threads}",
              f"engine.kv_memory_bytes={KV_BYTES}", "decode.max_step_tokens=512", "decode.max_chunk_tokens=512")
    words = _set(chosen)
    alone = (python, "-m", "baton.bench.peers.first_token", *words)
    return System(f"baton {form}", "baton", form, lambda: serving(("--prefill", "0", "--decode", "1", *words)), alone,
                  ALL_ROWS if form == "bf16" else PLAIN_ROWS)  # fmt: skip


def baton_apart(form: str, threads: int, settings: Sequence[str]) -> System:
    """One prefill and one decode worker, the threads and the KV memory halved between them."""
    chosen = (*settings, f"engine.quantization={form}", f"engine.threads={max(threads // 2, 1)}",
              f"engine.kv_memory_bytes={KV_BYTES // 2}")
    words = ("--prefill", "1", "--decode", "1", *_set(chosen))
    return System(f"baton {form} 1P+1D", "baton", form, lambda: serving(words), rows=APART_ROWS, apart=True)


def _set(settings: Sequence[str]) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


# ---- peers -----------------------------------------------------------------------------------------------------------


def llama_cpp(form: str, gguf: Path, programs: Path, threads: int, spec: ModelSpec) -> System:
    """A slot per sequence, which shares the KV memory evenly. Slots keep their prefix; the second copy that the server
    would keep in RAM is off, for it costs time and memory here and finds nothing that a slot does not hold."""
    per_slot = KV_BYTES // kv_bytes_per_token(spec) // NUM_SEQUENCES // LLAMA_CONTEXT_STEP * LLAMA_CONTEXT_STEP
    options = ("--threads", str(threads), "--threads-batch", str(threads), "--parallel", str(NUM_SEQUENCES),
               "--ctx-size", str(per_slot * NUM_SEQUENCES), "--cache-ram", "0", "--no-webui")
    command = (str(programs / "llama-server"), "--model", str(gguf), *options)

    def start() -> contextlib.AbstractAsyncContextManager[tuple[str, int]]:
        return child(lambda port: (*command, "--port", str(port)), "/health", environment(threads))

    return System(f"llama.cpp {gguf.stem}", "llama.cpp", form, start)


def vllm(directory: Path, python: Path, threads: int, cores: Sequence[int], spec: ModelSpec) -> System:
    command = (str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(directory), "--dtype", "bfloat16",
               "--max-model-len", str(spec.max_model_len), "--max-num-seqs", str(NUM_SEQUENCES),
               "--served-model-name", "model", "--host", "127.0.0.1")
    variables = environment(threads) | {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_BYTES >> 30),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores[:threads])),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(_preloaded(python.parents[1])),
    }

    def start() -> contextlib.AbstractAsyncContextManager[tuple[str, int]]:
        return child(lambda port: (*command, "--port", str(port)), "/health", variables)

    return System("vllm bf16", "vllm", "bf16", start, rows=ALL_ROWS)


def _preloaded(installed: Path) -> list[str]:
    allocator = find_library(VLLM_ALLOCATOR)
    return [*([allocator] if allocator else []), *map(str, installed.glob(f"lib/{VLLM_OPENMP}"))]


@contextlib.asynccontextmanager
async def child(
    command: Callable[[int], Sequence[str]], ready_path: str, variables: Mapping[str, str]
) -> AsyncIterator[tuple[str, int]]:
    """A server in a session of its own, from when it says that it is ready until the end of it and its children.
    Raises SetupError, with what it said last, if that does not come."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *command(port), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=variables,
            start_new_session=True,
        )  # fmt: skip
        try:
            await _until_ready(process, f"http://127.0.0.1:{port}", ready_path, log)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            await end_group(process, signal.SIGINT, STOP_TIMEOUT_S)


async def _until_ready(process: asyncio.subprocess.Process, url: str, path: str, log: IO[bytes]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_TIMEOUT_S), Client(url) as client:
            while process.returncode is None:
                with contextlib.suppress(Failed):
                    await client.get(path)
                    return
                await asyncio.sleep(POLL_S)
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
    ended = "" if process.returncode is None else f", and ended with {process.returncode}"
    raise SetupError(f"it did not come up{ended}; it said last:\n  " + "\n  ".join(said))
