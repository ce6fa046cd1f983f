"""The host library as a file: found in the package, compiled once into the cache, or a sentence that says why not."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shlex
import shutil
from pathlib import Path

import pytest

from baton.core.errors import SetupError
from baton.kernels.host import build, library

COMPILER = build.find_compiler(None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$CXX is the real compiler behind a script that writes a line for each file it compiles; the file of the lines."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    log, script = tmp_path / "compiled", tmp_path / "compiler"
    real, logged = shlex.join(COMPILER), f'case "$*" in *" -c "*) echo "$*" >> {log};; esac'
    script.write_text(f'#!/bin/sh\n{logged}\nexec {real} -O0 "$@" -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def find(_: int) -> str:
    return str(library.find_or_build())


@pytest.mark.slow
def test_many_processes_compile_once_and_all_get_the_library(cache: Path, counted: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = set(pool.map(find, range(3), chunksize=1))
    assert len(found) == 1
    assert Path(found.pop()).is_file()
    sources = len([*build.SOURCES.glob("*.cpp")])
    assert len(counted.read_text().splitlines()) == sources
    find(0)
    assert len(counted.read_text().splitlines()) == sources, "it was there already"
    assert not [*cache.rglob("*.o")], "object files are not kept"


def named(directory: Path, version: str) -> build.Command:
    """A compiler that says its version and nothing else."""
    script = directory / "named"
    script.write_text(f"#!/bin/sh\necho {version}\n")
    script.chmod(0o755)
    return (str(script),)


def test_the_library_has_another_name_when_a_source_or_the_compiler_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build.cached_name(named(tmp_path, "gcc 12"))
    assert build.cached_name(named(tmp_path, "gcc 13")) != before
    assert build.cached_name((*named(tmp_path, "gcc 12"), "-m32")) != before
    monkeypatch.setattr(build, "SOURCES", Path(shutil.copytree(build.SOURCES, tmp_path / "csrc")))
    assert build.cached_name(named(tmp_path, "gcc 12")) == before
    changed = tmp_path / "csrc/team.h"
    changed.write_text(changed.read_text() + "\n")
    assert build.cached_name(named(tmp_path, "gcc 12")) != before


def test_without_a_compiler_a_cached_library_of_the_same_sources_is_found(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cache / "kernels" / build.cached_name(named(tmp_path, "gcc 12")) / library.LIBRARY_NAME
    of_other_sources = cache / "kernels" / "host-0123456789abcdef-0123456789abcdef" / library.LIBRARY_NAME
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    of_other_sources.parent.mkdir(parents=True)
    of_other_sources.touch()
    with pytest.raises(SetupError, match=r"there is no C\+\+ compiler"):
        library.find_or_build()
    made.parent.mkdir()
    made.touch()
    assert library.find_or_build() == made


def test_a_cache_that_cannot_be_written_names_the_variable_that_chooses_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is no model's: model.cache_dir says nothing about it."""
    (cache / "kernels").touch()
    monkeypatch.setenv("CXX", shlex.join(named(cache, "gcc 12")))
    with pytest.raises(SetupError, match=r"cannot write to .*Set BATON_CACHE\."):
        library.find_or_build()


def test_cxx_may_have_options_and_a_program_in_front() -> None:
    env = shutil.which("env")
    assert build.find_compiler("env -- 'a compiler' -pipe") == (env, "--", "a compiler", "-pipe")
    assert build.find_compiler("nowhere++ -pipe") is None
    assert build.find_compiler("env 'no end") is None
    assert build.find_compiler(" ") is None


def test_every_command_begins_with_all_words_of_cxx(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = cache / "front"
    script.write_text(f'#!/bin/sh\necho "$*" >> {cache}/said\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} g++ -pipe")
    with pytest.raises(SetupError, match="front g"):
        library.find_or_build()
    assert (cache / "said").read_text() == "g++ -pipe --version\n"


def test_what_a_wheel_brought_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    monkeypatch.setenv("CXX", "/nowhere/g++")
    packaged = tmp_path / build.packaged_name()
    packaged.touch()
    assert library.find_or_build() == packaged


def test_no_compiler_is_one_sentence_that_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(SetupError, match=r"\$CXX is '/nowhere/g\+\+', which is no command\. Install g\+\+"):
        library.find_or_build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match=r"there is no C\+\+ compiler\. Install g\+\+ or clang\+\+, or set engine"):
        library.find_or_build()


def test_a_compiler_that_fails_says_so_and_leaves_nothing_that_looks_finished(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = cache / "compiler"
    script.write_text('#!/bin/sh\ncase "$1" in --version) echo 1.0;; *) echo out of disk >&2; exit 3;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(SetupError, match="out of disk"):
        library.find_or_build()
    assert not [*cache.rglob("*.so*")]


@pytest.mark.slow
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out(cache: Path, counted: Path) -> None:
    """And the rest of the library links and loads without it."""
    script = counted.with_name("old")
    script.write_text(f'#!/bin/sh\ncase "$*" in *amx*) exit 1;; esac\nexec {os.environ["CXX"]} "$@"\n')
    script.chmod(0o755)
    target = cache / library.LIBRARY_NAME
    build.compile_library((str(script),), target)
    compiled = counted.read_text()
    assert "gemm_scalar.cpp" in compiled
    assert "_amx.cpp" not in compiled
    loaded = ctypes.CDLL(str(target))
    assert (loaded.baton_has_isa(b"scalar"), loaded.baton_has_isa(b"amx")) == (1, 0)
