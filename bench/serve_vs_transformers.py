"""Baton beside `transformers` generate: one run, one machine, the same prompts, one after the other.

    python -m baton.bench.serve_vs_transformers [--json FILE] [--repeats 3]

    1. prompts are made from a seed, all different, so that no prefix cache helps anybody
    2. a stack is started (local pool, 1 prefill + 1 decode worker, 1 compute thread each), asked over HTTP, stopped
    3. transformers runs in a process of its own, once per thread count (Baton's two workers are two threads)
    4. medians, spreads and ratios are printed, and written as JSON

TTFT is from sending the request to the first token; decode speed counts the tokens after each sequence's first one.
Baton's figures include HTTP, routing, the KV hand-off and detokenisation; transformers' are a function call.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from baton.bench.stack import serving
from baton.core.config import Config, ModelConfig, child_env

PROMPT_TOKENS = (512, 2048)
BATCHES = (1, 8)
DECODE_PROMPT_TOKENS, DECODE_TOKENS = 64, 128
WORDS = ("river", "stone", "winter", "letter", "engine", "garden", "signal", "copper", "window", "harbour")
REQUEST_TIMEOUT_S = 600.0
PAIR = ("--prefill", "1", "--decode", "1")

Figures = dict[str, list[float]]
"""Name of a figure -> one value per repeat. `ttft_*` in seconds, `decode_*` in tokens per second."""


def prompts(tokenizer: Any, num_tokens: int, count: int, seed: int) -> list[list[int]]:
    """`count` prompts of exactly `num_tokens` tokens that share no prefix beyond chance."""
    rng = random.Random(seed)
    made: list[list[int]] = []
    while len(made) < count:
        ids = list(tokenizer.encode(" ".join(rng.choices(WORDS, k=2 * num_tokens))).ids)
        assert len(ids) >= num_tokens, f"{len(ids)} tokens out of {2 * num_tokens} words"
        made.append(ids[:num_tokens])
    return made


def workload(model_dir: Path, repeats: int) -> dict[str, list[list[list[int]]]]:
    """Figure -> for each repeat (and one to warm up) the prompts that are sent together."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    rounds = repeats + 1
    work = {f"ttft_{n}": [prompts(tokenizer, n, 1, 1000 * n + r) for r in range(rounds)] for n in PROMPT_TOKENS}
    for batch in BATCHES:
        work[f"decode_{batch}"] = [
            prompts(tokenizer, DECODE_PROMPT_TOKENS, batch, 77 * batch + r) for r in range(rounds)
        ]
    return work


# ---- Baton -----------------------------------------------------------------------------------------------------------


async def generate(
    client: httpx.AsyncClient, model: str, prompt: list[int], max_tokens: int
) -> tuple[list[float], int]:
    """(arrival time of each event with a choice, output tokens) of one streamed completion."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times, tokens = [], 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"the server answered {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if event.get("choices"):
                    times.append(time.perf_counter())
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
    return times, tokens


async def one_round(client: httpx.AsyncClient, model: str, name: str, batch: list[list[int]]) -> float:
    max_tokens = 1 if name.startswith("ttft") else DECODE_TOKENS
    start = time.perf_counter()
    runs = await asyncio.gather(*(generate(client, model, p, max_tokens) for p in batch))
    if name.startswith("ttft"):
        return runs[0][0][0] - start
    decoded = sum(tokens - 1 for _, tokens in runs)
    return decoded / (max(times[-1] for times, _ in runs) - min(times[0] for times, _ in runs))


async def measure_baton(options: list[str], work: dict[str, list[list[list[int]]]]) -> Figures:
    async with (
        serving(options) as (url, _),
        httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S) as client,
    ):
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        figures: Figures = {}
        for name, rounds in work.items():
            values = [await one_round(client, model, name, batch) for batch in rounds]
            figures[name] = values[1:]
        return figures


# ---- transformers ----------------------------------------------------------------------------------------------------


def measure_transformers(source: Path, threads: int, work: dict[str, list[list[list[int]]]]) -> Figures:
    """In this process: call it in one that was started with OMP_NUM_THREADS=threads."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    where = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent if where else source, dtype=torch.float32, local_files_only=True, **where
    ).eval()

    def seconds(batch: list[list[int]], new_tokens: int) -> float:
        ids = torch.tensor(batch)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return time.perf_counter() - start

    figures: Figures = {}
    for name, rounds in work.items():
        if name.startswith("ttft"):
            figures[name] = [seconds(batch, 1) for batch in rounds][1:]
        else:
            figures[name] = [
                len(batch) * (DECODE_TOKENS - 1) / (seconds(batch, DECODE_TOKENS) - seconds(batch, 1))
                for batch in rounds
            ][1:]
    return figures


def transformers_figures(source: Path, threads: int, arguments: argparse.Namespace) -> Figures:
    command = [
        sys.executable,
        "-m",
        "baton.bench.serve_vs_transformers",
        "--peer-threads",
        str(threads),
        "--peer-source",
        str(source),
        "--model",
        arguments.model,
        "--repeats",
        str(arguments.repeats),
    ]
    done = subprocess.run(
        command,
        env={
            **child_env(threads),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TQDM_DISABLE": "1",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: Figures = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


# ---- report ----------------------------------------------------------------------------------------------------------


def table(columns: dict[str, Figures]) -> list[str]:
    """One row per figure: median (lowest-highest) per column, and Baton's ratio to each peer (above 1: better)."""
    peers = [c for c in columns if c != "baton"]
    lines = [
        "| figure | " + " | ".join(columns) + " | " + " | ".join(f"baton vs {p}" for p in peers) + " |",
        "|---" * (1 + len(columns) + len(peers)) + "|",
    ]
    for name in columns["baton"]:
        row = [_label(name), *(_spread(name, figures[name]) for figures in columns.values())]
        row += [f"{ratio(name, columns['baton'], columns[p]):.2f}x" for p in peers]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def ratio(name: str, ours: Figures, theirs: Figures) -> float:
    a, b = statistics.median(ours[name]), statistics.median(theirs[name])
    return b / a if name.startswith("ttft") else a / b


def _label(name: str) -> str:
    kind, _, number = name.partition("_")
    return f"TTFT, {number} tokens" if kind == "ttft" else f"decode tok/s, batch {number}"


def _spread(name: str, values: list[float]) -> str:
    scale, unit = (1e3, " ms") if name.startswith("ttft") else (1, "")
    return f"{statistics.median(values) * scale:.0f}{unit} ({min(values) * scale:.0f}-{max(values) * scale:.0f})"


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="baton.bench.serve_vs_transformers", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", default="smollm2-135m", help="as model.name")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds after one to warm up")
    parser.add_argument("--json", type=Path, help="also write every value here")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="passed on to baton serve")
    parser.add_argument("--peer-threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peer-source", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    from baton.models.catalog import open_model, resolve

    arguments = parse()
    config = Config(model=ModelConfig(name=arguments.model))
    work = workload(open_model(config.model).directory, arguments.repeats)
    if arguments.peer_threads:
        print(json.dumps(measure_transformers(arguments.peer_source, arguments.peer_threads, work)))
        return
    settings = (f"model.name={json.dumps(config.model.name)}", "engine.threads=1", *arguments.set)
    options = [*PAIR, *(word for item in settings for word in ("--set", item))]
    columns = {"baton": asyncio.run(measure_baton(options, work))}
    for threads in (2, 1):
        columns[f"transformers, {threads} thr."] = transformers_figures(resolve(config.model), threads, arguments)
    print(
        f"{arguments.model}, fp32, {processor()}, {os.cpu_count()} cores, "
        f"medians of {arguments.repeats} (lowest-highest)\n"
    )
    print("\n".join(table(columns)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"cores": os.cpu_count(), "figures": columns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
