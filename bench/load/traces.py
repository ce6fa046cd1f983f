"""Recorded traces of serving systems: which requests came when, how long they were, and what they had in common.

Two public formats, plain or gzipped, told apart by their first line:

| format | a line |
|---|---|
| Mooncake, JSON lines | `timestamp` in ms, `input_length`, `output_length`, `hash_ids`: one per 512 prompt tokens |
| Azure LLM inference 2023, CSV | `TIMESTAMP`, `ContextTokens`, `GeneratedTokens` |

Equal hash ids are equal text after equal text, so that a replay hits prefix caches as the trace did.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TextIO

from baton.core.errors import SetupError

BLOCK_TOKENS = 512
"""Prompt tokens that one hash id of a Mooncake trace stands for."""


@dataclass(frozen=True, slots=True)
class Traced:
    """One request of a trace."""

    at_s: float
    """From the trace's first request."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Names of the prompt's 512-token pieces; empty where the trace does not say."""


def read_trace(path: Path) -> list[Traced]:
    """In order of time. Raises SetupError if the file cannot be read or has neither format."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            first = lines.readline()
            lines.seek(0)
            if first.startswith("{"):
                found = _mooncake(lines)
            elif first.startswith("TIMESTAMP,"):
                found = _azure(lines)
            else:
                raise SetupError(f"the trace {path} begins with neither a JSON object nor Azure's header.")
    except OSError as e:
        raise SetupError(f"cannot read the trace {path}: {e}.") from e
    except (ValueError, LookupError, TypeError) as e:
        raise SetupError(f"the trace {path} has a line that is not of its format: {e!r}.") from e
    if not found:
        raise SetupError(f"the trace {path} holds no request.")
    found.sort(key=lambda r: r.at_s)
    begin = found[0].at_s
    return [replace(r, at_s=r.at_s - begin) for r in found]


def _mooncake(lines: TextIO) -> list[Traced]:
    return [
        Traced(row["timestamp"] / 1e3, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
        for row in (json.loads(line) for line in lines if line.strip())
    ]


def _azure(lines: TextIO) -> list[Traced]:
    return [
        Traced(_azure_s(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for row in csv.DictReader(lines)
    ]


def _azure_s(stamp: str) -> float:
    """Seven digits of a second are one more than datetime reads."""
    whole, _, fraction = stamp.partition(".")
    return (datetime.fromisoformat(whole) - datetime(2023, 1, 1)).total_seconds() + float(f"0.{fraction or 0}")


def spread(trace: Sequence[Traced], rng: random.Random) -> list[Traced]:
    """Requests of one instant are put at random between it and the next: Mooncake's conversation trace is quantised
    to about 3 s, which would make bursts that its users did not make. The last instant's stay where they are."""
    instants = [(at_s, list(group)) for at_s, group in groupby(trace, key=lambda r: r.at_s)]
    placed = []
    for i, (at_s, group) in enumerate(instants):
        room_s = instants[i + 1][0] - at_s if i + 1 < len(instants) and len(group) > 1 else 0.0
        offsets = sorted(rng.random() * room_s for _ in group)
        placed += [replace(r, at_s=at_s + offset) for r, offset in zip(group, offsets, strict=True)]
    return placed


def replayed(trace: Sequence[Traced], from_s: float, rate: float | None, duration_s: float) -> list[Traced]:
    """`duration_s` of the trace, after its time is stretched or squeezed as a whole so that its mean rate is `rate`
    (None: as recorded). Bursts keep their shape. `from_s` of its own time is left out first."""
    span_s = trace[-1].at_s
    squeeze = 1.0 if rate is None or span_s == 0 else len(trace) / span_s / rate
    moved = [replace(r, at_s=(r.at_s - from_s) * squeeze) for r in trace]
    return [r for r in moved if 0 <= r.at_s < duration_s]
