"""The simulated network keeps the promises of core/services.py, and breaks them only as a network does."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from baton.core.errors import DeadlineExceeded, Overloaded, PeerLost
from baton.core.handoff import Alive, PrefillCall, PrefillEvent, ReleaseAnswer
from baton.core.layout import Capability
from baton.core.messages import Cancel, Hello, StepMessage, UpMessage, WorkerStatus
from baton.core.request import Request
from baton.core.services import WorkerService
from baton.core.worker import Role, WorkerInfo, WorkerLoad
from baton.models.hash_model import layout
from baton.sim.loop import SimLoop, SimProcess, run
from baton.sim.network import Conditions, SimNetwork
from baton.sim.pipe import WINDOW_FRAMES
from baton.sim.trace import Trace

INFO = WorkerInfo("w", "w.1", Role.PREFILL, "w", Capability("m", "f", layout(2), 8, 8))
CALL = PrefillCall(Request("r", (1,)), 1, "d", 0, 1.0)


class Counting:
    """A worker that counts: up messages, prefill events, and how its calls ended."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.num_sent = 0

    async def stream(self, up: AsyncIterator[UpMessage]) -> AsyncIterator[StepMessage]:
        try:
            async for message in up:
                self.log.append(type(message).__name__)
                yield StepMessage("w.1", WorkerLoad(steps=len(self.log)))
            self.log.append("half closed")
        finally:
            self.log.append("stream over")

    async def prefill(self, call: PrefillCall) -> AsyncIterator[PrefillEvent]:
        if call.epoch == 2:
            raise Overloaded("full")
        try:
            for n in itertools.count():
                self.num_sent = n
                yield Alive(n)
                await asyncio.sleep(0.01)
        finally:
            self.log.append("prefill over")

    async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
        if lease_id == "slow":
            await asyncio.sleep(5.0)
        return ReleaseAnswer(release, lease_id)

    async def status(self, timeout_s: float) -> WorkerStatus:
        raise AssertionError("not asked here")


class Scene:
    def __init__(self, loop: SimLoop, conditions: Conditions) -> None:
        self.loop = loop
        self.network = SimNetwork(loop, Trace(loop.time), conditions)
        self.service = Counting()
        self.process = SimProcess(loop, "w")
        self.network.listen("w", self.service, self.process)
        self.worker: WorkerService = self.network.dial("r")(INFO)


def play(act: Callable[[Scene], Coroutine[Any, Any, None]], seed: int = 1, loss: float = 0.1) -> None:
    async def main(loop: SimLoop) -> None:
        await act(Scene(loop, Conditions(loss=loss)))
        assert not loop.problems

    run(seed, main)


async def numbers(events: AsyncIterator[PrefillEvent], count: int) -> list[int]:
    seen = []
    async for event in events:
        assert isinstance(event, Alive)
        seen.append(event.steps)
        if len(seen) == count:
            break
    return seen


async def close(iterator: Any) -> None:
    await iterator.aclose()


async def ends(condition: Callable[[], object], within_s: float) -> None:
    for _ in range(int(within_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within {within_s} s")


@pytest.mark.parametrize("seed", range(5))
def test_frames_arrive_in_order_however_many_are_lost_on_the_way(seed: int) -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        assert await numbers(events, 200) == list(range(200))
        await close(events)

    play(act, seed, loss=0.3)


def test_a_sender_whose_reader_does_not_read_waits() -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        await numbers(events, 1)
        await asyncio.sleep(30.0)
        assert scene.service.num_sent <= 2 * WINDOW_FRAMES
        await close(events)

    play(act)


def test_closing_an_iterator_ends_the_call_on_the_other_side_when_the_news_arrives() -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        await numbers(events, 3)
        await close(events)
        assert scene.service.log == []
        await ends(lambda: scene.service.log == ["prefill over"], 2.0)
        assert scene.network.open_calls("w") == 0

    play(act)


def test_cancelling_the_reader_ends_the_call_on_the_other_side() -> None:
    async def act(scene: Scene) -> None:
        async def read() -> None:
            events = scene.worker.prefill(CALL)
            try:
                await numbers(events, -1)
            finally:
                await close(events)

        reader = asyncio.ensure_future(read())
        await asyncio.sleep(1.0)
        reader.cancel()
        await ends(lambda: scene.service.log == ["prefill over"], 2.0)

    play(act)


def test_an_error_comes_back_as_what_it_is() -> None:
    async def act(scene: Scene) -> None:
        with pytest.raises(Overloaded, match="full"):
            await numbers(scene.worker.prefill(PrefillCall(CALL.request, 2, "d", 0, 1.0)), 1)

    play(act)


def test_a_stream_carries_both_ways_and_half_closes() -> None:
    async def act(scene: Scene) -> None:
        async def up() -> AsyncIterator[UpMessage]:
            yield Hello("r")
            yield Cancel("q", 1)

        steps = [m.load.steps async for m in scene.worker.stream(up())]
        assert steps == [1, 2]
        assert scene.service.log == ["Hello", "Cancel", "half closed", "stream over"]

    play(act)


def test_a_unary_call_into_silence_ends_at_its_deadline() -> None:
    async def act(scene: Scene) -> None:
        assert await scene.worker.lease("good", True, 2.0) == ReleaseAnswer(True, "good")
        with pytest.raises(DeadlineExceeded):
            await scene.worker.lease("slow", True, 1.0)
        scene.network.cut("w", "r")
        began = scene.loop.time()
        with pytest.raises(DeadlineExceeded):
            await scene.worker.lease("good", True, 1.0)
        assert scene.loop.time() == began + 1.0

    play(act)


def test_a_cut_link_holds_frames_one_way_and_a_healed_one_delivers_them_in_order() -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        first = await numbers(events, 5)
        scene.network.cut("w", "r")
        later = asyncio.ensure_future(numbers(events, 20))
        await asyncio.sleep(5.0)
        assert not later.done()
        assert scene.network.num_travelling("w", "r") > 0
        scene.network.heal("w", "r")
        assert first + await later == list(range(25))
        await close(events)

    async def main(loop: SimLoop) -> None:
        await act(Scene(loop, Conditions()))

    run(1, main)


def test_keep_alive_ends_calls_over_a_link_that_stays_cut_at_both_ends() -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        await numbers(events, 5)
        scene.network.cut("r", "w")
        with pytest.raises(PeerLost, match="keep-alive"):
            await numbers(events, -1)
        await ends(lambda: scene.service.log == ["prefill over"], 2.0)

    play(act)


def test_a_reset_loses_the_call_and_a_new_one_works() -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        await numbers(events, 5)
        assert scene.network.reset("r", "w") == 1
        with pytest.raises(PeerLost):
            await numbers(events, -1)
        again = scene.worker.prefill(CALL)
        assert await numbers(again, 2) == [0, 1]
        await close(again)

    play(act)


@pytest.mark.parametrize(("silent", "within_s"), [(False, 1.0), (True, 12.0)])
def test_a_killed_worker_is_noticed_at_once_and_a_vanished_one_by_keep_alive(silent: bool, within_s: float) -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        await numbers(events, 5)
        scene.process.kill()
        scene.network.crash("w", silent)
        began = scene.loop.time()
        with pytest.raises(PeerLost):
            await numbers(events, -1)
        took = scene.loop.time() - began
        assert took < within_s
        assert took > 5.0 or not silent
        assert scene.service.log == [], "a killed process runs no finally"
        with pytest.raises((PeerLost, DeadlineExceeded)):
            await scene.worker.lease("good", True, 1.0)
        scene.network.listen("w", scene.service, SimProcess(scene.loop, "w"))
        assert (await scene.worker.lease("good", True, 5.0)).good

    play(act)


def test_what_a_dead_client_had_open_ends_on_the_server() -> None:
    async def act(scene: Scene) -> None:
        client = SimProcess(scene.loop, "r")

        async def read() -> None:
            await numbers(scene.worker.prefill(CALL), -1)

        client.spawn(read())
        await asyncio.sleep(1.0)
        client.kill()
        scene.network.crash("r", silent=False)
        await ends(lambda: scene.service.log == ["prefill over"], 2.0)

    play(act)




def test_a_repeated_call_has_its_effect_twice_and_one_answer() -> None:
    async def act(scene: Scene) -> None:
        asked: list[str] = []

        class Asked(Counting):
            async def lease(self, lease_id: str, release: bool, timeout_s: float) -> ReleaseAnswer:
                asked.append(lease_id)
                return ReleaseAnswer(release, str(len(asked)))

        scene.network.listen("w", Asked(), scene.process)
        scene.network.repeated_calls["test"] = lambda client, server, method: method == "lease"
        assert await scene.worker.lease("good", True, 2.0) == ReleaseAnswer(True, "1")
        await ends(lambda: asked == ["good", "good"], 2.0)
        await asyncio.sleep(1.0)
        assert asked == ["good", "good"], "a repeat is not repeated"

    play(act, loss=0.0)


def test_a_stream_replays_an_old_message_behind_a_new_one_and_goes_on() -> None:
    async def act(scene: Scene) -> None:
        async def up() -> AsyncIterator[UpMessage]:
            for _ in range(12):
                yield Hello("r")

        replayed: list[object] = []

        def once(src: str, dst: str, frame: object) -> bool:
            assert (src, dst) == ("w", "r")
            replayed.append(frame)
            return len(replayed) == 8

        scene.network.replayed_frames["test"] = once
        steps = [m.load.steps async for m in scene.worker.stream(up())]
        doubled = next(s for s in steps if steps.count(s) == 2)
        assert sorted(steps) == sorted([*range(1, 13), doubled])
        again = len(steps) - 1 - steps[::-1].index(doubled)
        assert steps[again - 1] > doubled, "it comes again behind a newer one"

    play(act, loss=0.0)


def test_congestion_delays_every_frame_until_it_is_over() -> None:
    async def act(scene: Scene) -> None:
        async def took() -> float:
            began = scene.loop.now
            await scene.worker.lease("good", True, 9.0)
            return scene.loop.now - began

        usual = await took()
        with scene.network.congested(1.0, 0.0):
            assert await took() > 2.0
        assert await took() == pytest.approx(usual, abs=0.01)
        assert scene.network.longest_delay_s > 1.0

    play(act, loss=0.0)


def test_a_server_that_stops_in_order_lets_calls_end_and_then_cuts_them() -> None:
    async def act(scene: Scene) -> None:
        events = scene.worker.prefill(CALL)
        await numbers(events, 3)
        closing = asyncio.ensure_future(scene.network.close("w"))
        await asyncio.sleep(1.0)
        with pytest.raises(PeerLost):
            await scene.worker.lease("good", True, 1.0)
        await numbers(events, 50)
        assert await closing == 1, "the stream did not end by itself"
        with pytest.raises(PeerLost):
            await numbers(events, -1)

    play(act, loss=0.0)
