"""The whole stack on the real model, as processes, spoken to by clients that know nothing of Baton: the official
`openai` client, curl, and a gRPC client that has only reflection."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from baton.models.catalog import ModelFiles
from tests.cli.test_serve import READY, Serving, serving
from tests.e2e.test_tokens import prompts
from tests.router.test_grpc_front import Stranger

pytestmark = [pytest.mark.model, pytest.mark.slow]

MODEL = "smollm2-135m"
LONG = "Summarise this. " + "The runners hand over the baton inside the zone, and nobody may drop it. " * 12


@dataclass
class Stack:
    serving: Serving
    http: str
    grpc: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.http}/v1", api_key="none", timeout=120, max_retries=0)

    def chat(self, text: str, max_tokens: int = 24) -> str:
        messages = [{"role": "user", "content": text}]
        with self.client as client:
            reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=max_tokens, temperature=0)
        return str(reply.choices[0].message.content)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.http}/metrics", timeout=10).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


@pytest.fixture(scope="module")
def stack(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("stack")
    with serving(home, "--pool", "local", "--decode", "2", "--set", "engine.num_blocks=256") as running:
        said = running.read_until(READY)
        http = re.search(r"HTTP +(http://[\d.:]+)/v1", said)
        grpc = re.search(r"gRPC +([\d.:]+)", said)
        assert http, said
        assert grpc, said
        yield Stack(running, http[1], grpc[1])


def test_the_openai_client_chats_over_the_relay(stack: Stack) -> None:
    before = stack.metric('baton_dispatches_total{prefill="remote"}')
    messages = [{"role": "user", "content": LONG}]
    with stack.client as client:
        whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
        streamed = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=24, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        pieces = list(streamed)
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert whole.usage is not None
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert stack.metric('baton_dispatches_total{prefill="remote"}') > before


def test_curl_works_unchanged(stack: Stack) -> None:
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    out = subprocess.run(
        ["curl", "-sS", f"{stack.http}/v1/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "Paris" in json.loads(out.stdout)["choices"][0]["text"]


def test_a_client_with_nothing_but_reflection_generates(stack: Stack, model_files: ModelFiles) -> None:
    (prompt,) = prompts(model_files, (200,))

    async def run() -> list[int]:
        stranger = await asyncio.to_thread(Stranger, stack.grpc)
        try:
            options = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
            call = stranger.call("Generate", timeout=120.0, token_ids={"ids": prompt}, sampling=options)
            return [token async for reply in call for token in reply.token_ids]
        finally:
            await stranger.close()

    assert len(asyncio.run(run())) == 8


def test_many_at_once_get_what_each_gets_alone(stack: Stack) -> None:
    questions = [f"Question {i}: name {i + 2} things that runners carry. {LONG[: 40 * i]}" for i in range(8)]
    alone = [stack.chat(q) for q in questions]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(stack.chat, questions))
    assert together == alone


def test_bad_input_hurts_nobody_else(stack: Stack) -> None:
    with ThreadPoolExecutor(2) as threads:
        good = threads.submit(stack.chat, LONG, 40)
        for body in (b"{", b"\xff\xfe", b'{"model": "smollm2-135m", "messages": [], "temperature": NaN}', b"[]", b""):
            reply = httpx.post(f"{stack.http}/v1/chat/completions", content=body, timeout=30)
            assert 400 <= reply.status_code < 500
            assert reply.json()["error"]["message"]
        assert good.result() == stack.chat(LONG, 40)


def test_a_decode_worker_killed_in_mid_stream_loses_and_repeats_no_token(stack: Stack) -> None:
    """Its pool brings it back; the other decode worker replays what the client has and goes on."""
    question, tokens = "Tell a long story about a relay race. " + LONG, 60
    expected = stack.chat(question, tokens)
    with stack.client as client:
        messages = [{"role": "user", "content": question}]
        options = {"model": MODEL, "max_tokens": tokens, "temperature": 0, "stream": True}
        pieces = []
        for number, piece in enumerate(client.chat.completions.create(messages=messages, **options)):  # type: ignore[call-overload]
            pieces.append(piece.choices[0].delta.content or "")
            if number == 5:
                busy_decode_worker(stack).kill()
    assert "".join(pieces) == expected
    assert stack.metric("baton_dispatch_retries_total") > 0


def busy_decode_worker(stack: Stack) -> psutil.Process:
    """The decode worker that has a request, found as an operator would: `baton status`, then who holds its port."""
    command = [sys.executable, "-m", "baton.cli.main", "status", "--json", "--router", stack.grpc]
    status = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    busy = [w for w in json.loads(status.stdout)["workers"] if w["info"]["role"] == "DECODE" and int(w["inFlight"])]
    assert len(busy) == 1, status.stdout
    port = int(busy[0]["info"]["address"].rpartition(":")[2])
    listening = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr[1] == port and c.status == "LISTEN"]
    assert listening[0].pid is not None
    return psutil.Process(listening[0].pid)
