"""Compiles the host library with the C++ compiler of this machine. Standard library only: setup.py loads this file by
its path, where nothing of ours is importable yet.

One set of source files per instruction set, each with its own flags and nothing from -march=native, so that a library
runs on every CPU of its family and picks at run time (csrc/dispatch.cpp). An instruction set that the compiler does
not know is left out. No fast-math and no contraction: the code says which operations are fused.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
COMPILERS = ("g++", "clang++", "c++")
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
                "-Wall", "-Wextra")
LINK_FLAGS = ("-shared", "-pthread")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mavx512vnni", "-mavx512vbmi",
           "-mfma", "-mf16c")
ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
"""By the ending of a file's name: gemm_avx2.cpp. Files without such an ending get the common flags alone."""
X86 = ("x86_64", "amd64", "AMD64")
COMPILE_TIMEOUT_S = 300.0


class BuildError(RuntimeError):
    """The compiler failed; the message is its own."""


Command = tuple[str, ...]


def find_compiler(wanted: str | None) -> Command | None:
    """`wanted` (perhaps $CXX: a command and its options, as a shell reads them), else the first compiler on the path;
    None where there is none."""
    for words in ([_words(wanted)] if wanted else [[name] for name in COMPILERS]):
        if words and (found := shutil.which(words[0])):
            return (found, *words[1:])
    return None


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quotation that does not end
        return []


def source_files() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def digest() -> str:
    """Names what a library is made of: sources, flags and the family of CPUs. 16 hex digits."""
    flags = repr((COMMON_FLAGS, LINK_FLAGS, ISA_FLAGS, platform.machine()))
    return digest_of((path.name for path in source_files()), flags)


def digest_of(names: Iterable[str], *more: str) -> str:
    """Names the content of some source files, and `more`."""
    state = hashlib.sha256(repr(more).encode())
    for name in names:
        text = (SOURCES / name).read_bytes()
        state.update(f"{name} {len(text)}\n".encode())
        state.update(text)
    return state.hexdigest()[:16]


def packaged_name() -> str:
    """The library's file in a wheel, beside this one. Another version's is not found."""
    return f"libbaton_host-{digest()}.so"


def cached_name(compiler: Command | None) -> str:
    """Of a library's directory in the cache; without a compiler a pattern, of all that were made of these sources."""
    which = "*" if compiler is None else hashlib.sha256(repr((compiler, _version(compiler))).encode()).hexdigest()[:16]
    return f"host-{digest()}-{which}"


def _version(compiler: Command) -> str:
    return _run([*compiler, "--version"])


def compile_library(compiler: Command, target: Path) -> None:
    """Write the library to `target`, whose folder must exist; object files lie beside it meanwhile.

    Raises BuildError with the compiler's words."""
    known = {isa: flags for isa, flags in ISA_FLAGS.items() if _knows(compiler, flags)}
    objects = target.with_name(target.name + ".objects")
    objects.mkdir()
    try:
        jobs = list(_jobs(compiler, known, objects))
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            list(pool.map(_run, jobs))
        _run([*compiler, *LINK_FLAGS, "-o", str(target), *(job[-1] for job in jobs)])
    finally:
        shutil.rmtree(objects)


def _jobs(compiler: Command, known: Mapping[str, tuple[str, ...]], objects: Path) -> Iterator[list[str]]:
    """One command per source file; its last word is the object file."""
    for path in sorted(SOURCES.glob("*.cpp")):
        isa = path.stem.rpartition("_")[2]
        if isa in ISA_FLAGS and isa not in known:
            continue
        flags = (*COMMON_FLAGS, *known.get(isa, ()))
        yield [*compiler, *flags, "-c", str(path), "-o", str(objects / f"{path.stem}.o")]


def _knows(compiler: Command, flags: tuple[str, ...]) -> bool:
    if flags and platform.machine() not in X86:
        return False
    try:
        _run([*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise BuildError(f"{command[0]}: {e}") from e
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout
