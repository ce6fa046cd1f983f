"""What has to be true before a stack can start, each looked at once and early: a wrong setting costs a second and
one sentence (SetupError, exit code 2), not a stack trace after a minute of starting."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket

from baton.core.config import Config, EngineConfig, RouterConfig
from baton.core.errors import PeerLost, SetupError

ENGINE_PACKAGES = ("torch", "numpy", "safetensors", "gguf")


def check_machine(config: Config) -> None:
    """Everything that needs no waiting."""
    check_packages(config.cluster.pool)
    if config.decode.replicas < 1:
        raise SetupError("decode.replicas is 0: somebody has to produce the tokens; set it to at least 1.")
    if config.cluster.ray_address is None:  # else the workers run elsewhere, and see for themselves
        check_memory(config.engine)
    check_ports(config.router)


def check_memory(engine: EngineConfig) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if engine.num_blocks is None and engine.kv_memory_bytes > there:
        raise SetupError(
            f"engine.kv_memory_bytes is {engine.kv_memory_bytes:,}, more than this machine's memory, {there:,} bytes; "
            "it is for each worker: set it lower."
        )


def check_packages(pool: str) -> None:
    missing = [name for name in ENGINE_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"{' and '.join(missing)} cannot be imported, and workers compute with it; "
            "install them: pip install 'baton-serve[local]'."
        )
    if pool == "ray" and importlib.util.find_spec("ray") is None:
        raise SetupError(
            "Ray cannot be imported; install it (pip install 'baton-serve[ray]'), or run the workers as "
            "plain processes: --pool local."
        )


def check_ports(router: RouterConfig) -> None:
    """Both ports, as uvicorn and gRPC will bind them. 0 is always free."""
    for setting, port in (("router.http_port", router.http_port), ("router.grpc_port", router.grpc_port)):
        family = socket.AF_INET6 if ":" in router.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # A port whose last user's connections still linger is free; one that somebody listens on is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((router.host, port))
            except OSError as e:
                raise SetupError(
                    f"cannot listen on {router.host}:{port} ({e.strerror}); stop who does, or choose "
                    f"another port: --set {setting}=0 takes a free one."
                ) from e
    if router.http_port == router.grpc_port != 0:
        raise SetupError(f"router.http_port and router.grpc_port are both {router.http_port}; they must differ.")


async def check_redis(url: str, timeout_s: float = 3.0) -> None:
    from baton.cluster.store import RedisRegistry

    registry = None
    try:
        async with asyncio.timeout(timeout_s):
            registry = RedisRegistry(url)
            await registry.list()
    except (PeerLost, TimeoutError, ValueError, OSError) as e:
        raise SetupError(
            f"no Redis answers at {url} ({str(e) or 'no answer in time'}); start one there, or leave "
            "cluster.redis_url out to use the embedded one."
        ) from e
    finally:
        if registry is not None:
            await registry.close()
