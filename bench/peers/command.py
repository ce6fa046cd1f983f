"""`baton bench peers`: Baton beside llama.cpp and vLLM, on the same weights and the same cores, in one run.

1. what is measured is chosen, and set up if that was not done yet (builds.py, weights.py)
2. round by round: the machine's limits, then each system in turn (A B A B), alone on the machine: started, asked, ended
3. the tables are printed as Markdown; JSON and a picture are written where they are wanted

Everything runs on the first `--threads` cores, the load client too.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.bench.load import plots
from baton.bench.load.command import finished, keep, say
from baton.bench.load.report import Json, others_cores
from baton.bench.load.run import Measuring
from baton.bench.peers import builds, report, systems, weights
from baton.bench.peers.bars import APART as APART_BATON
from baton.bench.peers.bars import by_round
from baton.bench.peers.limits import weight_bytes
from baton.bench.peers.rows import (
    LONG_SHARE,
    LONG_TOKENS,
    ROWS,
    Row,
    beside_long_prompts,
    measure,
    quick,
    resident_mb,
    start_alone,
)
from baton.bench.peers.systems import System, Up
from baton.core import config
from baton.core.config import Config
from baton.core.errors import SetupError
from baton.engine.backend import prepare
from baton.models.catalog import open_model, resolve
from baton.models.convert import ModelFiles

FORMAT = 1
BATON_FORMS = ("bf16", "int8", "int4")
LIMITS = "limits"
APART = "1P+1D"
PEERS = ("baton", "llama.cpp", "vllm")
WORDS = (*PEERS, *BATON_FORMS, APART, LIMITS, *(row.name for row in ROWS))
"""What --only and --skip take: whose, in which format, and which row."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of all that is measured."""

    peers: frozenset[str]
    forms: frozenset[str]
    rows: tuple[Row, ...]
    apart: bool
    limits: bool

    @classmethod
    def chosen(cls, only: Sequence[str], skip: Sequence[str], fast: bool) -> Wanted:
        """A kind of which nothing is named is whole. Raises SetupError for a word that means nothing."""
        for word in (*only, *skip):
            if word not in WORDS:
                raise SetupError(f"{word!r} names nothing that is measured. There are {', '.join(WORDS)}.")

        def kept(words: Sequence[str]) -> frozenset[str]:
            named = [word for word in words if word in only]
            return frozenset(word for word in named or words if word not in skip)

        names = kept([row.name for row in ROWS])
        rows = tuple(quick(row) if fast else row for row in ROWS if row.name in names)
        return cls(kept(PEERS), kept(BATON_FORMS), rows, bool(kept([APART])), bool(kept([LIMITS])))


def main(arguments: Sequence[str], prog: str) -> None:
    """Raises SetupError if there is nothing that could be measured."""
    asked = options(prog).parse_args(arguments)
    if asked.plot:
        plots.figure(1)  # a missing package is said before the runs, not after
    wanted = Wanted.chosen(asked.only, asked.skip, asked.quick)
    settings = config.load({}, asked.set)
    cores = sorted(os.sched_getaffinity(0))[: asked.threads]
    if len(cores) < asked.threads:
        raise SetupError(f"this machine has {len(cores)} cores for us, not {asked.threads}. Lower --threads.")
    source, files = model_of(settings)
    os.sched_setaffinity(0, cores)
    chosen = set_up(wanted, settings, asked, (source, files), cores)
    if asked.setup_only:
        return
    found = finished(rounds(chosen, wanted, files, asked))
    described = {
        "format": FORMAT, "threads": asked.threads, "machine": machine(), "model": files.name,
        "versions": {"llama.cpp": builds.LLAMA, "vllm": builds.VLLM}, "kv_bytes": systems.KV_BYTES,
        "settings": asked.set, "spec": files.spec.to_json(),
        "weight_bytes": {form: weight_bytes(files.spec, form) for form in BATON_FORMS},
        "systems": [
            {"name": s.name, "peer": s.peer, "form": s.form, "apart": s.apart} for s in chosen
        ],
    }  # fmt: skip
    whole: Json = {**described, **found}
    print("\n".join(report.markdown(whole)))
    keep(whole, asked.json)
    if asked.plot:
        report.draw(whole, asked.plot)


def options(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    words = ", ".join(WORDS)
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each system, and cores of all (2)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="over all systems (2)")
    parser.add_argument("--attempts", type=int, default=2, metavar="N",
                        help="at a row while others use the CPU; the quietest counts (2)")  # fmt: skip
    parser.add_argument("--only", type=_words, default=[], metavar="WORD[,...]", help=f"measure these: {words}")
    parser.add_argument("--skip", type=_words, default=[], metavar="WORD[,...]", help="leave these out")
    parser.add_argument("--long-s", type=float, default=30.0, metavar="S", help="of the load with long prompts (30)")
    parser.add_argument("--quick", action="store_true", help="half of the requests of each row")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a setting of Baton's")
    parser.add_argument("--setup-only", action="store_true", help="build and convert, and measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the rows here")
    return parser


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


# ---- setting up ------------------------------------------------------------------------------------------------------


def model_of(settings: Config) -> tuple[Path, ModelFiles]:
    files = open_model(settings.model, say)
    if not isinstance(files, ModelFiles):
        raise SetupError(f"{settings.model.name} has no weights that peers could read. Set model.name to a real one.")
    return resolve(settings.model), files


def set_up(
    wanted: Wanted, settings: Config, asked: argparse.Namespace, model: tuple[Path, ModelFiles], cores: Sequence[int]
) -> list[System]:
    """In the order in which they are measured: neighbours are those that bars compare."""
    cache, (source, files) = config.cache_dir(settings.model), model
    found: list[System] = []
    forms = [form for form in BATON_FORMS if form in wanted.forms]
    if "baton" in wanted.peers and "bf16" in wanted.forms and wanted.apart:
        found.append(systems.baton_apart("bf16", asked.threads, asked.set))
    if "vllm" in wanted.peers and "bf16" in wanted.forms:
        directory = weights.hf_directory(source, files, cache, say)
        found.append(systems.vllm(directory, builds.vllm(cache, say), asked.threads, cores, files.spec))
    gguf: Mapping[str, Path] = {}
    if "llama.cpp" in wanted.peers:
        programs = builds.llama_cpp(cache, len(cores), say)
        gguf = weights.gguf_files(source, cache, programs, say)
    for form in forms:
        if "baton" in wanted.peers:
            prepare(settings.engine.model_copy(update={"quantization": form}), files, say)
            found.append(systems.baton(form, asked.threads, asked.set, sys.executable))
        if gguf:
            path = gguf[weights.GGUF_FORMAT_OF[form]]
            found.append(systems.llama_cpp(form, path, programs, asked.threads, files.spec))
    if not found:
        raise SetupError("nothing is left to measure: --only and --skip leave no system.")
    return found


def machine() -> Json:
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
                 platform.processor())  # fmt: skip
    return {"cpu": model, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


# ---- measuring -------------------------------------------------------------------------------------------------------


async def rounds(chosen: Sequence[System], wanted: Wanted, files: ModelFiles, asked: argparse.Namespace) -> Json:
    """A system that cannot be measured costs its own figures, not the run. How many long prompts one core computes is
    known from the disaggregated Baton, which is therefore first."""
    samples: list[Json] = []
    limits: list[Json] = []
    seed = random.SystemRandom().randrange(1 << 32)
    for number in range(asked.rounds):
        if wanted.limits:
            limits.append(await machine_limits(asked.threads))
        for system in chosen:
            say(f"round {number + 1} of {asked.rounds}: {system.name}")
            visit = Visit(system, wanted.rows, files.directory, f"{seed}/{number}/{system.name}", asked)
            async for sample in visit.samples(functools.partial(rate_of_long_prompts, samples, number)):
                samples.append({"round": number, "system": system.name, **sample})
                say(f"  {told(samples[-1])}")
    return {"limits": limits, "samples": samples}


async def machine_limits(threads: int) -> Json:
    """In a child: its memory goes with it."""
    say("the machine's limits")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton.bench.peers.limits", "--threads", str(threads), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise SetupError("the machine's limits cannot be measured: the reason is above. --skip limits goes without.")
    found: Json = json.loads(out)
    say(f"  {found}")
    return found


def rate_of_long_prompts(samples: Sequence[Json], number: int) -> float | None:
    """So many a second, by what one core of prefill did in this round; None if that was not measured."""
    one_core = by_round(samples, APART_BATON, "prefill_2048").get(number)
    return one_core and LONG_SHARE * one_core / LONG_TOKENS


@dataclass(frozen=True, slots=True)
class Visit:
    """One system in one round."""

    system: System
    rows: Sequence[Row]
    tokenizer: Path
    seed: str
    asked: argparse.Namespace

    async def samples(self, long_rate: Callable[[], float | None]) -> AsyncIterator[Json]:
        """Every row; `failed` says why there is no more. `long_rate` is asked when it is needed."""
        rows = [row for row in self.rows if row.name in self.system.rows]
        if not rows:
            return
        try:
            async for sample in self._measured(rows, long_rate):
                yield sample
        except (SetupError, RuntimeError) as e:
            say(f"  {self.system.name} could not be measured: {e}")
            yield {"row": rows[0].name, "value": None, "failed": str(e).partition("\n")[0]}

    async def _measured(self, rows: Sequence[Row], long_rate: Callable[[], float | None]) -> AsyncIterator[Json]:
        """Memory is looked at last, when the system has worked."""
        names, attempts = {row.name for row in rows}, self.asked.attempts
        starts = "start" in names
        alone = await start_alone(self.system.alone, attempts) if starts and self.system.alone else None
        async with systems.up(self.system, self.tokenizer, self.seed, attempts if starts else 1) as up:
            if starts:
                yield {"row": "start", **(alone | {"stack_s": up.started["value"]} if alone else up.started)}
            for row in rows:
                if row.asks:
                    yield {"row": row.name, **await measure(row, up.met, self.seed, attempts)}
            if "itl_long" in names and (rate := long_rate()):
                measuring = Measuring(duration_s=self.asked.long_s, attempts=attempts)
                yield {"row": "itl_long", **await beside_long_prompts(up.met, rate, self.seed, measuring, say)}
            if "memory" in names:
                yield memory(up)


def memory(up: Up) -> Json:
    """What is held is no speed: others on the CPU change nothing about it, so it has no mark and no second attempt."""
    found = resident_mb(up.pids)
    return {"row": "memory", "value": sum(found.values()), "processes": found}


def told(sample: Json) -> str:
    value = "failed: " + sample["failed"] if sample["value"] is None else report.number(sample["value"])
    others = f", others used {others_cores(sample):.2f} cores" if sample.get("cpu_cores") else ""
    return f"{sample['row']}: {value}{others}"
