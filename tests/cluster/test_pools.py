"""One contract, both pools: workers come up, come back with a new boot id, and leave nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from baton.cluster.embedded import start_embedded_redis
from baton.cluster.local_pool import LocalPool
from baton.cluster.pool import MemberState, PoolMember, WorkerPool, WorkerSpec
from baton.cluster.store import RedisRegistry
from baton.core.config import load
from baton.core.errors import NotFound, PeerLost, SetupError
from baton.core.worker import Role, WorkerInfo

DEADLINE_S = 120


@dataclass
class World:
    pool: WorkerPool
    registry: RedisRegistry
    url: str

    def spec(self, worker_id: str = "p-0", entry: str = "serve", timeout_s: float = 60) -> WorkerSpec:
        config = load(overrides=[f"cluster.start_timeout_s={timeout_s}"])
        return WorkerSpec(worker_id, Role.PREFILL, f"pool_entries:{entry}", config.model_dump_json(), self.url, 1)

    async def member(self, worker_id: str = "p-0") -> PoolMember:
        return {m.worker_id: m for m in await self.pool.members()}[worker_id]

    async def entry_of(self, worker_id: str = "p-0") -> WorkerInfo | None:
        return {i.worker_id: i for i in await self.registry.list()}.get(worker_id)

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not await condition():
                await asyncio.sleep(0.05)


@asynccontextmanager
async def local() -> AsyncIterator[WorkerPool]:
    pool = LocalPool()
    yield pool
    await pool.close()


@asynccontextmanager
async def on_ray() -> AsyncIterator[WorkerPool]:
    from baton.cluster.ray_pool import open_ray_pool

    pool = await open_ray_pool(None)
    try:
        yield pool
    finally:
        await pool.close()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a test body against an open pool, and see that closing it leaves nothing."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    opened = local if request.param == "local" else on_ray

    def inside(body: Callable[[World], Awaitable[None]]) -> None:
        async def world() -> None:
            server = await start_embedded_redis()
            registry = RedisRegistry(server.url)
            try:
                async with asyncio.timeout(2 * DEADLINE_S), opened() as pool:
                    await body(World(pool, registry, server.url))
            finally:
                await registry.close()
                await server.close()

        before = leftovers()
        asyncio.run(world())
        assert leftovers() <= before

    return inside


def leftovers() -> set[object]:
    """Our processes, and files where pools keep theirs."""
    alive = {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}
    return alive | set(Path("/tmp").glob(f"baton-*-{os.getpid()}-*")) | set(Path("/dev/shm").glob("*plasma*"))


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.3, 1.0, 1.8])
def test_ray_interrupted_while_it_starts_leaves_nothing(after_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from baton.cluster.ray_pool import open_ray_pool

    mark = f"BATON_TEST_MARK={os.getpid()}-{after_s}"
    monkeypatch.setenv(*mark.split("="))

    async def body() -> None:
        opening = asyncio.create_task(open_ray_pool(None))
        await asyncio.wait({opening}, timeout=after_s)
        if opening.cancel():
            with pytest.raises(asyncio.CancelledError):
                await opening
        else:
            await opening.result().close()

    before = leftovers()
    asyncio.run(body())
    assert leftovers() <= before
    assert not {pid for pid in psutil.pids() if inherits(pid, mark)}, "those that Ray's processes left behind"


def inherits(pid: int, variable: str) -> bool:
    """Whether another process than ours has `variable`, which this one set after it began, in its environment."""
    try:
        return variable.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def test_a_killed_worker_comes_back_as_a_new_boot(run: Callable[..., None]) -> None:
    async def body(world: World) -> None:
        await asyncio.gather(world.pool.start(world.spec("p-0")), world.pool.start(world.spec("p-1")))
        first, neighbour = await world.entry_of("p-0"), await world.member("p-1")
        member = await world.member()
        assert first is not None, "start returns when the worker has registered"
        assert (member.role, member.restarts, member.state) == (Role.PREFILL, 0, MemberState.RUNNING)
        assert first.address == f"{member.pid}.1", "the process is the worker, with the threads it was given"
        assert member.pid is not None
        os.kill(member.pid, signal.SIGKILL)

        async def back() -> bool:
            entry, now = await world.entry_of(), await world.member()
            return entry != first and now.restarts == 1 and now.state is MemberState.RUNNING

        await world.until(back)
        entry, again = await world.entry_of(), await world.member()
        assert entry is not None
        assert entry.boot_id != first.boot_id
        assert entry.address == f"{again.pid}.1"
        assert await world.member("p-1") == neighbour

    run(body)


def test_a_stopped_worker_deregisters_and_leaves_no_process(run: Callable[..., None]) -> None:
    async def body(world: World) -> None:
        await world.pool.start(world.spec())
        member = await world.member()
        assert member.pid is not None
        processes = family(member.pid)
        await world.pool.stop("p-0", 30)
        assert await world.pool.members() == ()
        assert await world.entry_of() is None, "it was asked before it was made to"
        assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        with pytest.raises(NotFound, match="p-0"):
            await world.pool.stop("p-0", 1)
        await world.pool.start(world.spec())
        assert (await world.member()).restarts == 0

    run(body)


async def enough(world: World) -> None:
    """What was left on the draining worker has moved away."""
    entry = await world.entry_of()
    assert entry is not None
    await world.registry.register(dataclasses.replace(entry, worker_id="enough"))


def test_a_worker_that_is_told_to_end_drains_first_and_is_a_member_until_it_has(run: Callable[..., None]) -> None:
    async def body(world: World) -> None:
        await world.pool.start(world.spec(entry="drain"))
        pid = (await world.member()).pid
        stopping = asyncio.create_task(world.pool.stop("p-0", DEADLINE_S))

        async def drains() -> bool:
            entry = await world.entry_of()
            return entry is not None and entry.address == "draining"

        await world.until(drains)
        member = await world.member()
        assert (member.pid, member.state) == (pid, MemberState.STOPPING)
        with pytest.raises(SetupError, match="there is a worker p-0 already"):
            await world.pool.start(world.spec())
        assert not stopping.done()
        await enough(world)
        await stopping
        assert await world.pool.members() == ()
        assert await world.entry_of() is None, "it left by itself"
        await world.pool.start(world.spec())

    run(body)


@pytest.mark.parametrize("run", ["local"], indirect=True)
def test_a_worker_process_that_is_told_to_end_drains_too_and_is_replaced(run: Callable[..., None]) -> None:
    async def body(world: World) -> None:
        await world.pool.start(world.spec(entry="drain"))
        pid = (await world.member()).pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)

        async def drains() -> bool:
            entry = await world.entry_of()
            return entry is not None and entry.address == "draining"

        async def replaced() -> bool:
            entry, now = await world.entry_of(), await world.member()
            return now.restarts == 1 and now.state is MemberState.RUNNING and entry is not None

        await world.until(drains)
        assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        await enough(world)
        await world.until(replaced)
        assert (await world.member()).pid != pid

    run(body)


def test_a_grace_that_ends_before_the_drain_ends_the_worker(run: Callable[..., None]) -> None:
    async def body(world: World) -> None:
        await world.pool.start(world.spec(entry="drain"))
        pid = (await world.member()).pid
        await world.pool.stop("p-0", 0.5)
        assert pid is not None
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        assert await world.pool.members() == ()

    run(body)


def test_closing_the_pool_ends_a_drain_that_is_under_way(run: Callable[..., None]) -> None:
    async def body(world: World) -> None:
        await world.pool.start(world.spec(entry="drain"))
        pid = (await world.member()).pid
        stopping = asyncio.create_task(world.pool.stop("p-0", 10 * DEADLINE_S))

        async def drains() -> bool:
            entry = await world.entry_of()
            return entry is not None and entry.address == "draining"

        await world.until(drains)
        await world.pool.close()
        await stopping
        assert pid is not None
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    run(body)


def test_a_worker_that_will_not_end_is_ended(run: Callable[..., None]) -> None:
    async def body(world: World) -> None:
        await world.pool.start(world.spec(entry="come_back"))
        member = await world.member()
        assert member.pid is not None
        await world.pool.stop("p-0", 0.2)
        assert not psutil.pid_exists(member.pid) or psutil.Process(member.pid).status() == psutil.STATUS_ZOMBIE

    run(body)


@pytest.mark.slow
def test_a_worker_that_does_not_come_up_says_why(run: Callable[..., None]) -> None:
    cases = {
        "refuse": "p-0 has nothing to serve: find it a model", "crash": "ZeroDivisionError: worker bug",
        "nowhere": "'pool_entries:nowhere' cannot be imported", "dawdle": "did not register within 2 s",
    }

    async def body(world: World) -> None:
        for entry, said in cases.items():
            with pytest.raises(SetupError) as caught:
                await world.pool.start(world.spec(entry=entry, timeout_s=2 if entry == "dawdle" else 60))
            assert said in caught.value.message
            assert await world.pool.members() == ()
        await world.pool.start(world.spec())

    run(body)


@pytest.mark.slow
def test_a_process_that_cannot_be_started_is_tried_again_until_it_can(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The first OSError ended its keeper: RESTARTING for ever."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    async def main() -> None:
        server = await start_embedded_redis()
        registry, pool = RedisRegistry(server.url), LocalPool(tmp_path)
        world = World(pool, registry, server.url)
        await pool.start(world.spec())
        first, log = (await world.member()).pid, tmp_path / "p-0.log"
        log.unlink()
        log.mkdir()  # its log cannot be opened from now on
        assert first is not None
        os.kill(first, signal.SIGKILL)

        async def failed_twice() -> bool:
            return caplog.text.count("cannot be started") >= 2

        async def back() -> bool:
            now = await world.member()
            return now.state is MemberState.RUNNING and now.pid != first

        await world.until(failed_twice)
        assert (await world.member()).state is MemberState.RESTARTING
        log.rmdir()
        await world.until(back)
        assert (await world.member()).restarts == 1
        await pool.close()
        await registry.close()
        await server.close()

    asyncio.run(main())


@pytest.mark.slow
def test_a_call_that_comes_after_rays_shutdown_starts_no_new_ray() -> None:
    """Ray would: a worker's end that was under way while the pool closed began a whole cluster, and left it."""
    import ray

    from baton.cluster.ray_pool import open_ray_pool

    async def body() -> None:
        pool = await open_ray_pool(None)
        try:
            late = await asyncio.gather(
                pool._thread.run(ray.shutdown, DEADLINE_S), pool._thread.run(lambda: ray.put(1), DEADLINE_S),
                return_exceptions=True)
            assert isinstance(late[1], PeerLost), late
            assert not ray.is_initialized()
        finally:
            await pool.close()

    before = leftovers()
    asyncio.run(body())
    assert leftovers() <= before


WITHOUT_STORE = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from test_pools import without_store
asyncio.run(without_store())
"""


async def without_store() -> None:
    server = await start_embedded_redis()
    registry = RedisRegistry(server.url)
    async with asyncio.timeout(2 * DEADLINE_S), on_ray() as pool:
        world = World(pool, registry, server.url)
        await pool.start(world.spec("p-0"))
        await pool.start(world.spec("p-1"))
        members, entry = await pool.members(), await world.entry_of()
        (store,) = [p for p in psutil.Process().children() if "gcs_server" in p.name()]
        store.kill()
        store.wait(10)
        assert await pool.members() == members
        with pytest.raises(SetupError, match="control store"):
            await pool.start(world.spec("p-2"))
        assert await pool.members() == members
        assert await world.entry_of() == entry
        stopped = members[0].pid
        await pool.stop("p-0", 10)
        assert stopped is not None
        assert not psutil.pid_exists(stopped) or psutil.Process(stopped).status() == psutil.STATUS_ZOMBIE
        assert await pool.members() == members[1:]
    await registry.close()
    await server.close()


@pytest.mark.slow
def test_workers_and_pool_live_on_without_rays_control_store_and_leave_in_order(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    before = leftovers()
    owner = subprocess.Popen([sys.executable, "-c", WITHOUT_STORE, str(Path(__file__).parent)])
    try:
        assert owner.wait(2 * DEADLINE_S) == 0, "Ray's own exit handlers must not hang or crash either"
    finally:
        owner.kill()
        owner.wait()
    assert leftovers() <= before
    assert not list(Path("/tmp").glob(f"baton-*-{owner.pid}-*"))


OWNER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from test_pools import World, local, on_ray, start_embedded_redis
async def main():
    server = await start_embedded_redis()
    async with {"local": local, "ray": on_ray}[sys.argv[2]]() as pool:
        await pool.start(World(pool, None, server.url).spec())
        print("up", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_pool_whose_owner_is_killed_leaves_no_process(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", here)
    with subprocess.Popen([sys.executable, "-c", OWNER, here, kind], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "up\n"
            # The kernel kills our child, not its children: workers have none that matter.
            processes = [p for p in family(owner.pid) if p.pid != owner.pid and p.name() != "sleep"]
            assert len(processes) >= 3
        finally:
            os.kill(owner.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
    assert not alive
    assert not list(Path("/tmp").glob(f"baton-r*-{owner.pid}-*"))


@pytest.mark.slow
def test_without_ray_at_the_address_the_message_names_it() -> None:
    from baton.cluster.ray_pool import open_ray_pool

    with pytest.raises(SetupError, match=r"127\.0\.0\.1:1,.*cluster\.pool=local"):
        asyncio.run(open_ray_pool("127.0.0.1:1"))
