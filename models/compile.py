"""A ModelSpec compiled to the list of operations that a runner executes, one after the other, for each step.

The list is all a runner knows of a model: a new architecture is new data here, not a new class there. Operations work
on two registers: `hidden` (the residual stream) and `x` (what the last operation produced).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from baton.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Embed:
    """hidden = weight[token ids]."""

    weight: str


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """x = rms_norm(hidden) * weight."""

    weight: str
    eps: float


@dataclass(frozen=True, slots=True)
class Linear:
    """x = x @ weight.T."""

    weight: str


@dataclass(frozen=True, slots=True)
class RopeAndWriteKV:
    """x is [q | k | v]: rotate q and k, store k and v of `layer` in the pool, leave x = q. Layer `layer` of this
    step's tokens is now in the pool: a lender may publish it."""

    layer: int
    theta: float


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """x = attention of x over the context of each row's sequence, K and V read from the pool."""

    layer: int


@dataclass(frozen=True, slots=True)
class KeepSampledRows:
    """Drop from x and hidden every row that no token is sampled from. Nothing left: the step ends here."""


@dataclass(frozen=True, slots=True)
class LinearResidual:
    """hidden = hidden + x @ weight.T."""

    weight: str


@dataclass(frozen=True, slots=True)
class SwiGLU:
    """x is [gate | up]: x = silu(gate) * up."""


@dataclass(frozen=True, slots=True)
class LMHead:
    """x = logits of x, [num_sampled_rows, vocab_size]."""

    weight: str


Op: TypeAlias = (
    Embed | RMSNorm | Linear | RopeAndWriteKV | PagedAttention | KeepSampledRows | LinearResidual | SwiGLU | LMHead
)


def compile_spec(spec: ModelSpec) -> tuple[Op, ...]:
    """The op list of a Llama decoder. Rows that are not sampled leave after the last layer's attention: nobody
    reads what the rest would make of them."""
    ops: list[Op] = [Embed("embed")]
    for layer in range(spec.num_layers):
        name = f"layers.{layer}"
        ops += [
            RMSNorm(f"{name}.attn_norm", spec.rms_norm_eps),
            Linear(f"{name}.qkv"),
            RopeAndWriteKV(layer, spec.rope_theta),
            PagedAttention(layer),
        ]
        if layer == spec.num_layers - 1:
            ops.append(KeepSampledRows())
        ops += [
            LinearResidual(f"{name}.o"),
            RMSNorm(f"{name}.mlp_norm", spec.rms_norm_eps),
            Linear(f"{name}.gate_up"),
            SwiGLU(),
            LinearResidual(f"{name}.down"),
        ]
    ops += [RMSNorm("norm", spec.rms_norm_eps), LMHead("embed" if spec.tied_embeddings else "lm_head")]
    return tuple(ops)
