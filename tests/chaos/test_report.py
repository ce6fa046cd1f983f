"""The report: each rule that was broken is said, and figures are of those whom a fault concerned."""

from __future__ import annotations

import dataclasses
import math

import pytest

from baton.chaos.clients import Attempt, Outcome, Question
from baton.chaos.nemesis import Landed
from baton.chaos.plan import Plan
from baton.chaos.report import Findings, document, gaps, quantile, table, violations
from baton.chaos.workload import Job
from baton.core.request import Request

PLAN = Plan(1, 60.0)


def question(name: str, outcome: Outcome = Outcome.DONE, **fields: object) -> Question:
    asked = Question(Job(Request(name, (1, 2)), ()), 0.0, outcome, ended_s=9.0)
    return dataclasses.replace(asked, **fields)  # type: ignore[arg-type]


def findings(*questions: Question, landed: tuple[Landed, ...] = (), **fields: object) -> Findings:
    whole = Findings(PLAN, questions, landed, {}, [], {}, (), {})
    return dataclasses.replace(whole, **fields)  # type: ignore[arg-type]


def fault(kind: str, *hosts: str, **fields: object) -> Landed:
    landed = Landed(kind, hosts, 5.0, 6.0, 7.0, "landed", ("q1",))
    return dataclasses.replace(landed, **fields)  # type: ignore[arg-type]


def test_a_clean_run_breaks_no_rule() -> None:
    clean = findings(question("q1"), question("q2", Outcome.LEFT), landed=(fault("kill decode", "decode-0"),))
    assert list(violations(clean)) == []
    assert "PASSED" in "\n".join(table(document(clean)))


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (findings(question("q1", Outcome.WRONG, detail="token 3")), "WRONG"),
        (findings(question("q1", Outcome.OPEN)), "NO END"),
        (findings(question("q1", Outcome.FAILED, detail="peer_lost")), "FAILED"),
        (findings(landed=(fault("cut a>b", "decode-0", proof="", open_requests=()),)), "MISSED"),
        (findings(landed=(fault("kill decode", "decode-0", recovered_s=None, open_requests=()),)), "NOT BACK"),
        (findings(crashes=["decode-0 ended by itself"]), "CRASH"),
        (findings(tracebacks=["router-0: 1x ValueError"]), "TRACEBACK"),
        (findings(leaks=["decode-0 holds 3 lent blocks"]), "LEAK"),
        (findings(leftovers=["process 7 is left"]), "LEAK"),
        (findings(slopes={"router-0": 1.5}), "GROWTH"),
    ],
)
def test_each_broken_rule_is_said_with_the_seed_and_the_faults(broken: Findings, word: str) -> None:
    (said,) = violations(broken)
    assert said.startswith(word)
    text = "\n".join(table(document(broken)))
    assert "--seed 1" in text
    assert all(f.kind in text for f in broken.landed)


def test_a_gap_is_the_time_without_news_around_the_fault() -> None:
    aboard = question("q1", workers={"decode-0"}, news_s=[1.0, 4.0, 6.5, 8.0])
    assert gaps(findings(aboard, landed=(fault("kill decode", "decode-0"),))) == {"kill decode": [2.5]}
    waiting = dataclasses.replace(aboard, news_s=[])
    assert gaps(findings(waiting, landed=(fault("kill decode", "decode-0"),))) == {"kill decode": [9.0]}


def test_only_those_whom_a_fault_concerns_are_counted() -> None:
    elsewhere = question("q1", workers={"decode-1", "prefill-0"}, news_s=[4.0, 6.0])
    assert gaps(findings(elsewhere, landed=(fault("kill decode", "decode-0"),))) == {}
    lender = (fault("kill prefill", "prefill-0"),)
    assert gaps(findings(elsewhere, landed=lender)) == {}, "it has its tokens: its lender has done its part"
    assert gaps(findings(dataclasses.replace(elsewhere, news_s=[6.0]), landed=lender)) == {"kill prefill": [6.0]}
    asked = dataclasses.replace(elsewhere, attempts=[Attempt("router-1", "q1.0", 0.0)])
    assert gaps(findings(asked, landed=(fault("kill router", "router-1"),))) == {"kill router": [2.0]}
    assert gaps(findings(elsewhere, landed=(fault("kill registry", "registry"),))) == {"kill registry": [2.0]}


def test_a_quantile_is_a_value_that_was_measured() -> None:
    assert [quantile([4.0, 1.0, 2.0, 3.0], q) for q in (0.0, 0.5, 0.75, 0.99, 1.0)] == [1.0, 2.0, 3.0, 4.0, 4.0]
    assert math.isnan(quantile([], 0.5))
