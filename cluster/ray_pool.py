"""Workers as Ray actors: the actor's process is the worker. Ray places them and brings them back, and nothing else;
no request and no token passes through it. The only file that imports ray.

Life of a member: a detached named actor is created on a free slot (one unit of its role's custom resource) -> its
process runs the entry in a thread with a loop of its own -> if that ends, or the process dies, Ray starts the next
one in the same slot -> stopped: the entry is cancelled, the actor killed.

Slots are counted before an actor is made, so that none is ever pending: a pending actor would take the slot of one
that just died, and that one would then wait for ever. Killing Ray's control store (GCS) leaves actors and pool
running; only starts and restarts are gone.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import logging
import os
import queue
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from baton.cluster import watchdog
from baton.cluster.actor import WorkerActor
from baton.cluster.pool import MemberState, PoolMember, WorkerSpec
from baton.cluster.processes import family_of, gone, machine_id, named_by, writers_to
from baton.cluster.scratch import private_dir
from baton.core.config import Config, apply_child_env, child_env
from baton.core.errors import NotFound, PeerLost, SetupError
from baton.core.worker import Role

log = logging.getLogger("baton.cluster")

SLOTS_PER_ROLE = 64
"""In a cluster of our own: as many workers as the config allows. In a joined one its operator says."""
CLOSE_GRACE_S = 5.0
_NAMESPACE = "baton"
_INIT_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 1.0
_CONTROL_TIMEOUT_S = 10.0
_SHUTDOWN_TIMEOUT_S = 30.0
"""Measured: 1.5 s, and 7 s when the control store is gone."""
_POLL_S = 0.1
_OBJECT_STORE_BYTES = 80 << 20
"""Near Ray's minimum: nothing of ours goes through it."""
_GCS_RECONNECT_S = 7 * 24 * 3600
"""By default raylet and workers end a minute after the GCS died; ours serve on."""

T = TypeVar("T")


@dataclass(slots=True)
class _Member:
    spec: WorkerSpec
    actor: Any
    pid: int | None = None
    restarts: int = 0
    stopping: bool = False


class RayPool:
    """Open with `open_ray_pool`."""

    def __init__(self, thread: _RayThread, store: str, janitor: _Janitor | None) -> None:
        self._thread = thread
        self._store = store
        """host:port of the GCS."""
        self._janitor = janitor
        """Of the cluster we started; None: we joined somebody's."""
        self._members: dict[str, _Member] = {}
        self._closed = False

    async def start(self, spec: WorkerSpec) -> None:
        if spec.worker_id in self._members:
            raise SetupError(f"there is a worker {spec.worker_id} already.")
        timeout_s = Config.model_validate_json(spec.config_json).cluster.start_timeout_s
        self._members[spec.worker_id] = member = _Member(spec, None)
        try:
            async with asyncio.timeout(timeout_s):
                taken = sum(m.spec.role is spec.role for m in self._members.values())
                member.actor = await self._controlled(lambda: _create(spec, taken), undo=_kill)
                await self._come_up(member)
        except (TimeoutError, PeerLost) as e:
            await self._end(member, 0.0)
            what = e.message if isinstance(e, PeerLost) else f"it did not register within {timeout_s:g} s."
            raise SetupError(f"worker {spec.worker_id} did not come up: {what}") from None
        except BaseException:
            await self._end(member, 0.0)
            raise

    async def stop(self, worker_id: str, grace_s: float) -> None:
        member = self._members.get(worker_id)
        if member is None:
            raise NotFound(f"there is no worker {worker_id} in this pool.")
        await self._end(member, grace_s)

    async def members(self) -> tuple[PoolMember, ...]:
        """`restarts` counts the new processes that calls of this have seen."""
        members = [self._members[name] for name in sorted(self._members)]
        return tuple(await asyncio.gather(*map(self._look, members)))

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*(self._end(m, CLOSE_GRACE_S) for m in list(self._members.values())))
        family = self._janitor.family() if self._janitor is not None else set()
        try:
            await self._thread.run(ray.shutdown, _SHUTDOWN_TIMEOUT_S)
        except PeerLost as e:
            log.warning("Ray cannot be shut down properly (%s); ending its processes", e.message)
            atexit.unregister(ray.shutdown)  # It would be tried again at our exit, without a deadline.
            await _swept(family, 0.0)
        self._thread.end()
        await _swept(family)
        if self._janitor is not None:
            await self._janitor.end()

    async def _come_up(self, member: _Member) -> None:
        while True:
            state = await _asked(member.actor.state, None)
            member.pid = state.pid
            if state.failure:
                raise SetupError(f"worker {member.spec.worker_id} ended before it registered. Its last words:\n"
                                 f"{state.failure}")
            if state.up:
                return
            await asyncio.sleep(_POLL_S)

    async def _controlled(self, call: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """A call that needs Ray's control store. Raises PeerLost, at once if nobody listens there: Ray itself would
        wait for it, and the thread with it."""
        if not await _listens(self._store):
            raise PeerLost(f"Ray's control store at {self._store} does not answer.")
        return await self._thread.run(call, _CONTROL_TIMEOUT_S, undo)

    async def _look(self, member: _Member) -> PoolMember:
        spec, state = member.spec, MemberState.STARTING
        pid = member.pid
        if member.actor is not None and pid is not None:
            try:
                answer = await _asked(member.actor.state, _ANSWER_TIMEOUT_S)
            except PeerLost:
                pid, state = None, MemberState.RESTARTING
            else:
                member.restarts += answer.pid != member.pid
                member.pid = pid = answer.pid
                state = MemberState.RUNNING if answer.up else MemberState.STARTING
        state = MemberState.STOPPING if member.stopping else state
        return PoolMember(spec.worker_id, spec.role, pid, member.restarts, state)

    async def _end(self, member: _Member, grace_s: float) -> None:
        """The entry first, then the actor, then, if it ran on this machine, make sure of its process. It stays a member
        until then: nobody may start another under its name before."""
        member.stopping = True
        if member.actor is not None:
            await self._end_actor(member.spec.worker_id, member.actor, grace_s)
        if self._members.get(member.spec.worker_id) is member:
            del self._members[member.spec.worker_id]

    async def _end_actor(self, worker_id: str, actor: Any, grace_s: float) -> None:
        pids = set[int]()
        with contextlib.suppress(PeerLost):
            answer = await _asked(actor.state, _ANSWER_TIMEOUT_S)
            if answer.machine == machine_id():
                pids = {answer.pid}
            if grace_s > 0:
                await _asked(actor.stop, grace_s + _ANSWER_TIMEOUT_S, grace_s)
        try:
            await self._controlled(lambda: _kill(actor))
        except PeerLost as e:
            log.warning("Ray did not end worker %s (%s); ending its process", worker_id, e.message)
            await _swept(pids, 0.0)
        await _swept(pids)


async def open_ray_pool(address: str | None) -> RayPool:
    """Join the Ray cluster at `address`, or, if None, start one on this machine. Raises SetupError.

    A joined cluster must have custom resources named `prefill` and `decode`, one unit per worker.
    """
    apply_child_env(1)
    if address and address[-1].isdigit() and "://" not in address and not await _listens(address):
        # Ray would try for minutes.
        raise SetupError(f"nothing listens at {address}, where cluster.ray_address says a Ray cluster is. "
                         "`--set cluster.pool=local` needs no Ray.")
    temp_dir = None if address else str(private_dir("ray", "/tmp"))
    janitor = _Janitor(temp_dir) if temp_dir else None
    thread = _RayThread()
    try:
        store = await thread.run(lambda: _connect(address, temp_dir), _INIT_TIMEOUT_S)
        if janitor is not None:
            await janitor.begin()
    except BaseException as e:
        if janitor is not None:
            # Ray cannot be stopped while it starts. This waits for the start, too: the thread does one after the other.
            try:
                await thread.run(ray.shutdown, _SHUTDOWN_TIMEOUT_S)
            except PeerLost:
                atexit.unregister(ray.shutdown)
        thread.end()
        if janitor is not None:
            await janitor.end()
        if isinstance(e, PeerLost):
            where = "Ray cannot be started"
            if address:
                where = f"the Ray cluster at {address} cannot be joined (RAY_AUTH_MODE=token, if it wants Ray's token)"
            raise SetupError(f"{where}: {e.message} `--set cluster.pool=local` needs no Ray.") from None
        raise
    return RayPool(thread, store, janitor)


class _Janitor:
    """A process that sweeps up after the Ray we started, also if we are killed: Ray's agents would stay."""

    def __init__(self, temp_dir: str) -> None:
        self._temp_dir = temp_dir
        self._process: asyncio.subprocess.Process | None = None

    def family(self) -> set[int]:
        """Ray's processes. Its first ones name the directory, the rest are their children, or were: they log there."""
        first = named_by(self._temp_dir) | writers_to(self._temp_dir)
        return family_of(first) - {self._process.pid if self._process else 0}

    async def begin(self) -> None:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), self._temp_dir, "kill",
                *map(str, self.family()), stdin=asyncio.subprocess.DEVNULL, start_new_session=True)

    async def end(self) -> None:
        """Kill what is left of Ray, until nothing is: what is being started may start more. Remove its directory."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _CONTROL_TIMEOUT_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CONTROL_TIMEOUT_S):
                while family := self.family():
                    await _swept(family, 0.0)
                    await asyncio.sleep(_POLL_S)
        shutil.rmtree(self._temp_dir, ignore_errors=True)


class _RayThread:
    """The one thread that makes Ray's blocking calls, in order. A daemon: a call that hangs (the GCS is gone) costs
    its caller a deadline, and nobody waits for the thread. Ray's processes end with the thread that started them, so
    it also lives as long as the pool."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._shut_down = False
        """No call is made after that: Ray would start a new cluster for it, by itself."""
        threading.Thread(target=self._run, name="ray", daemon=True).start()

    async def run(self, call: Callable[[], T], timeout_s: float, undo: Callable[[T], None] | None = None) -> T:
        """Raises PeerLost when Ray fails or does not answer in time; if it then does answer, `undo` gets the result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def report(result: T | None, error: Exception | None) -> None:
            if error is not None and not future.done():
                future.set_exception(error)
            elif not future.done():
                future.set_result(result)  # type: ignore[arg-type]
            elif error is None and undo is not None:
                self._calls.put(lambda: None if self._shut_down else undo(result))  # type: ignore[arg-type]

        def job() -> None:
            result, error = None, None
            try:
                if self._shut_down:
                    raise ConnectionError("it has been shut down")
                self._shut_down = call is ray.shutdown
                result = call()
            except Exception as e:
                error = e
            with contextlib.suppress(RuntimeError):  # The loop may be closed by now.
                loop.call_soon_threadsafe(report, result, error)

        self._calls.put(job)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise PeerLost(f"Ray did not answer within {timeout_s:g} s.") from None
        except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as e:
            raise PeerLost(f"Ray failed: {str(e).strip() or type(e).__name__}.") from e

    def end(self) -> None:
        self._calls.put(None)

    def _run(self) -> None:
        while (job := self._calls.get()) is not None:
            job()


def _connect(address: str | None, temp_dir: str | None) -> str:
    """Returns host:port of the control store."""
    logging.getLogger("ray").setLevel(logging.ERROR)  # It warns that signals are not its own; they are ours.
    common = {"namespace": _NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **common)
    else:
        ray.init(
            num_cpus=1, resources={role.value: SLOTS_PER_ROLE for role in Role}, include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=temp_dir,
            _system_config={"gcs_rpc_server_reconnect_timeout_s": _GCS_RECONNECT_S, "worker_niceness": 0}, **common)
    return str(ray.get_runtime_context().gcs_address)


async def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
    except (OSError, TimeoutError, ValueError):
        return False
    return True


def _create(spec: WorkerSpec, taken: int) -> Any:
    """`taken`: slots of this role that our members have, this one included."""
    role = spec.role.value
    slots = int(ray.cluster_resources().get(role, 0))
    free = int(ray.available_resources().get(role, 0))
    if taken > slots or free < 1:
        raise SetupError(f"the Ray cluster has {slots} `{role}` slots and none is free for {spec.worker_id}: start its "
                         f"nodes with more, as in `ray start --resources '{{\"{role}\": {slots + 1}}}'`.")
    env = child_env(spec.threads)
    options = {
        "name": f"baton-{spec.worker_id}", "lifetime": "detached", "max_restarts": -1, "max_task_retries": 0,
        "num_cpus": 0, "resources": {role: 1}, "max_concurrency": 8,
        "runtime_env": {"env_vars": {name: env[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}},
    }
    return ray.remote(WorkerActor).options(**options).remote(dataclasses.asdict(spec))


def _kill(actor: Any) -> None:
    ray.kill(actor, no_restart=True)


async def _asked(method: Any, timeout_s: float | None, *args: Any) -> Any:
    """Call an actor's method, directly at its process: this needs no GCS. Raises PeerLost."""
    try:
        async with asyncio.timeout(timeout_s):
            return await method.remote(*args)
    except TimeoutError:
        raise PeerLost(f"the actor did not answer within {timeout_s} s.") from None
    except RayError as e:
        raise PeerLost(f"the actor is not reachable: {e}") from e


async def _swept(pids: set[int], patience_s: float = _CONTROL_TIMEOUT_S) -> None:
    """Wait until these processes of this machine are gone; kill them when patience ends."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            while not all(map(gone, pids)):  # noqa: ASYNC110 (nothing tells us of a process that is not our child)
                await asyncio.sleep(_POLL_S)
    for pid in pids:
        if not gone(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
