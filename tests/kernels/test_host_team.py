"""The team of threads behind a step, by a program of its own: what it must keep has no Python to be seen from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from baton.core import config
from baton.kernels.host import build

STRESS = Path(__file__).with_name("team_stress.cpp")


def run_stress(directory: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    compiler = build.find_compiler(config.compiler())
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = directory / "team_stress"
    sources = [str(STRESS), str(build.SOURCES / "team.cpp")]
    command = [*compiler, *build.COMMON_FLAGS, *flags, f"-I{build.SOURCES}", *sources, "-pthread", "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode and flags:
        pytest.skip(f"the compiler does not know {flags}: {compiled.stderr}")
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_every_task_of_every_phase_is_run_once_with_more_threads_than_cores(tmp_path: Path) -> None:
    done = run_stress(tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_thread_sanitizer_finds_no_race_in_the_team(tmp_path: Path) -> None:
    done = run_stress(tmp_path, "-fsanitize=thread", "-g")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the sanitizer does not run on this kernel")
    assert done.returncode == 0, done.stderr
