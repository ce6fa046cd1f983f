"""What a run has shown: figures, and every rule that was broken.

Owns the arithmetic. The rules (a run passes if none is broken):

    no token, log-prob, reason or count but those of an undisturbed run
    every request ends; none fails, for there was always a healthy way
    every fault landed in the middle of work, and its victims came back
    no process ended but by a fault, and no log has a traceback; nothing is held or left behind; memory does not grow
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from baton.chaos.clients import Outcome, Question
from baton.chaos.faults import REGISTRY
from baton.chaos.nemesis import Landed
from baton.chaos.plan import Plan

MAX_SLOPE_MB_PER_MIN = 1.0


@dataclass(slots=True)
class Findings:
    """All that a run has seen."""

    plan: Plan
    questions: Sequence[Question]
    landed: Sequence[Landed]
    idle: dict[str, int]
    leaks: list[str]
    slopes: dict[str, float]
    left_out: tuple[str, ...]
    fallbacks: dict[str, float]
    crashes: list[str] = field(default_factory=list)
    """Processes that ended by themselves, with their last words."""
    tracebacks: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    """Processes or namespaces that outlived the stack."""


def gaps(findings: Findings) -> dict[str, list[float]]:
    """Seconds without news at each client that a fault concerned, by the fault's kind."""
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    questions = {q.name: q for q in findings.questions}
    for fault in findings.landed:
        for name in fault.open_requests:
            if _concerned(questions[name], fault, findings.plan):
                by_kind[fault.kind].append(gap(questions[name], fault.at_s))
    return dict(by_kind)


def _concerned(q: Question, fault: Landed, plan: Plan) -> bool:
    """It was at that router or aboard that decode worker; it waited for its first token, and was aboard that prefill
    worker; the registry is everybody's."""
    if fault.hosts == (REGISTRY,):
        return True
    waits = not any(s <= fault.at_s for s in q.news_s)
    aboard = q.workers & set(fault.hosts) - (set() if waits else set(plan.prefills))
    return bool(aboard) or any(a.router in fault.hosts for a in q.attempts)


def gap(question: Question, at_s: float) -> float:
    """From the last news before `at_s` to the first after it."""
    before = max([question.asked_s, *(s for s in question.news_s if s <= at_s)])
    ended = question.ended_s if question.ended_s is not None else math.inf
    after = min([s for s in question.news_s if s > at_s] or [ended])
    return after - before


def quantile(values: Iterable[float], q: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


def violations(findings: Findings) -> Iterator[str]:
    for q in findings.questions:
        if q.outcome is Outcome.WRONG:
            yield f"WRONG {q.name} {_where(q)}: {q.detail}"
        elif q.outcome is Outcome.OPEN:
            yield f"NO END {q.name} {_where(q)}: {q.detail}"
        elif q.outcome is Outcome.FAILED:
            yield f"FAILED {q.name} {_where(q)}: {q.detail}"
    for fault in findings.landed:
        if not fault.proof:
            yield f"MISSED {fault.kind} of {', '.join(fault.hosts)}: it did not land"
        if fault.recovered_s is None:
            yield f"NOT BACK {', '.join(fault.hosts)} after {fault.kind}"
    yield from (f"CRASH {crash}" for crash in findings.crashes)
    yield from (f"TRACEBACK {traceback}" for traceback in findings.tracebacks)
    yield from (f"LEAK {leak}" for leak in (*findings.leaks, *findings.leftovers))
    for name, slope in findings.slopes.items():
        if slope > MAX_SLOPE_MB_PER_MIN:
            yield f"GROWTH {name}: {slope:.2f} MB a minute"


def _where(q: Question) -> str:
    at = ", ".join(f"{a.request_id} at {a.router}" for a in q.attempts)
    return f"({at}; aboard {', '.join(sorted(q.workers)) or 'nobody known'}; {len(q.news_s)} tokens)"


def document(findings: Findings) -> dict[str, Any]:
    outcomes = Counter(q.outcome.value for q in findings.questions)
    waits = [q.news_s[0] - q.asked_s for q in findings.questions if q.news_s]
    start = min((q.asked_s for q in findings.questions), default=0.0)
    return {
        "plan": asdict(findings.plan),
        "requests": len(findings.questions),
        "outcomes": dict(outcomes),
        "asked_again_after_a_router": sum(max(0, len(q.attempts) - 1) for q in findings.questions),
        "dispatched_again": sum(max(0, q.num_dispatches - 1) for q in findings.questions),
        "tokens": sum(len(q.news_s) for q in findings.questions),
        "ttft_s": _spread(waits),
        "faults": len(findings.landed),
        "faults_by_kind": dict(Counter(f.kind for f in findings.landed)),
        "faults_without_work": findings.idle,
        "gap_s": {kind: _spread(values) for kind, values in sorted(gaps(findings).items())},
        "recovery_s": {
            kind: _spread([f.recovered_s - f.healed_s for f in findings.landed
                           if f.kind == kind and f.recovered_s is not None and f.healed_s is not None])
            for kind in sorted({f.kind for f in findings.landed})
        },
        "fallbacks": findings.fallbacks,
        "rss_mb_per_min": {name: round(slope, 3) for name, slope in findings.slopes.items()},
        "left_out": list(findings.left_out),
        "violations": list(violations(findings)),
        "fault_list": [
            {"kind": f.kind, "hosts": list(f.hosts), "at_s": round(f.at_s - start, 3), "proof": f.proof,
             "held_s": round((f.healed_s or f.at_s) - f.at_s, 3)} for f in findings.landed
        ],
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"n": len(values), **{
        name: round(quantile(values, q), 3) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)) if values
    }}


def table(found: dict[str, Any]) -> Iterator[str]:
    """For people."""
    plan = found["plan"]
    yield f"chaos: seed {plan['seed']}, {plan['duration_s']:g} s, {plan['model']}"
    ends = ", ".join(f"{n} {name}" for name, n in sorted(found["outcomes"].items()))
    yield f"{found['requests']} requests: {ends}; {found['tokens']} tokens, all compared"
    yield (f"{found['dispatched_again']} dispatches again inside, {found['asked_again_after_a_router']} asked again "
           f"because their router was taken; time to first token {_line(found['ttft_s'])}")
    yield f"{found['faults']} faults landed in the middle of work"
    yield f"\n  {'fault':22} {'n':>3}  {'gap at clients it concerned (s)':40} ready again after (s)"
    for kind, n in sorted(found["faults_by_kind"].items()):
        gap_s = _line(found["gap_s"].get(kind, {"n": 0}))
        yield f"  {kind:22} {n:3}  {gap_s:40} {_line(found['recovery_s'][kind], False)}"
    idle = ", ".join(f"{kind} {n}" for kind, n in found["faults_without_work"].items())
    yield f"\nfaults drawn that found nothing to disturb: {idle or 'none'}"
    yield f"fallbacks: {', '.join(f'{k} {v:g}' for k, v in found['fallbacks'].items()) or 'none'}"
    slopes = ", ".join(f"{name} {slope:+.2f}" for name, slope in found["rss_mb_per_min"].items())
    yield f"memory (MB a minute): {slopes or 'nobody lived long enough'}"
    yield from (f"left out: {what}" for what in found["left_out"])
    if not found["violations"]:
        yield "\nPASSED: no rule was broken"
        return
    yield f"\nFAILED: {len(found['violations'])} rules broken"
    yield from (f"  {v}" for v in found["violations"])
    yield f"\nreplay the draw: python -m baton.chaos --seed {plan['seed']} --duration {plan['duration_s']:g}"
    yield "faults, in order:"
    for f in found["fault_list"]:
        yield f"  {f['at_s']:8.2f} s  {f['kind']:22} {', '.join(f['hosts']):10} held {f['held_s']:.2f} s; {f['proof']}"


def _line(spread: dict[str, float], with_n: bool = True) -> str:
    if not spread["n"]:
        return "-"
    count = f"n {spread['n']}, " if with_n else ""
    return f"{count}p50 {spread['p50']:.2f}, p99 {spread['p99']:.2f}, max {spread['max']:.2f}"


def write_json(found: dict[str, Any], path: str) -> None:
    with open(path, "w") as out:
        json.dump(found, out, indent=1)
