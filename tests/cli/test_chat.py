"""`baton chat` against a server that speaks OpenAI's protocol and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

Baton = Callable[..., subprocess.CompletedProcess[str]]


class Echo(BaseHTTPRequestHandler):
    """Answers each word of the last message as an event. `fail`: an error body; `break`: an error inside the stream;
    `forever`: words until the client hangs up."""

    server: Server

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        self._send(200 if known else 404, {"data": [{"id": "echo-1"}]} if known else {"detail": "no such page"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        text = body["messages"][-1]["content"]
        if text == "fail":
            self._send(400, {"error": {"message": "the prompt is too sad.", "type": "invalid_request_error"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._stream(text)
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()

    def _stream(self, text: str) -> None:
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        while text == "forever" and not self.server.over.wait(0.01):
            self._event({"choices": [{"delta": {"content": "more "}, "finish_reason": None}]})
        for word in text.split():
            self._event({"choices": [{"delta": {"content": f"{word}! "}, "finish_reason": None}]})
        if text == "break":
            self._event({"error": {"message": "decode-0 is gone."}})
            return
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": {"completion_tokens": 1}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps({"id": "chatcmpl-1", **event}).encode() + b"\n\n")

    def _send(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Echo)
        self.bodies: list[dict[str, Any]] = []
        self.hung_up, self.over = threading.Event(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()


def messages(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in body["messages"]]


def test_a_conversation_carries_its_turns_and_answers_go_to_standard_output(server: Server, baton: Baton) -> None:
    done = baton("chat", "--url", server.url, "--system", "Be brief.", stdin="hello you\nand now\n/quit\nnever\n")
    assert (done.returncode, done.stdout) == (0, "hello! you! \nand! now! \n")
    assert [messages(b) for b in server.bodies] == [
        [("system", "Be brief."), ("user", "hello you")],
        [("system", "Be brief."), ("user", "hello you"), ("assistant", "hello! you! "), ("user", "and now")],
    ]
    assert server.bodies[0]["model"] == "echo-1"
    assert server.bodies[0]["stream"] is True


def test_new_forgets_the_conversation_but_not_the_system_prompt(server: Server, baton: Baton) -> None:
    baton("chat", "--url", server.url, "--system", "Be brief.", stdin="one\n/new\n\ntwo\n")
    assert messages(server.bodies[1]) == [("system", "Be brief."), ("user", "two")]


@pytest.mark.parametrize(("asked", "said"), [("fail", "the prompt is too sad."), ("break", "decode-0 is gone.")])
def test_an_error_is_said_and_the_conversation_goes_on(asked: str, said: str, server: Server, baton: Baton) -> None:
    done = baton("chat", "--url", server.url, stdin=f"{asked}\nhello\n")
    assert done.returncode == 1, "who feeds it from a pipe learns that an answer is missing"
    assert said in done.stderr
    assert done.stdout.endswith("hello! \n")
    assert "Traceback" not in done.stderr


def test_a_question_that_got_no_answer_is_not_part_of_the_conversation(server: Server, baton: Baton) -> None:
    baton("chat", "--url", server.url, stdin="fail\nhello\n")
    assert messages(server.bodies[1]) == [("user", "hello")]


def test_ctrl_c_stops_one_answer_and_hangs_up_on_it(server: Server, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "baton.cli.main", "chat", "--url", server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "BATON_CONFIG"},
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"forever\n")
        process.stdin.flush()
        assert process.stdout.read(10) == b"more more "
        process.send_signal(signal.SIGINT)
        assert server.hung_up.wait(60)
        out, err = process.communicate(b"still there?\n", timeout=60)
        assert (process.returncode, err.count(b"Traceback")) == (0, 0)
        assert b"[stopped]\nstill! there?! \n" in out
        roles = [role for role, _ in messages(server.bodies[1])]
        assert roles == ["user", "assistant", "user"], "what was said before the stop stays in the conversation"
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_is_no_model_server_is_one_sentence(server: Server, baton: Baton) -> None:
    done = baton("chat", "--url", f"{server.url}/elsewhere")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{server.url}/elsewhere" in done.stderr


def test_the_address_may_be_the_one_that_openai_clients_take(server: Server, baton: Baton) -> None:
    assert baton("chat", "--url", f"{server.url}/v1/", stdin="hello").stdout == "hello! \n"
