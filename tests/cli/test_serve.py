"""`baton serve` as a person uses it: the real command, real processes, and nothing left of them afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

READY = "Ctrl-C ends it"
TIMEOUT_S = 240
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_S)]


class Serving:
    """A running `baton serve` with a temporary directory of its own, so that what it leaves there is seen."""

    def __init__(self, home: Path, *arguments: str) -> None:
        # Not pytest's directory: Unix sockets have short paths.
        self.tmp = Path(tempfile.mkdtemp(prefix="baton-test-", dir="/tmp"))
        inherited = {k: v for k, v in os.environ.items() if k != "BATON_CONFIG"}
        ports = ("--set", "router.http_port=0", "--set", "router.grpc_port=0")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "baton.cli.main", "serve", *ports, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=home,
            start_new_session=True,
            env={**inherited, "TMPDIR": str(self.tmp), "OMP_NUM_THREADS": "1"},
        )
        self.family: set[psutil.Process] = set()

    def read_until(self, sign: str, stream: str = "stdout") -> str:
        """Lines up to the one with `sign` in it. The test's own time-out bounds the wait."""
        source, lines = getattr(self.process, stream), []
        for line in source:
            lines.append(line)
            if sign in line:
                return "".join(lines)
        raise AssertionError(f"ended before {sign!r}:\n{''.join(lines)}\n{self.process.communicate()}")

    def note_family(self) -> None:
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        self.note_family()
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out, err

    def left_over(self) -> list[str]:
        """Processes and files. Those that the kernel is ending get the time for it."""
        _, alive = psutil.wait_procs(self.family, timeout=15)
        return [str(p) for p in alive] + [str(p) for p in self.tmp.rglob("*")]

    def close(self) -> None:
        for process in [*self.family, psutil.Process(self.process.pid)] if self.process.poll() is None else self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()
        shutil.rmtree(self.tmp, ignore_errors=True)  # a killed supervisor cannot tidy up


@pytest.fixture
def tiny(tiny_model_dir: Path) -> tuple[str, ...]:
    """Options for a model that is there already, small enough to start in a moment."""
    source, cache = tiny_model_dir.parents[2] / "llama", tiny_model_dir.parents[1]
    return ("--pool", "local", "--set", f"model.name={source}", "--set", f"model.cache_dir={cache}",
            "--set", "engine.num_blocks=64")  # fmt: skip


@contextlib.contextmanager
def serving(home: Path, *arguments: str) -> Iterator[Serving]:
    stack = Serving(home, *arguments)
    try:
        yield stack
    finally:
        stack.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stack_that_is_told_to_end_leaves_nothing_behind(
    number: signal.Signals, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    with serving(tmp_path, *tiny, "--decode", "2") as stack:
        said = stack.read_until(READY)
        assert "prefill-0 -> decode-1" in said
        ports = [int(p) for p in re.findall(r"127\.0\.0\.1:(\d+)", said)]
        stack.note_family()
        assert len(stack.family) >= 5, "registry with its watchdog, three workers and a router"
        opened = [c.laddr.ip for p in stack.family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert opened, "HTTP and gRPC at least"
        assert {ip.removeprefix("::ffff:") for ip in opened} <= {"127.0.0.1", "::1"}, "loopback only"
        code, _, err = stack.end(number)
        assert code == 0, err
        assert stack.left_over() == []
        for port in ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize("while_at", ["Model", "Registry", "Workers", "Router"])
def test_ctrl_c_in_the_middle_of_setting_up_leaves_nothing_behind(
    while_at: str, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    with serving(tmp_path, *tiny) as stack:
        stack.read_until(while_at, "stderr")
        code, _, err = stack.end(signal.SIGINT)
        assert code == 0, err
        assert "Traceback" not in err
        assert stack.left_over() == []


def test_a_killed_supervisor_takes_its_processes_with_it(tiny: tuple[str, ...], tmp_path: Path) -> None:
    with serving(tmp_path, *tiny) as stack:
        stack.read_until(READY)
        stack.end(signal.SIGKILL)
        _, alive = psutil.wait_procs(stack.family, timeout=20)
        assert alive == []


def test_a_router_that_dies_ends_the_command_with_an_error(tiny: tuple[str, ...], tmp_path: Path) -> None:
    with serving(tmp_path, *tiny) as stack:
        stack.read_until(READY)
        stack.note_family()
        (router,) = [p for p in stack.family if "baton.cli.router_child" in p.cmdline()]
        router.kill()
        _, err = stack.process.communicate(timeout=TIMEOUT_S)
        assert stack.process.returncode == 1
        assert "the router ended" in err
        assert stack.left_over() == []


def test_a_question_that_cannot_be_answered_is_an_error(tiny: tuple[str, ...], tmp_path: Path) -> None:
    # The tiny model's context is far too short for the text of the demonstration.
    with serving(tmp_path, *tiny, "--once") as stack:
        _, err = stack.process.communicate(timeout=TIMEOUT_S)
        assert stack.process.returncode == 1
        assert "the question was not answered" in err


@pytest.mark.model
@pytest.mark.parametrize("pool", ["local", "ray"])
def test_once_answers_over_the_relay_and_exits(pool: str, model_dir: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--pool", pool, "--once") as stack:
        out, err = stack.process.communicate(timeout=TIMEOUT_S)
        assert stack.process.returncode == 0, err
        assert "baton" in out.partition("hand over?")[2].lower()
        assert "prefill-0 -> decode-0" in out
        for bar in ("queue", "prefill chunk", "transfer", "first token", "decode"):
            assert re.search(rf"^(router |prefill )?{bar} .*[█◆#*]", out, re.MULTILINE), out
        if pool == "local":
            assert stack.left_over() == []
