"""/metrics: the router's samples and its workers', one family for each name, in the format that scrapers read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from baton.core.errors import PeerLost
from baton.core.messages import WorkerStatus
from baton.core.metrics import Metrics
from baton.core.worker import Role, WorkerInfo, WorkerLoad
from baton.router.exposition import exposition
from tests.router.fake_fleet import LEDGER, ScriptedFleet, ScriptedWorker, capability, now, simulate


def told_by(worker_id: str, role: Role, metrics: Metrics) -> tuple[WorkerInfo, WorkerStatus]:
    info = WorkerInfo(worker_id, "boot", role, "here:1", capability())
    return info, WorkerStatus(info, WorkerLoad(), LEDGER, metrics.rendered())


def test_workers_samples_join_the_routers_in_one_family_for_each_name() -> None:
    own, decode, prefill = Metrics(), Metrics(), Metrics()
    own.inc("baton_requests_total", 4, outcome="stop")
    own.observe("baton_ttft_seconds", 0.1)
    decode.inc("baton_fallbacks_total", 3, kind="local_prefill")
    decode.set("baton_blocks", 7, state="free")
    decode.inc("baton_pulls_total", 2, transport="tcp", end="verified")
    prefill.inc("baton_steps_total", 5)
    prefill.set("baton_blocks", 8, state="free")
    frozen = WorkerInfo("decode-1", "boot", Role.DECODE, "here:2", capability())
    newer = WorkerInfo("prefill-1", "boot", Role.PREFILL, "here:3", capability())
    unknown = WorkerStatus(newer, WorkerLoad(), LEDGER, (("baton_of_tomorrow", 1.0), ("{", 2.0)))
    text = exposition(own, (told_by("decode-0", Role.DECODE, decode), (frozen, None),
                            told_by("prefill-0", Role.PREFILL, prefill), (newer, unknown))).decode()
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    d0, p0 = {"worker": "decode-0", "role": "decode"}, {"worker": "prefill-0", "role": "prefill"}
    samples = {(s.name, tuple(sorted(s.labels.items()))): s.value
               for family in text_string_to_metric_families(text) for s in family.samples}

    def value(name: str, labels: dict[str, str]) -> float | None:
        return samples.get((name, tuple(sorted(labels.items()))))

    assert value("baton_requests_total", {"outcome": "stop"}) == 4
    assert value("baton_fallbacks_total", {"kind": "local_prefill"} | d0) == 3
    assert value("baton_pulls_total", {"transport": "tcp", "end": "verified"} | d0) == 2
    assert value("baton_blocks", {"state": "free"} | d0) == 7
    assert value("baton_blocks", {"state": "free"} | p0) == 8
    assert value("baton_steps_total", p0) == 5
    assert value("baton_ttft_seconds_count", {}) == 1
    up = {labels[1][1]: value for (name, labels), value in samples.items() if name == "baton_worker_up"}
    assert up == {"decode-0": 1, "decode-1": 0, "prefill-0": 1, "prefill-1": 1}
    assert "tomorrow" not in text


@dataclass
class SilentWorker(ScriptedWorker):
    """Takes the status call and never answers, or cannot be reached."""

    gone: bool = False

    async def status(self, timeout_s: float) -> WorkerStatus:
        if self.gone:
            raise PeerLost("nobody there")
        await asyncio.Event().wait()
        raise AssertionError


def test_workers_that_do_not_answer_are_named_and_keep_nobody_waiting() -> None:
    async def main() -> None:
        workers = (ScriptedWorker("d0"), SilentWorker("d1"), SilentWorker("d2"), SilentWorker("d3", gone=True))
        async with ScriptedFleet(*workers) as fleet:
            started = now()
            told = await fleet.fleet.statuses()
            assert now() - started < 0.6, "all are asked at once"
            assert [(info.worker_id, status is not None) for info, status in told] == [
                ("d0", True), ("d1", False), ("d2", False), ("d3", False)]

    simulate(main)
