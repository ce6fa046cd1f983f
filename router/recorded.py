"""The record of a request as a JSON document, and the way back: what is needed to make its decisions again.

Owns the document's shape (VERSION). Does not know how a record came about, nor which words a person wants to read.

    request_id, outcome, counts, times     what became of it
    attempts[i].decision                   which of `decisions` sent it there; null: no longer kept
    decisions[i]                           facts, everybody offered (`decode`, `prefill`, `holders`), settings that are
                                           not the default, dice, and the `route` that was chosen
    spans                                  as in `baton trace`

A document holds no token of the prompt. Replaying one needs nothing else, and no running router.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from baton.core.config import RouterConfig
from baton.core.errors import InvalidRequest
from baton.core.layout import difference
from baton.core.worker import Route, WorkerInfo
from baton.router.choose import make_policy
from baton.router.cost import price_move
from baton.router.decisions import Decision
from baton.router.dice import Dice
from baton.router.policy import Candidate, Candidates, Facts
from baton.router.trace import TraceRecord

VERSION = 1
PICK = ("decode", "prefill", "spares", "holder")
"""Fields of a route that say where; the others say why."""
NOT_TOLD = {"tenants"}
"""Settings that no policy reads, and that are nobody's business."""

_FACTS = TypeAdapter(Facts)
_INFO = TypeAdapter(WorkerInfo)
_OFFERED: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(hint) for name, hint in typing.get_type_hints(Candidates).items() if name != "fits"
}
"""Who fits whom follows from their capabilities."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A decision made again."""

    route: Route | None
    same_pick: bool
    same_cost: bool


# ---- to a document -----------------------------------------------------------------------------------------------


def document(record: TraceRecord) -> dict[str, Any]:
    """Plain values, as `json.dumps` takes them."""
    attempts = []
    for attempt in record.attempts:
        number = next((i for i, d in enumerate(record.decisions) if d.route is attempt.route), None)
        attempts.append({**plain(attempt), "decision": number})
    return {
        "version": VERSION,
        **{f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)
           if f.name not in ("attempts", "decisions", "timeline")},
        "attempts": attempts,
        "decisions": [decision_document(d) for d in record.decisions],
        "spans": plain(record.timeline.spans),
    }


def decision_document(decision: Decision) -> dict[str, Any]:
    told = decision.candidates
    names = {c.info.worker_id for c in (*told.decode, *told.prefill, *told.holders)}
    if decision.moved_from is not None:
        names.add(decision.moved_from.worker_id)
    return {
        "facts": plain(decision.facts),
        **{name: [_candidate(c, names) for c in getattr(told, name)] for name in _OFFERED},
        "config": decision.config.model_dump(mode="json", exclude_defaults=True, exclude=NOT_TOLD),
        "dice": None if decision.dice is None else f"{decision.dice:#x}",
        "moved_from": None if decision.moved_from is None else _info(decision.moved_from),
        "route": None if decision.route is None else plain(decision.route),
    }


def plain(value: Any) -> Any:
    """Dataclasses as objects, tuples as arrays; a worker is its name; what JSON has no number for is text."""
    if isinstance(value, WorkerInfo):
        return value.worker_id
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    names = _fields_of(value.__class__)
    return value if names is None else {name: plain(getattr(value, name)) for name in names}


@functools.cache
def _fields_of(kind: type) -> tuple[str, ...] | None:
    """None: it is no dataclass."""
    return tuple(f.name for f in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


def _candidate(one: Candidate, names: Iterable[str]) -> dict[str, Any]:
    """With the bandwidth to those offered only."""
    bandwidth = {name: one.bandwidth[name] for name in names if name in one.bandwidth}
    return {**plain(one), "info": _info(one.info), "bandwidth": bandwidth}


def _info(info: WorkerInfo) -> dict[str, Any]:
    """A transport's advert is opaque bytes; that it is offered is all that counts."""
    transports = [[name, ""] for name, _ in info.capability.transports]
    capability = {**plain(info.capability), "transports": transports}
    return {f.name: plain(getattr(info, f.name)) for f in dataclasses.fields(info)} | {"capability": capability}


# ---- and back ----------------------------------------------------------------------------------------------------


def replay(document: Mapping[str, Any]) -> Replayed:
    """Make a decision of a record (one of its `decisions`) again. Raises InvalidRequest for what is none."""
    try:
        facts = _FACTS.validate_python(document["facts"])
        offered = {name: parts.validate_python(document[name]) for name, parts in _OFFERED.items()}
        config = RouterConfig.model_validate(document["config"])
        source = None if document["moved_from"] is None else _INFO.validate_python(document["moved_from"])
        dice = Dice(int(document["dice"] or "0", 16))
        then = document["route"]
        where = None if then is None else [then[name] for name in PICK]
        candidates = Candidates(fits=_fits, **offered)
        if source is not None:
            route = price_move(facts, config, source, candidates)
        else:
            route = make_policy(config, dice).price(facts, candidates)
    except (KeyError, TypeError, ValueError, ArithmeticError, ValidationError) as e:
        raise InvalidRequest(f"this is no decision that `baton explain --json` wrote: {e}") from None
    if route is None or then is None:
        return Replayed(route, route is then, route is then)
    now = plain(route)
    return Replayed(route, [now[name] for name in PICK] == where, now["cost_s"] == then["cost_s"])


def _fits(one: WorkerInfo, other: WorkerInfo) -> bool:
    return difference(one.capability, other.capability) is None
