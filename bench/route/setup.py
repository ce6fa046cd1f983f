"""What a trace is replayed on: the machines' figures, and the production configuration that goes with them.

Two modes. In `fcfs` a prefill worker computes one prompt after the other, whole, and everything else is free: the world
of the published routing simulations, which a policy's hit rate and TTFT can be compared with. In `production` prompts
are computed in chunks, KV moves over a wire, and answers are decoded.

A token of the simulated world stands for `grain` tokens of the trace, its blocks for 512 of them, its decode step for
`grain` steps: durations stay what they are, and a replay takes a fraction of the memory and time. Blocks of a trace are
512 tokens, so that no prefix becomes longer or shorter by it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from baton.bench.load.traces import BLOCK_TOKENS
from baton.core.config import Config, PolicyName, load
from baton.core.layout import KVLayout
from baton.core.step import Step
from baton.core.worker import Role
from baton.sim.network import Conditions
from baton.sim.transport import WireSpeed

Mode = Literal["fcfs", "production"]
MODES: tuple[Mode, ...] = get_args(Mode)

PREFILL_TOKENS_PER_S = 20_000.0
"""Of one prefill worker. `load` is the offered prompt tokens over what all of them compute."""
REQUEST_S = 0.010
"""What a prompt costs beside its tokens, in fcfs."""
STEP_S = 0.006
"""A step's fixed part in production: weights read once, and launches. 8 B weights in bf16 over 4.8 TB/s are 3.4 ms."""
CONTEXT_TOKEN_S = 30e-9
"""To read a token's KV in a step: 128 KiB over 4.8 TB/s, less a little."""
WIRE_BYTES_PER_S = 25e9
CHUNK_TOKENS, DECODE_CHUNK_TOKENS = 8192, 2048
"""In production: most tokens of one step."""
LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""An 8 B model's: 128 KiB of KV for a token in bf16."""
SEEN_BYTES = 16
"""Of a block's KV, what the simulation holds and moves."""
FCFS_DECODE_POOLS = 8
"""A decode worker's blocks in fcfs, for each of a prefill worker."""
FOREVER_S = 80_000.0
"""For time-outs that a queue of minutes must not reach."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a step, in tokens of the simulated world."""

    step_s: float
    prompt_s: float
    """Once for each prompt, in the step that ends it."""
    token_s: float
    context_token_s: float

    def of(self, step: Step) -> float:
        prompts = sum(bool(c.choices) for c in step.chunks) if self.prompt_s else 0
        context = sum(c.end for c in step.chunks)
        return (
            self.step_s + prompts * self.prompt_s + step.num_tokens * self.token_s + context * self.context_token_s
        )


@dataclass(frozen=True, slots=True)
class Setup:
    mode: Mode = "fcfs"
    policy: PolicyName = "cost"
    num_prefill: int = 4
    num_decode: int = 2
    num_routers: int = 1
    num_blocks: int = 2000
    """Of a worker, each 512 tokens of the trace."""
    grain: int = 16
    seed: int = 1
    settings: tuple[str, ...] = ()
    """Overrides of the configuration, as `--set` has them."""
    pace: float = 1.0
    """So many seconds of the trace pass in one of the replay."""
    wire_bytes_per_s: float = WIRE_BYTES_PER_S

    @property
    def block_tokens(self) -> int:
        return BLOCK_TOKENS // self.grain

    @property
    def layout(self) -> KVLayout:
        return KVLayout(LAYERS, KV_HEADS, HEAD_DIM * self.grain, self.block_tokens, "bf16")

    @property
    def speed(self) -> WireSpeed:
        """Only `SEEN_BYTES` of a block move, in the time that the whole one would take."""
        if self.mode == "fcfs":
            return WireSpeed(bytes_per_s=1e15, latency_s=1e-7)
        return WireSpeed(self.wire_bytes_per_s * self.pace * SEEN_BYTES / self.layout.block_bytes, latency_s=50e-6)

    @property
    def conditions(self) -> Conditions:
        delay_s = 1e-7 if self.mode == "fcfs" else 100e-6
        return Conditions(delay_s=delay_s, jitter_s=delay_s, loss=0.0)

    def costs(self, role: Role) -> Costs:
        token_s = self.grain / PREFILL_TOKENS_PER_S
        if self.mode == "fcfs":
            costs = Costs(0.0, REQUEST_S, token_s, 0.0) if role is Role.PREFILL else Costs(1e-6, 0.0, 0.0, 0.0)
        elif role is Role.PREFILL:
            costs = Costs(STEP_S, 0.0, token_s, CONTEXT_TOKEN_S * self.grain)
        else:
            costs = Costs(STEP_S * self.grain, 0.0, token_s, CONTEXT_TOKEN_S * self.grain**2)
        return Costs(*(seconds / self.pace for seconds in dataclasses.astuple(costs)))

    def config(self) -> Config:
        common = [
            f"router.policy={self.policy}", "router.max_inflight=1000000", "router.max_queued=1000000",
            f"router.max_queue_wait_s={FOREVER_S}", f"router.request_timeout_s={FOREVER_S}",
            f"router.assumed_prefill_tokens_per_s={PREFILL_TOKENS_PER_S * self.pace / self.grain}",
            f"router.assumed_bandwidth_bytes_per_s={self.wire_bytes_per_s * self.pace}",
            "prefill.max_waiting=1000000", "decode.max_waiting=1000000", f"handoff.lease_ttl_s={FOREVER_S}",
            f"handoff.peer_timeout_s={FOREVER_S}", f"handoff.stall_timeout_s={FOREVER_S}",
            "handoff.alive_interval_s=3600", "cluster.drain_timeout_s=0.1",
        ]
        own = self._fcfs() if self.mode == "fcfs" else self._production()
        return load({}, [*common, *own, *self.settings])

    def _fcfs(self) -> list[str]:
        """One prompt at a time; nothing is fetched, and nothing computed where it decodes. Chunks are only there so
        that a worker reports what is left of a prompt while it computes it."""
        return [
            "prefill.max_sequences=1", f"prefill.max_step_tokens={CHUNK_TOKENS // 4 // self.grain}",
            f"prefill.max_chunk_tokens={CHUNK_TOKENS // 4 // self.grain}", "decode.max_sequences=1000000",
            "router.local_prefill_max_tokens=0", "router.fetch_min_tokens=1000000000",
            f"router.worker_queue_s={FOREVER_S}",  # each is bound to a worker when it comes
        ]

    def _production(self) -> list[str]:
        chunk, decode_chunk = CHUNK_TOKENS // self.grain, DECODE_CHUNK_TOKENS // self.grain
        return [
            f"prefill.max_step_tokens={chunk}", f"prefill.max_chunk_tokens={chunk}", "prefill.max_sequences=64",
            f"decode.max_step_tokens={decode_chunk + 256}", f"decode.max_chunk_tokens={decode_chunk}",
            "decode.max_sequences=256", f"router.local_prefill_max_tokens={512 // self.grain}",
            f"router.fetch_min_tokens={2048 // self.grain}",
        ]

    def num_blocks_of(self, role: Role) -> int:
        """In fcfs, decode workers are only there to be handed to: they promise room for the whole queue."""
        return FCFS_DECODE_POOLS * self.num_blocks if role is Role.DECODE and self.mode == "fcfs" else self.num_blocks
