"""What a run is: everything that a seed and a few settings decide."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.config import Config, load

HEAD_DIM = 64
HASH_MODEL = f"hash:head_dim={HEAD_DIM},step_s=0.015,token_s=0.0004"
"""32 KiB a block, 1 MiB a prompt of 512 tokens; 0.2 s to compute it; 60 tokens take about a second."""


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    duration_s: float
    model: str = HASH_MODEL
    num_routers: int = 2
    num_prefill: int = 2
    num_decode: int = 3
    num_clients: int = 10
    lanes: int = 2
    """Faults at once."""
    use_namespaces: bool = True
    """Where they can be had."""
    faults: tuple[str, ...] = ()
    """Kinds to choose from; empty: all that work here."""
    deadline_s: float = 60.0
    """Of each request."""
    decode_entry: str = "baton.decode_node.server:serve"
    """What a decode worker runs; a test of the runner itself puts a broken one here."""

    @property
    def exact(self) -> bool:
        """The right answer is known without running anything."""
        return self.model.startswith("hash")

    @property
    def routers(self) -> tuple[str, ...]:
        return tuple(f"router-{i}" for i in range(self.num_routers))

    @property
    def prefills(self) -> tuple[str, ...]:
        return tuple(f"prefill-{i}" for i in range(self.num_prefill))

    @property
    def decodes(self) -> tuple[str, ...]:
        return tuple(f"decode-{i}" for i in range(self.num_decode))

    def config(self, address: str, http_port: int = 0, grpc_port: int = 0) -> Config:
        """Of a process on a host with this address."""
        blocks = 320 if self.exact else 160
        return load({}, [
            f'model.name="{self.model}"',
            'model.served_name="chaos"',
            f"engine.num_blocks={blocks}",
            'handoff.transports=["tcp"]',
            f"handoff.data_bind={address}",
            f"cluster.worker_host={address}",
            f"router.host={address}",
            f"router.http_port={http_port}",
            f"router.grpc_port={grpc_port}",
            "prefill.max_chunk_tokens=128",
        ])
