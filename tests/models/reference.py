"""The other side of comparisons: tiny checkpoints on disk, transformers' answers, and a bare driver of the runner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from baton.core.request import SamplingParams
from baton.core.step import Runner, ScheduledChunk, Step, StepResult
from baton.engine.torch_runner import TorchRunner
from baton.models.convert import open_converted

GREEDY = SamplingParams(temperature=0.0)
BLOCK_SIZE = 16


@dataclass(frozen=True)
class TinyLlama:
    """Sizes of a random model. Everything that may be equal by accident is not."""

    num_kv_heads: int = 2
    tied: bool = False
    head_dim: int | None = 8
    seed: int = 0
    shards: int = 1
    hidden_size: int = 24
    intermediate_size: int = 40


def write_tiny_llama(directory: Path, tiny: TinyLlama) -> Any:
    """Write a Hugging Face directory; returns transformers' model of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, while it imports
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(tiny.seed)
        config = LlamaConfig(
            vocab_size=64, hidden_size=tiny.hidden_size, intermediate_size=tiny.intermediate_size,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=tiny.num_kv_heads,
            head_dim=tiny.head_dim, max_position_embeddings=256, rope_theta=5000.0, rms_norm_eps=1e-5,
            tie_word_embeddings=tiny.tied, bos_token_id=1, eos_token_id=2,
            initializer_range=0.3)
        model = LlamaForCausalLM(config).eval()
        for name, weight in model.named_parameters():  # norm weights of 1 would hide that they are applied
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        size = sum(p.numel() * 4 for p in model.parameters()) // tiny.shards + 1
        model.save_pretrained(directory, max_shard_size=size if tiny.shards > 1 else "1GB")
    words = {f"t{i}": i for i in range(64)}
    Tokenizer(WordLevel(words, unk_token="t0")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    return model


def transformers_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """[num_tokens, vocab_size]: what follows each prefix of `tokens`."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


@contextlib.contextmanager
def open_runner(model_dir: Path, num_blocks: int, block_size: int = BLOCK_SIZE) -> Iterator[TorchRunner]:
    """A runner over memory full of numbers that would be seen if they were used."""
    layout = open_converted(model_dir).spec.layout(block_size)
    memory = bytearray(num_blocks * layout.block_bytes)
    torch.frombuffer(memory, dtype=torch.float32).fill_(1e4)
    runner = TorchRunner(model_dir, memoryview(memory), num_blocks, layout, threads=1)
    try:
        yield runner
    finally:
        asyncio.run(runner.close())


def shuffled_tables(lengths: Sequence[int], num_blocks: int, block_size: int = BLOCK_SIZE) -> list[tuple[int, ...]]:
    """A block table for each sequence of so many tokens, from all over the pool."""
    free = random.Random(7).sample(range(num_blocks), num_blocks)
    return [tuple(free.pop() for _ in range(-(-n // block_size))) for n in lengths]


def chunk(
    tokens: Sequence[int], start: int, blocks: tuple[int, ...], sampling: SamplingParams = GREEDY, seed: int = 0,
    samples: bool = True,
) -> ScheduledChunk:
    return ScheduledChunk(f"r{blocks}", tuple(tokens), start, blocks, (0,) if samples else (), sampling, seed)


def executed(runner: Runner, step: Step) -> StepResult:
    async def run() -> StepResult:
        return await runner.execute(step)

    return asyncio.run(run())


def every_logit(runner: TorchRunner, tokens: Sequence[int], blocks: tuple[int, ...]) -> Tensor:
    """[num_tokens, vocab_size]: each token is a chunk of its own, all in one step, so that all rows are sampled."""
    logits = runner.logits(tuple(chunk([t], i, blocks) for i, t in enumerate(tokens)))
    assert logits is not None
    return logits


def generate(
    runner: Runner, prompts: Sequence[Sequence[int]], num_tokens: int, tables: Sequence[tuple[int, ...]],
    chunk_tokens: int = 512,
) -> list[list[int]]:
    """Greedy tokens of each prompt: prefilled alone in chunks, then decoded together."""

    async def run() -> list[list[int]]:
        outputs = []
        for prompt, blocks in zip(prompts, tables, strict=True):
            for start in range(0, len(prompt), chunk_tokens):
                piece = prompt[start : start + chunk_tokens]
                last = start + len(piece) == len(prompt)
                result = await runner.execute(Step(0, (chunk(piece, start, blocks, samples=last),)))
            outputs.append([token.token_id for token in result.tokens[0]])
        for _ in range(num_tokens - 1):
            chunks = tuple(
                chunk(out[-1:], len(prompt) + len(out) - 1, blocks)
                for prompt, out, blocks in zip(prompts, outputs, tables, strict=True))
            for out, (token,) in zip(outputs, (await runner.execute(Step(0, chunks))).tokens, strict=True):
                out.append(token.token_id)
        return outputs

    return asyncio.run(run())
