"""`baton`, the command: forked from an interpreter that has imported it once, because importing is most of what a
light command costs. Each call is a process of its own, as in a shell: its directory, environment, streams, exit code.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Baton = Callable[..., subprocess.CompletedProcess[str]]
TIMEOUT_S = 120

FORKS = """
import json, os, sys
import baton.cli.main

requests, replies = (int(fd) for fd in sys.argv[1:])
for line in os.fdopen(requests):
    child = os.fork()
    if not child:
        break
    os.write(replies, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    sys.exit()
os.close(replies)
call = json.loads(line)
os.chdir(call["cwd"])
os.environ.clear()
os.environ.update(call["env"])
for fd, (path, flags) in enumerate(zip(call["streams"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
    os.dup2(os.open(path, flags), fd)
sys.argv = ["baton", *call["arguments"]]
baton.cli.main.main()
"""


class Forks:
    """The interpreter behind `baton`."""

    def __init__(self, directory: Path) -> None:
        self._streams = [directory / name for name in ("stdin", "stdout", "stderr")]
        theirs, self._requests = os.pipe()
        self._replies, reply = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS, str(theirs), str(reply)], pass_fds=(theirs, reply), start_new_session=True
        )
        os.close(theirs)
        os.close(reply)

    def run(
        self, arguments: tuple[str, ...], stdin: str, cwd: Path, env: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        for stream, content in zip(self._streams, (stdin, "", ""), strict=True):
            stream.write_text(content)
        streams = [str(stream) for stream in self._streams]
        call = {"arguments": arguments, "cwd": str(cwd), "env": env, "streams": streams}
        os.write(self._requests, json.dumps(call).encode() + b"\n")
        if not select.select([self._replies], [], [], TIMEOUT_S)[0]:
            self.close()
            raise subprocess.TimeoutExpired(["baton", *arguments], TIMEOUT_S)
        code = int(os.read(self._replies, 16))
        return subprocess.CompletedProcess(
            ["baton", *arguments], code, self._streams[1].read_text(), self._streams[2].read_text()
        )

    def close(self) -> None:
        """With whatever it forked."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    running = Forks(tmp_path_factory.mktemp("streams"))
    yield running
    running.close()


@pytest.fixture
def baton(forks: Forks, tmp_path: Path) -> Baton:
    """Runs the command in an empty directory, with an empty model cache."""

    def run(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in {"BATON_CONFIG", "BATON_CACHE"}}
        ours = {"BATON_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
        return forks.run(arguments, stdin, tmp_path, {**inherited, **ours, **(env or {})})

    return run
