"""What this machine can do at best, measured in the same run, and what follows from it for each row.

    python -m baton.bench.peers.limits --threads 2      one line of JSON

- read bandwidth: sums over memory in huge pages, once with one thread and once with all; of a model's weights in size,
  and larger. The fastest of some MB counts.
- GEMM peak: the best of torch's 4096 x 4096 x 4096 product and our own kernels', in bf16 and int8. int4 is multiplied
  as int8.

The roofline of a row is the time in which memory could be read once and everything multiplied at the peak, whichever is
longer: see `prefill_s`, `step_s` and `roofline`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from baton.bench.peers.rows import Row
from baton.models.packed import plan
from baton.models.spec import ModelSpec

WEIGHT_SIZED, LARGE = 256 << 20, 1 << 30
SECONDS = 1.0
"""Per figure."""
TORCH_SIZE = 4096
OWN_SHAPES = ((3072, 576), (4096, 4096))
"""(n, k); the first is what this model multiplies most."""
OWN_ROWS = 512
BLOCK_TOKENS = 16
"""A prefix hit leaves at least so many to compute."""


@dataclass(frozen=True, slots=True)
class Limits:
    read_1_gb_s: float
    """One thread."""
    read_gb_s: float
    """All of them."""
    gemm_gflop_s: Mapping[str, float]
    """By the format of the weights."""


def prefill_s(spec: ModelSpec, limits: Limits, form: str, num_tokens: int, cached_tokens: int = 0) -> float:
    """Every matrix but the LM head multiplies every token that is not cached, the head one; attention reads a triangle,
    in bf16. Weights and cached KV are read once."""
    new = num_tokens - cached_tokens
    linear = 2 * new * layer_weights(spec) + 2 * spec.vocab_size * spec.hidden_size
    pairs = (cached_tokens + 1 + num_tokens) * new / 2
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim * pairs
    gflops = limits.gemm_gflop_s
    computing = linear / (gflops[form] * 1e9) + attention / (gflops["bf16"] * 1e9)
    return max(computing, _reading_s(spec, limits, form, cached_tokens))


def step_s(spec: ModelSpec, limits: Limits, form: str, batch: int, context_tokens: float) -> float:
    """One decode step: weights once, and every sequence's KV."""
    computing = 2 * batch * (layer_weights(spec) + spec.vocab_size * spec.hidden_size) / (
        limits.gemm_gflop_s[form] * 1e9
    )
    return max(computing, _reading_s(spec, limits, form, batch * context_tokens))


def roofline(row: Row, spec: ModelSpec, limits: Limits, form: str) -> float | None:
    """In the row's unit. None for what no such limit bounds."""
    if row.again:
        return 1e3 * prefill_s(spec, limits, form, row.prompt_tokens, row.prompt_tokens - BLOCK_TOKENS)
    if not row.asks:
        return None
    prompt_s = prefill_s(spec, limits, form, row.prompt_tokens)
    if row.output_tokens == 1:
        return row.prompt_tokens / prompt_s
    decode_s = step_s(spec, limits, form, row.concurrency, row.prompt_tokens + row.output_tokens / 2)
    if row.concurrency == 1:
        return 1 / decode_s
    whole_s = row.concurrency * prompt_s + row.output_tokens * decode_s
    return row.concurrency * row.output_tokens / whole_s


def layer_weights(spec: ModelSpec) -> int:
    """Elements of the matrices between embedding and LM head."""
    head = "embed" if spec.tied_embeddings else "lm_head"
    return sum(matrix.n * matrix.k for name, matrix in plan(spec, "bf16").items() if name != head)


def weight_bytes(spec: ModelSpec, form: str) -> int:
    """Of all matrices, as Baton packs them."""
    return sum(matrix.num_bytes for matrix in plan(spec, form).values())


def kv_bytes_per_token(spec: ModelSpec) -> int:
    """In bf16 or fp16."""
    return spec.layout(1, "bf16").block_bytes


def _reading_s(spec: ModelSpec, limits: Limits, form: str, kv_tokens: float) -> float:
    return (weight_bytes(spec, form) + kv_tokens * kv_bytes_per_token(spec)) / (limits.read_gb_s * 1e9)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measured(threads: int) -> Limits:
    import torch

    from baton.bench.linear import read_bandwidth

    read = {}
    for number in (1, threads):
        torch.set_num_threads(number)
        read[number] = max(read_bandwidth(size, SECONDS, number) for size in (WEIGHT_SIZED, LARGE))
    peaks = {form: max(torch_peak(form), own_peak(form, threads)) for form in ("bf16", "int8")}
    return Limits(read[1], read[threads], {**peaks, "int4": peaks["int8"]})


def torch_peak(form: str) -> float:
    """GFLOP/s of a large square product, with as many threads as torch has been given."""
    import torch

    from baton.bench.linear import quick_s

    if form == "int8":
        x = torch.ones(TORCH_SIZE, TORCH_SIZE, dtype=torch.int8)
        took_s = quick_s(lambda w: torch._int_mm(x, w), [x.t().contiguous()], SECONDS)
    else:
        y = torch.ones(TORCH_SIZE, TORCH_SIZE, dtype=torch.bfloat16)
        took_s = quick_s(lambda w: torch.nn.functional.linear(y, w), [y.clone()], SECONDS)
    return 2 * math.pow(TORCH_SIZE, 3) / took_s * 1e-9


def own_peak(form: str, threads: int) -> float:
    import torch

    from baton.bench.linear import pack_copies, product_us
    from baton.kernels.host import library

    team, found = library.load().baton_team_new(threads, 20), []
    for n, k in OWN_SHAPES:
        weights = pack_copies(form, n, k, 1)
        took_us = product_us(library.isas()[0], team, torch.ones(OWN_ROWS, k), weights, SECONDS)
        found.append(2 * n * k * OWN_ROWS / took_us * 1e-3)
    library.load().baton_team_free(team)
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(asdict(measured(parser.parse_args().threads))))


if __name__ == "__main__":
    main()
