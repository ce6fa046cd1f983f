"""`baton explain`: a record in words, and made again from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.cli.explain import dearer, explanation, measures, read_record, replayed
from baton.core.errors import SetupError
from baton.core.messages import Submit, TokenChunk
from baton.core.worker import Role, Span, WorkerLoad
from baton.router.recorded import document, plain
from tests.router.fake_fleet import Act, ScriptedFleet, ScriptedWorker, refuse, request, simulate, speak

SPANS = (
    Span("prefill queue", 0.001, 0.003, worker="p0"),
    Span("prefill chunk", 0.003, 0.007, "30 tokens from 0", "p0"),
    Span("prefill chunk", 0.007, 0.010, "10 tokens from 30", "p0"),
    Span("transfer", 0.008, 0.012, "2 blocks", "d0"),
    Span("decode", 0.012, 0.06, "4 tokens", "d0", (0.01, 0.02, 0.045)),
)


def speak_with_spans(submit: Submit) -> Iterator[Act]:
    for act in speak(submit):
        yield replace(act, spans=SPANS) if isinstance(act, TokenChunk) and act.finish else act


def recorded(*workers: ScriptedWorker, num_tokens: int = 40) -> dict[str, Any]:
    """The record of one request, as it travels."""
    found: list[dict[str, Any]] = []

    async def main() -> None:
        async with ScriptedFleet(*workers, local_prefill_max_tokens=4) as fleet:
            await fleet.answer(request(prompt=range(num_tokens)))
            record = fleet.dispatcher.traces.get("r")
            assert record is not None
            found.append(json.loads(json.dumps(document(record))))

    simulate(main)
    return found[0]


def test_the_words_name_who_could_take_it_what_that_costs_and_what_happened() -> None:
    busy = WorkerLoad(available_blocks=64, total_blocks=64, queued_prefill_tokens=5_000)
    told = recorded(
        ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("p1", Role.PREFILL, load=busy),
        ScriptedWorker("d0", script=speak_with_spans),
    )  # fmt: skip
    said = list(explanation(told))
    rows = [line.split() for line in said]
    assert said[0].startswith("r: ended with length; 40 prompt tokens")
    assert any(line.startswith("\nattempt 1 of 1, ") and line.endswith(": p0 -> d0") for line in said)
    assert ["p1", "prefill", "0", "blocks", "5000", "tokens", "0", "64", "of", "64"] in rows
    (chosen,) = (row for row in rows if row[-1:] == ["chosen"])
    assert chosen[:3] == ["p0", "->", "d0"]
    assert any(row[:1] == ["prefill"] and row[-2:] == ["7.0", "ms"] for row in rows)
    assert any(row[:2] == ["first", "token"] for row in rows)


def test_every_attempt_is_explained_and_how_it_ended() -> None:
    told = recorded(ScriptedWorker("d0", script=refuse("overloaded")),
                    ScriptedWorker("d1", load=WorkerLoad(num_running=9)))  # fmt: skip
    said = "\n".join(explanation(told))
    assert "attempt 1 of 2" in said
    assert "It ended with overloaded after" in said
    assert "attempt 2 of 2" in said
    assert said.count("offered:") == 2


def test_a_forgotten_decision_is_said_to_be_so() -> None:
    told = recorded(ScriptedWorker("d0"))
    told["attempts"][0]["decision"] = None
    assert "no longer kept" in "\n".join(explanation(told))


def test_a_request_that_nobody_could_take_says_who_was_offered() -> None:
    told = recorded(ScriptedWorker("d0"))
    facts = {"num_tokens": 40, "num_choices": 1, "turn": 3}
    told["decisions"].append({**told["decisions"][0], "facts": facts, "route": None, "decode": []})
    assert "It was not sent to any worker." not in explanation(told)
    assert "It was not sent to any worker." in explanation({**told, "attempts": []})
    said = "\n".join(explanation(told)).partition("nobody could take it")[2]
    assert said.split() == [":", "asked:", "40", "tokens", "of", "KV;", "offered:", "nobody"]


def test_what_made_another_choice_dearer_is_named_by_its_largest_terms() -> None:
    chosen = {"queue": 0.001, "prefill": 0.1, "handoff": 0.01}
    assert dearer(chosen, {"queue": 0.3, "prefill": 0.12, "handoff": 0.012}) == "lost by queue +299.0, prefill +20.0"
    assert dearer(chosen, {"prefill": 0.05, "stall": 0.4}) == "lost by stall +400.0"
    assert dearer(chosen, chosen) == "as good: chance decided"


def test_each_term_is_measured_by_what_it_prices() -> None:
    spans = plain(SPANS)
    told = measures(spans, first_s=0.011)
    assert told == {
        "queue": pytest.approx(0.002),
        "prefill": pytest.approx(0.007),
        "transfer": pytest.approx(0.002),  # what was pulled before the last chunk was done is hidden
        "handoff": pytest.approx(0.002),  # of the first token's time, what is none of the others
        "a decode step": pytest.approx(0.015),
    }
    alone = measures(plain([Span("prefill chunk (local)", 0.1, 0.4)]), None)
    assert alone == {"prefill": pytest.approx(0.3)}


def test_a_saved_record_is_made_again_and_a_changed_one_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = recorded(ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("p1", Role.PREFILL), ScriptedWorker("d0"))
    saved = tmp_path / "r.json"
    saved.write_text(json.dumps(told))
    told["decisions"][0]["dice"] = "0x1"
    assert replayed(read_record(saved)) is True
    assert "the same pick" in capsys.readouterr().out
    chosen = told["attempts"][0]["route"]["prefill"]
    for one in told["decisions"][0]["prefill"]:
        one["queued_prefill_tokens"] = 10_000 if one["info"]["worker_id"] == chosen else 0
    saved.write_text(json.dumps(told))
    assert replayed(read_record(saved)) is False
    assert "ANOTHER PICK" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"decisions": 3}'])
def test_a_file_that_is_no_record_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(SetupError, match="--json"):
        read_record(tmp_path / "r.json")
