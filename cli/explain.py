"""`baton explain`: why a request went where it went, in words: who could take it, what each choice would have cost, and
what then happened beside what was predicted. --json prints the record behind it, --replay makes its decisions again.

Knows the record as a document (router/recorded.py); the router writes it.

Exit code of --replay: 0 every decision came out the same, 1 one did not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.cli.config import ConfigFile, Overrides, read_config
from baton.cli.status import Address, AsJson, reached, router_address, table
from baton.core.errors import SetupError
from baton.core.worker import first_token_s
from baton.router.policy import Facts
from baton.router.trace import RUNNING

TIMEOUT_S = 10.0
MAX_ROWS = 12
"""Workers shown, and other choices."""
STEP = "a decode step"
MAX_REASONS = 2
"""Terms named of why another choice was dearer."""

Record = Mapping[str, Any]
Terms = Iterable[tuple[str, float]]


def explain(
    request_id: Annotated[str, typer.Argument(metavar="[REQUEST]", help="Default: the newest that has ended.")] = "",
    replay: Annotated[
        Path | None,
        typer.Option("--replay", metavar="FILE", help="Make the decisions of a saved record again; asks no router."),
    ] = None,
    router: Address = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    override: Overrides = None,
) -> None:
    """Why a request went where it went, and how well that was predicted."""
    if replay is not None:
        if request_id or as_json:
            raise typer.BadParameter("--replay takes a file alone.")
        raise typer.Exit(0 if replayed(read_record(replay)) else 1)
    told = asyncio.run(request_record(router or router_address(read_config(config, override)), request_id))
    print(json.dumps(told, indent=2) if as_json else "\n".join(explanation(told)))


async def request_record(address: str, request_id: str) -> Record:
    from baton.wire.client import GrpcAdmin

    async with GrpcAdmin(address) as admin:
        answer = await reached(admin.explain(request_id, TIMEOUT_S), address)
    told: Record = json.loads(answer.json)
    return told


def read_record(path: Path) -> Record:
    """Raises SetupError for a file that holds none."""
    try:
        told = json.loads(path.read_text())
    except OSError as e:
        raise SetupError(f"{path} cannot be read: {e.strerror}.") from None
    except ValueError as e:
        raise SetupError(f"{path} is not JSON ({e}). `baton explain REQUEST --json` writes a record.") from None
    if not isinstance(told, dict) or not isinstance(told.get("decisions"), list):
        raise SetupError(f"{path} holds no record of a request. `baton explain REQUEST --json` writes one.")
    return told


def replayed(told: Record) -> bool:
    """Says of each decision how it came out now; whether all picks are the same."""
    from baton.router.recorded import replay

    same = True
    for number, decision in enumerate(told["decisions"], 1):
        now = replay(decision)
        same = same and now.same_pick
        then, here = picked(decision["route"]), "nobody" if now.route is None else now.route.reason
        verdict = "the same pick" if now.same_pick else f"ANOTHER PICK, now {here}"
        price = "" if now.same_cost or not now.same_pick else ", at another price"
        print(f"decision {number}, {then}: {verdict}{price}")
    if not told["decisions"]:
        print("No decision is in this record: there is nothing to make again.")
    return same


# ---- in words ------------------------------------------------------------------------------------------------


def explanation(told: Record) -> Iterator[str]:
    ttft = "no token came" if told["ttft_s"] is None else f"the first token after {ms(told['ttft_s'])}"
    outcome = "still running" if told["outcome"] == RUNNING else f"ended with {told['outcome']}"
    yield (
        f"{told['request_id']}: {outcome}; {told['num_prompt_tokens']} prompt tokens, "
        f"{told['cached_tokens']} of them cached, {told['num_output_tokens']} output tokens; {ttft}, "
        f"{'so far' if told['outcome'] == RUNNING else 'all of it after'} {ms(told['total_s'])}"
    )
    attempts, decisions = told["attempts"], told["decisions"]
    if not attempts:
        yield "It was not sent to any worker."
    for number, attempt in enumerate(attempts, 1):
        at, where = ms(attempt["start_s"]), picked(attempt["route"])
        yield f"\nattempt {number} of {len(attempts)}, {at} after it came: {where}"
        yield f"  {attempt['route']['reason']}"
        if attempt["decision"] is None:
            yield "  What this was decided from is no longer kept."
        else:
            yield from who_could(decisions[attempt["decision"]])
        yield from prices(attempt["route"])
        if number == len(attempts):
            yield from happened(told, attempt)
        if attempt["outcome"] not in ("stop", "length", RUNNING):
            yield f"  It ended with {attempt['outcome']} after {ms(attempt['end_s'] - attempt['start_s'])}."
    if decisions and decisions[-1]["route"] is None:
        yield "\nThe last time it was to go somewhere, nobody could take it:"
        yield from who_could(decisions[-1])


def who_could(decision: Record) -> Iterator[str]:
    facts = decision["facts"]
    usual = dataclasses.asdict(Facts(facts["num_tokens"], turn=facts["turn"]))
    special = {name: value for name, value in facts.items() if value not in (usual[name], str(usual[name]))}
    more = "".join(f", {name} {value:.4g}" if isinstance(value, float) else f", {name} {value}"
                   for name, value in special.items())  # fmt: skip
    yield f"\n  asked: {facts['num_tokens']} tokens of KV{more}; offered:"
    rows = [worker_row(c) for role in ("prefill", "decode") for c in decision[role]]
    offered = {row["worker"] for row in rows}
    rows += [worker_row(c) for c in decision["holders"] if c["info"]["worker_id"] not in offered]
    yield from (f"  {line}" for line in table(rows[:MAX_ROWS], None, ()))
    if not rows:
        yield "    nobody"
    elif len(rows) > MAX_ROWS:
        yield f"    and {len(rows) - MAX_ROWS} more"


def worker_row(candidate: Record) -> dict[str, str]:
    info, load = candidate["info"], candidate["load"]
    free = f"{load['available_blocks']} of {load['total_blocks']}" if load["total_blocks"] else "-"
    return {
        "worker": info["worker_id"],
        "role": info["role"],
        "holds": f"{candidate['held_blocks']} blocks",
        "queued": f"{candidate['queued_prefill_tokens']} tokens",
        "sequences": str(candidate["num_sequences"]),
        "free blocks": free,
    }


def prices(route: Record) -> Iterator[str]:
    """The chosen one and the next best, with what made those dearer."""
    if not route["terms"]:
        return
    yield "\n  in ms:"
    others = route.get("alternatives", ())[:MAX_ROWS]
    names = list(dict.fromkeys(name for _, _, terms in others for name, _ in terms))
    names = list(dict.fromkeys([*(name for name, _ in route["terms"]), *names]))
    chosen = dict(route["terms"])
    rows = [price_row(picked(route), route["cost_s"], chosen, names, "chosen")]
    for option, cost_s, terms in others:
        rows.append(price_row(option, cost_s, dict(terms), names, dearer(chosen, dict(terms))))
    yield from (f"  {line}" for line in table(rows, None, ()))
    if not others:
        yield "    There was no other choice."


def price_row(option: str, cost_s: float, terms: Mapping[str, float], names: list[str], why: str) -> dict[str, str]:
    """A term that an option does not have is no zero."""
    priced = {name: f"{terms[name] * 1e3:.1f}" if name in terms else "-" for name in names}
    return {"choice": option, "price": f"{cost_s * 1e3:.1f}", **priced, "": why}


def dearer(chosen: Mapping[str, float], terms: Mapping[str, float]) -> str:
    """What costs most beyond the chosen one's price."""
    more = {name: terms.get(name, 0.0) - chosen.get(name, 0.0) for name in {**terms, **chosen}}
    worst = sorted((name for name in more if more[name] >= 5e-5), key=lambda name: -more[name])[:MAX_REASONS]
    if not worst:
        return "as good: chance decided" if sum(more.values()) < 5e-5 else "dearer"
    return "lost by " + ", ".join(f"{name} +{more[name] * 1e3:.1f}" for name in worst)


def happened(told: Record, attempt: Record) -> Iterator[str]:
    """Predicted terms beside what was measured of the same thing."""
    terms = dict(attempt["route"]["terms"])
    first_s = None if told["ttft_s"] is None else max(0.0, told["ttft_s"] - attempt["start_s"])
    measured = measures(told["spans"], first_s)
    rows = [(name, terms[name], measured[name]) for name in terms if name in measured]
    if STEP in measured and "decode" in terms and attempt["decision"] is not None:
        expected = told["decisions"][attempt["decision"]]["facts"]["output_tokens"]
        rows.append((STEP, terms["decode"] / expected, measured[STEP]))
    if first_s is not None and terms:
        rows.append(("first token", first_token_s(attempt["route"]["terms"]), first_s))
    if rows:
        yield "\n  predicted, and what happened:"
        cells = [{"": name, "predicted": ms(predicted), "measured": ms(came)} for name, predicted, came in rows]
        yield from (f"  {line}" for line in table(cells, None, ()))


def measures(spans: Iterable[Record], first_s: float | None) -> dict[str, float]:
    """Seconds by the term that they answer (router/prices.py). `first_s`: from when it was sent to its first token."""
    by_name: dict[str, list[Record]] = {}
    for span in spans:
        by_name.setdefault(span["name"].partition(" (")[0], []).append(span)
    named = (("queue", "prefill queue"), ("fetch", "fetch prefix"))
    found = {term: sum(map(length_s, by_name[name])) for term, name in named if name in by_name}
    steps = [length for s in by_name.get("decode", ()) for length in steps_s(s)]
    if steps:
        found[STEP] = sum(steps) / len(steps)
    if chunks := by_name.get("prefill chunk"):
        computed_s = max(s["end_s"] for s in chunks)
        found["prefill"] = computed_s - min(s["start_s"] for s in chunks)
        if transfers := by_name.get("transfer"):
            found["transfer"] = max(0.0, max(s["end_s"] for s in transfers) - computed_s)
            if first_s is not None:
                found["handoff"] = max(0.0, first_s - sum(found.get(t, 0.0) for t in ("queue", "fetch", "prefill")))
    return found


def steps_s(span: Record) -> list[float]:
    """How long each step of a decode bar took, as far as its tokens are marked."""
    return [end - start for start, end in itertools.pairwise((0.0, *span["marks"]))]


def length_s(span: Record) -> float:
    length: float = span["end_s"] - span["start_s"]
    return length


def picked(route: Record | None) -> str:
    if route is None:
        return "nobody"
    return f"{route['prefill']} -> {route['decode']}" if route["prefill"] else f"{route['decode']} alone"


def ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.1f} ms"
