"""`baton drain` and SIGTERM on a real stack under load: what runs on the worker goes on elsewhere, and nobody notices.
The hash model's tokens depend on every byte of KV, so that equal texts mean that all of it arrived."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from baton.cli.status import fleet_status
from baton.wire.admin_pb2 import READY as READY_STATE
from baton.wire.worker_pb2 import DECODE
from tests.cli.conftest import Baton
from tests.cli.test_serve import READY, TIMEOUT_S, Serving, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]
MODEL = "hash:step_s=0.03"
CLIENTS, TOKENS = 4, 400


class Stack:
    def __init__(self, process: Serving, said: str, baton: Baton) -> None:
        self.url = re.findall(r"HTTP +(http://\S+)/v1", said)[0]
        self.grpc = re.findall(r"gRPC +(\S+)", said)[0]
        self.pids = {name: int(pid) for name, pid in re.findall(r"(\S+-\d) \(pid (\d+)\)", said)}
        self._baton = baton

    def baton(self, *arguments: str) -> tuple[int, str]:
        done = self._baton(*arguments, "--router", self.grpc)
        return done.returncode, done.stdout

    def count(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def busiest(self) -> str:
        workers = asyncio.run(fleet_status(self.grpc, 60)).workers
        decode = [w for w in workers if w.info.role == DECODE and w.state == READY_STATE]
        return str(max(decode, key=lambda w: w.in_flight).info.worker_id)

    def answers(self, disturb: Callable[[], None] | None = None) -> list[str]:
        """Of all clients, streamed; `disturb` runs when each has its first token."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            begun = [os.pipe() for _ in range(CLIENTS)]
            running = [pool.submit(self._answer, i, begun[i][1]) for i in range(CLIENTS)]
            for reader, _ in begun:
                os.read(reader, 1)
            if disturb is not None:
                disturb()
            found = [future.result() for future in running]
        for pair in begun:
            for fd in pair:
                os.close(fd)
        return found

    def _answer(self, number: int, begun: int) -> str:
        body = {"model": MODEL, "prompt": f"Client {number} says: " * 6, "max_tokens": TOKENS, "seed": number,
                "ignore_eos": True, "stream": True, "n": 1 + number % 2}  # fmt: skip
        texts: dict[int, str] = {}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:  # an error event has none
                        if not texts:
                            os.write(begun, b"!")
                        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        return json.dumps(texts, sort_keys=True)


def test_a_drain_and_a_sigterm_under_load_change_no_answer(tmp_path: Path, baton: Baton) -> None:
    options = ("--pool", "local", "--decode", "2", "--set", f"model.name={MODEL}", "--set", "engine.num_blocks=512",
               "--set", f"model.cache_dir={tmp_path / 'cache'}")  # fmt: skip
    with serving(tmp_path, *options) as process:
        stack = Stack(process, process.read_until(READY), baton)
        undisturbed = stack.answers()
        drained: list[str] = []

        def drain() -> None:
            drained.append(stack.busiest())
            code, said = stack.baton("drain", drained[0])
            assert (code, said.splitlines()[-1].partition(":")[0]) == (0, f"{drained[0]} is empty")
            assert re.search(r"is draining: [1-9]\d* requests?", said), "it landed in the middle of work"

        assert stack.answers(drain) == undisturbed
        moved = stack.count('baton_moves_total{end="moved"}')
        assert moved >= 1
        assert stack.baton("drain", drained[0], "--undo") == (0, f"{drained[0]} takes requests again.\n")

        def terminate() -> None:
            victim = stack.busiest()
            os.kill(stack.pids[victim], signal.SIGTERM)
            psutil.Process(stack.pids[victim]).wait(TIMEOUT_S)

        assert stack.answers(terminate) == undisturbed
        assert stack.count('baton_moves_total{end="moved"}') > moved
        assert stack.count("baton_fallbacks_total") == 0
        code, _, err = process.end(signal.SIGINT)
        assert code == 0, err
