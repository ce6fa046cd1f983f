"""SmolLM2-135M against transformers, both from the same GGUF file, fp32: logits, greedy tokens, tokenizer."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from baton.core.config import ModelConfig
from baton.core.request import SamplingParams
from baton.core.step import Step
from baton.models.catalog import resolve
from baton.models.convert import ModelFiles
from baton.models.spec import ModelSpec
from tests.models.reference import (
    chunk,
    every_logit,
    executed,
    generate,
    open_runner,
    shuffled_tables,
    transformers_logits,
)

pytestmark = pytest.mark.model

NUM_TOKENS = 64
MAX_LOGIT_ERROR = 5e-4
"""Stated bound; logits are up to 40."""

TOPICS = (
    "The capital of France is", "Once upon a time there was a small robot who", "def fibonacci(n):",
    "Water boils at", "My favourite recipe begins with", "In 1969, the first", "The three laws of motion are",
    "import numpy as np\n", "Dear Sir or Madam,", "The opposite of hot is", "A relay race is", "1, 2, 3, 4,",
    "Photosynthesis is the process by which", "To be, or not to be,", "The largest planet in", "SELECT name FROM",
    "She opened the door and", "The recipe needs 250 g of flour, 3 eggs and", "Roses are red,", "¿Dónde está la",
)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """20 prompts of 2 to some 130 tokens: every other one is a topic repeated in a chat's words."""
    chat = "<|im_start|>user\n{} ... go on for {} more lines.{}<|im_end|>\n<|im_start|>assistant\n"
    texts = [topic if i % 2 else chat.format(topic, i, " Please." * 3 * i) for i, topic in enumerate(TOPICS)]
    return [tokenizer.encode(text).ids for text in texts]


def test_the_spec_is_the_published_models(model_files: ModelFiles) -> None:
    assert model_files.spec == ModelSpec(
        architecture="llama", num_layers=30, hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3,
        head_dim=64, vocab_size=49_152, max_model_len=8192, rope_theta=100_000.0, rms_norm_eps=1e-5,
        tied_embeddings=True, eos_token_ids=(2,))
    assert model_files.name == "smollm2-135m"


@pytest.mark.slow
def test_logits_equal_transformers_at_every_position(
    model_dir: Path, hf_model: Any, prompts: list[list[int]], record_property: Any
) -> None:
    tokens = max(prompts, key=len)
    expected = transformers_logits(hf_model, tokens)
    with open_runner(model_dir, 16) as runner:
        ours = every_logit(runner, tokens, shuffled_tables([len(tokens)], 16)[0])
    error = float((ours - expected).abs().max())
    record_property("max_abs_error", error)
    print(f"\nmax abs error of {ours.numel():,} logits up to {float(expected.abs().max()):.1f}: {error:.2e}")
    assert error < MAX_LOGIT_ERROR


@pytest.mark.slow
def test_64_greedy_tokens_of_20_prompts_equal_transformers(
    model_dir: Path, hf_model: Any, prompts: list[list[int]]
) -> None:
    """Ours are generated together, in chunks, through shuffled tables. Theirs need one pass: greedy decoding chose
    token i if it is the largest after everything before it, so each prompt with our output shows all 64 choices."""
    assert len(prompts) == 20
    lengths = [len(prompt) + NUM_TOKENS for prompt in prompts]
    num_blocks = sum(-(-n // 16) for n in lengths)
    with open_runner(model_dir, num_blocks) as runner:
        ours = generate(runner, prompts, NUM_TOKENS, shuffled_tables(lengths, num_blocks), chunk_tokens=48)
    for prompt, output in zip(prompts, ours, strict=True):
        expected = transformers_logits(hf_model, [*prompt, *output])[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert output == expected, prompt


@pytest.mark.slow
def test_logprobs_equal_transformers(model_dir: Path, hf_model: Any, prompts: list[list[int]]) -> None:
    """Of the token chosen after each prefix of a prompt, and of the five likeliest."""
    tokens = max(prompts, key=len)
    expected = torch.log_softmax(transformers_logits(hf_model, tokens).double(), -1)
    sampling = SamplingParams(seed=1, repetition_penalty=1.2, logprobs=5)
    table = shuffled_tables([len(tokens)], 16)[0]
    chunks = tuple(
        dataclasses.replace(chunk([t], i, table, sampling), history=tuple(tokens[: i + 1]), num_prompt_tokens=i + 1)
        for i, t in enumerate(tokens))
    with open_runner(model_dir, 16) as runner:
        result = executed(runner, Step(1, chunks))
    for row, (token,) in zip(expected, result.tokens, strict=True):
        assert token.logprob is not None
        assert abs(token.logprob.logprob - float(row[token.token_id])) < MAX_LOGIT_ERROR
        top = [x for _, x in token.logprob.top]
        torch.testing.assert_close(torch.tensor(top).double(), row.topk(5).values, atol=MAX_LOGIT_ERROR, rtol=0)
        assert all(abs(x - float(row[t])) < MAX_LOGIT_ERROR for t, x in token.logprob.top)


TEXTS = (
    "The capital of France is", "2024 was 365.25 days; 007!", "  indented\n\n\ttabs\r\n", "naïve café — ‘quotes’",
    "你好，世界 🙂👩‍👩‍👧", "<|im_start|>user\nhi 1234<|im_end|>\n", "x" * 500, "don't we'll I'VE", "a<|im_end|>b", "",
    "\u0000\u007f\u200b\ufeff",
)


@pytest.mark.slow
def test_the_rebuilt_tokenizer_equals_transformers(tokenizer: Tokenizer) -> None:
    path = resolve(ModelConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text)["input_ids"], text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_first_sentence_everybody_tries(model_dir: Path, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("The capital of France is").ids
    assert prompt == [504, 3575, 282, 4649, 314]
    with open_runner(model_dir, 2) as runner:
        assert tokenizer.decode(generate(runner, [prompt], 2, [(1, 0)])[0]) == " Paris."


@pytest.mark.slow
def test_a_prompt_of_1500_tokens_in_chunks_gives_the_logits_of_one_shot(model_dir: Path, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(" ".join(TOPICS) * 20).ids[:1500]
    blocks = shuffled_tables([1500], 94)[0]
    logits = []
    for size in (1500, 512):
        with open_runner(model_dir, 94) as runner:
            for start in range(0, 1500, size):
                piece = tokens[start : start + size]
                last = runner.logits((chunk(piece, start, blocks, samples=start + size >= 1500),))
            assert last is not None
            logits.append(last)
    torch.testing.assert_close(logits[0], logits[1], atol=2e-4, rtol=1e-4)
