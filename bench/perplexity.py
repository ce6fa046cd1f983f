"""What the formats of weights and KV cost in quality: perplexity of a fixed text, beside that of bf16.

Every token of the text is a row of the decode kind, so that KV is read back in its format for each, as when serving.

    python -m baton.bench.perplexity --text docs/design.md --tokens 2048 --threads 2
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from baton.core.config import Config, EngineConfig, ModelConfig
from baton.core.errors import SetupError
from baton.core.request import SamplingParams
from baton.core.step import ScheduledChunk
from baton.engine.backend import choose_backend
from baton.engine.host_runner import HostRunner
from baton.kernels.host import library
from baton.models.catalog import open_model
from baton.models.convert import ModelFiles

FORMATS = (("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "int8"), ("int8", "bf16"), ("int8", "int8"), ("int4", "bf16"),
           ("int4", "int8"))
"""(weights, KV); the first is what the others are compared with."""
ROWS = 128
"""Of one step."""
SAMPLING = SamplingParams(temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=ModelConfig().name)
    parser.add_argument("--text", type=Path, required=True, help="A file of prose, longer than --tokens.")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default="auto")
    options = parser.parse_args()
    files = open_model(ModelConfig(name=options.model))
    if not isinstance(files, ModelFiles):
        raise SetupError(f"{options.model} has no weights to measure.")
    tokenizer = Tokenizer.from_file(str(files.directory / "tokenizer.json"))
    tokens = tokenizer.encode(options.text.read_text()).ids[: options.tokens]
    print(f"{files.name}, {len(tokens)} tokens of {options.text.name}\n")
    print("| weights | KV | perplexity | against the first |\n|---|---|---|---|")
    first = 0.0
    for weights, kv in FORMATS:
        chosen = {"quantization": weights, "kv_dtype": kv, "isa": options.isa, "threads": options.threads}
        engine = EngineConfig.model_validate({"backend": "host", **chosen})
        found = perplexity(files, engine, tokens)
        first = first or found
        print(f"| {weights} | {kv} | {found:.3f} | {found / first - 1:+.2%} |", flush=True)


def perplexity(files: ModelFiles, engine: EngineConfig, tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood of each token but the first."""
    block_size = Config().engine.block_size
    backend = choose_backend(engine, files.spec.head_dim)
    layout = files.spec.layout(block_size, backend.kv_dtype)
    blocks = tuple(range(layout.num_blocks_for(len(tokens))))
    memory = library.aligned(len(blocks) * layout.block_bytes)
    runner = HostRunner(files, memory.data, layout, engine.threads or 1, backend)
    loss = 0.0
    for begin in range(0, len(tokens) - 1, ROWS):
        positions = range(begin, min(begin + ROWS, len(tokens) - 1))
        logits = runner.logits([ScheduledChunk("", (tokens[i],), i, blocks, (0,), SAMPLING, 0) for i in positions])
        wide = logits.astype(np.float64)
        peak = wide.max(axis=1)
        total = peak + np.log(np.exp(wide - peak[:, None]).sum(axis=1))
        loss += float((total - wide[np.arange(len(positions)), tokens[begin + 1 : begin + 1 + len(positions)]]).sum())
    asyncio.run(runner.close())
    return float(np.exp(loss / (len(tokens) - 1)))


if __name__ == "__main__":
    main()
