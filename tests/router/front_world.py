"""What the front's tests stand on: a small real tokenizer with a chat template, a token source that echoes, and the
HTTP and gRPC servers on free ports over them. Only the workers are missing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from baton.cluster.rates import MemoryBuckets
from baton.core.config import load
from baton.core.errors import BatonError, Overloaded
from baton.core.messages import TokenChunk, WorkerStatus
from baton.core.metrics import Metrics
from baton.core.request import FinishReason, Request, TokenLogprob
from baton.core.worker import WorkerInfo
from baton.router.exposition import Told
from baton.router.generation import Generation, Unknown
from baton.router.http import Front, create_app
from baton.router.limits import RateLimits
from baton.router.listen import HttpServer
from baton.router.text import TextCodec
from baton.router.until import Stopping

MODEL = "echo"
MAX_MODEL_LEN = 256
CONTROL = ("<|im_start|>", "<|im_end|>")
EOS = 1
TEMPLATE = r"""{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PROSE = [
    "The baton is the KV cache and nobody ever drops it.",
    "Tokens are cheap, blocks are dear; text is for people.",
    "héllo wörld, 你好, こんにちは, 🙂 and 👩‍👩‍👧",
    "0123456789 def f(x): return {'a': [x]}\n\n\tdone",
]


@functools.cache
def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in CONTROL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE * 3, trainer)
    return tokenizer.to_str()


def make_model(directory: Path, template: str | None = TEMPLATE) -> Path:
    """A converted model's three text files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json())
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    vocab_size = Tokenizer.from_str(tokenizer_json()).get_vocab_size()
    (directory / "config.json").write_text(
        json.dumps(
            {
                "name": MODEL,
                "fingerprint": "0" * 32,
                "vocab_size": vocab_size,
                "max_model_len": MAX_MODEL_LEN,
                "eos_token_ids": [EOS],
                "bos_token_id": None,
            }
        )
    )
    return directory


def make_codec(directory: Path, template: str | None = TEMPLATE) -> TextCodec:
    return TextCodec(make_model(directory, template), lambda: datetime(2026, 11, 21, 12, 0))


def scored(token_id: int, count: int) -> TokenLogprob:
    """What the source says of a token: a function of its id, so that a test can say it again. One of the others has
    no probability at all."""
    others = [(token_id + 1, -1.5), (token_id + 2, float("-inf"))] + [(i, -20.0 - i) for i in range(20)]
    return TokenLogprob(-token_id / 64, ((token_id, -token_id / 64), *others)[:count])


@dataclass
class EchoDispatcher:
    """A token source. Each choice's output is its script, else the request's prompt, then the end token; stop tokens
    end it as they would on a worker. Choices take turns."""

    script: tuple[int, ...] | None = None
    scripts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """By choice."""
    chunk_tokens: int = 1
    fail_after: int | None = None
    """Raise `error` once this many tokens of a choice are out."""
    error: BatonError | None = None
    full: Overloaded | None = None
    """Raise this before a prompt is read."""
    hang_after: int | None = None
    """Stay silent for ever once this many tokens of a choice are out."""
    requests: list[Request] = field(default_factory=list)
    confirms: bool = True
    """Of what is said to have begun: a worker works on it."""
    last_seen: list[str | None] = field(default_factory=list)
    """Of each request, where it is said to have run."""
    cancelled: dict[str, asyncio.Event] = field(default_factory=dict)

    def check_early(self, request_id: str, tenant: str, deadline_s: float) -> None:
        if self.full is not None:
            raise self.full

    def max_model_len(self) -> int:
        return MAX_MODEL_LEN

    def whereabouts(self, request_id: str) -> str:
        return "worker/0" if request_id in self.cancelled else ""

    async def generate(self, request: Request, last_seen: str | None = None, unknown: Unknown | None = None
                       ) -> AsyncGenerator[TokenChunk, None]:
        """Says everything from the start, as a source does that knows nothing of what was before."""
        self.requests.append(request)
        self.last_seen.append(last_seen)
        if last_seen is not None and unknown is not None and not self.confirms:
            await unknown()
        left = self.cancelled.setdefault(request.request_id, asyncio.Event())
        turns = itertools.zip_longest(*(self._chunks(request, choice.index) for choice in request.choices))
        try:
            for chunk in filter(None, itertools.chain.from_iterable(turns)):
                if self.fail_after is not None and chunk.first_index >= self.fail_after:
                    assert self.error is not None
                    raise self.error
                if self.hang_after is not None and chunk.first_index >= self.hang_after:
                    await asyncio.Event().wait()
                yield chunk
                await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            left.set()
            raise

    def _chunks(self, request: Request, choice: int) -> Iterator[TokenChunk]:
        script = self.scripts.get(choice, self.script)
        output = list(script if script is not None else request.prompt)
        finish = FinishReason.LENGTH if len(output) >= request.sampling.max_tokens else FinishReason.STOP
        output = [*output, EOS][: request.sampling.max_tokens]
        ends = [at for at, token_id in enumerate(output) if token_id in request.sampling.stop_token_ids]
        if ends:
            output, finish = output[: ends[0] + 1], FinishReason.STOP
        count = request.sampling.logprobs
        for start in range(0, len(output), self.chunk_tokens):
            ids = tuple(output[start : start + self.chunk_tokens])
            yield TokenChunk(
                request.request_id,
                1,
                start,
                ids,
                finish if start + len(ids) == len(output) else None,
                choice,
                () if count is None else tuple(scored(token_id, count) for token_id in ids),
                cached_tokens=len(request.prompt) // 2,
            )


@dataclass
class FrontWorld:
    url: str
    generation: Generation
    source: EchoDispatcher
    metrics: Metrics
    stopping: Stopping
    not_ready: list[str]
    told: list[tuple[WorkerInfo, WorkerStatus | None]]


@contextlib.asynccontextmanager
async def open_front(
    directory: Path, source: EchoDispatcher | None = None, *overrides: str, template: str | None = TEMPLATE
) -> AsyncIterator[FrontWorld]:
    source, metrics, stopping = source or EchoDispatcher(), Metrics(), Stopping()
    config = load({}, overrides).router
    limits = RateLimits(config.tenants, MemoryBuckets(asyncio.get_running_loop().time), metrics)
    generation = Generation(make_codec(directory, template), source, config, metrics, MODEL, limits)
    not_ready: list[str] = []

    async def statuses() -> Told:
        return tuple(told)

    told: list[tuple[WorkerInfo, WorkerStatus | None]] = []
    front = Front(generation, config, lambda: not_ready[0] if not_ready else None, lambda: 1_790_000_000.0, stopping,
                  statuses)
    server = await HttpServer.start(create_app(front), "127.0.0.1", 0, 2)
    try:
        yield FrontWorld(f"http://127.0.0.1:{server.port}", generation, source, metrics, stopping, not_ready, told)
    finally:
        await server.stop()
