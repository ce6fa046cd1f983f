"""The host library in this process: found or compiled, and its C interface (csrc/abi.h) by ctypes.

Owns the way to the library file and the mirrors of the C structures. Does not know models or requests.

Life of the library file:
1. A wheel that was built where a compiler was holds it, named by the digest of its sources: it is found first.
2. Otherwise it is compiled on first use (seconds) into $BATON_CACHE, whichever model is served, keyed by sources, flags
   and compiler; one process compiles, the others wait. Where no compiler is, what any other made of the same sources is
   taken: an image for running has none, and a cache from where one was.
3. No library and no compiler: SetupError. Whoever asked chooses what then (engine/host_runner.py).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_uint8, c_uint64, c_void_p
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from baton.core import config
from baton.core.errors import SetupError
from baton.core.once import made_once
from baton.kernels.host import build

ABI_VERSION: Final = 1
FORMATS: Final = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
ISAS: Final = ("amx", "avx512", "avx2", "scalar")
"""Best first."""
OPS: Final = ("embed", "rms_norm", "linear", "linear_residual", "rope_write_kv", "attention", "keep_sampled_rows",
              "swiglu", "lm_head", "collective", "capture")
LINE: Final = 64
"""Bytes of a cache line."""
LIBRARY_NAME: Final = "libbaton_host.so"


class Matrix(ctypes.Structure):
    _fields_: ClassVar = [("panels", c_void_p), ("n", c_int32), ("k", c_int32), ("format", c_int32),
                          ("reserved", c_int32)]


class Op(ctypes.Structure):
    _fields_: ClassVar = [("kind", c_int32), ("layer", c_int32), ("matrix", c_int32), ("eps", c_float),
                          ("vector", c_void_p)]


class Shape(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_int32) for name in (
            "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "num_layers",
            "block_size", "kv_format", "reserved")),
        ("rope_frequencies", c_void_p)]


class Span(ctypes.Structure):
    _fields_: ClassVar = [(name, c_int32) for name in ("row", "num_rows", "start", "first_block")]


class Batch(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in (
            "tokens", "spans", "blocks", "sampled_rows", "pool", "logits", "argmax", "layers_done")),
        *((name, c_int32) for name in ("num_rows", "num_spans", "num_sampled", "reserved"))]


class Choice(ctypes.Structure):
    _fields_: ClassVar = [
        ("seed", c_uint64), ("position", c_uint64), *((name, c_double) for name in ("temperature", "top_p", "min_p")),
        ("top_k", c_int32), ("choice", c_int32)]


class Source(ctypes.Structure):
    _fields_: ClassVar = [("row", c_int32), ("sampled", c_int32)]


class Job(ctypes.Structure):
    _fields_: ClassVar = [
        ("batch", Batch), *((name, c_void_p) for name in ("tokens", "sources", "choices", "chosen", "greatest")),
        ("began_s", c_double), ("ended_s", c_double), ("num_sources", c_int32), ("done", c_int32)]


_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "baton_abi_version": (c_int32, ()),
    "baton_best_isa": (c_char_p, ()),
    "baton_has_isa": (c_int32, (c_char_p,)),
    "baton_team_new": (c_void_p, (c_int32, c_int32)),
    "baton_team_free": (None, (c_void_p,)),
    "baton_read": (c_int64, (c_void_p, c_void_p, c_int64)),
    "baton_packed_bytes": (c_int64, (c_int32, c_int32, c_int32)),
    "baton_pack_fp32": (None, (c_void_p, c_int32, c_int32, c_void_p)),
    "baton_pack_bf16": (None, (c_void_p, c_int32, c_int32, c_void_p)),
    "baton_pack_int8": (None, (c_void_p, c_int32, c_int32, c_void_p)),
    "baton_pack_int4": (None, (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p)),
    "baton_program_new": (c_void_p, (c_char_p, POINTER(Shape), POINTER(Op), c_int32, POINTER(Matrix), c_int32,
                                     POINTER(c_char_p))),
    "baton_program_free": (None, (c_void_p,)),
    "baton_program_hidden": (POINTER(c_float), (c_void_p,)),
    "baton_program_time": (None, (c_void_p, c_void_p)),
    "baton_step": (c_int32, (c_void_p, c_void_p, POINTER(Batch), c_int32)),
    "baton_line_new": (c_void_p, (c_void_p, c_void_p)),
    "baton_line_fd": (c_int32, (c_void_p,)),
    "baton_line_put": (None, (c_void_p, POINTER(Job))),
    "baton_line_wait": (None, (c_void_p, POINTER(Job))),
    "baton_line_free": (None, (c_void_p,)),
    "baton_linear": (None, (c_char_p, c_void_p, c_void_p, c_int32, POINTER(Matrix), c_void_p, c_int32)),
    "baton_attention": (None, (c_char_p, c_void_p, POINTER(Shape), POINTER(Batch), c_int32, c_void_p, c_void_p)),
    "baton_choose": (c_int32, (c_char_p, c_void_p, c_int32, c_int32, POINTER(Choice))),
    "baton_rms_norm": (None, (c_char_p, c_void_p, c_void_p, c_float, c_int32, c_void_p)),
    "baton_swiglu": (None, (c_char_p, c_void_p, c_int32, c_void_p)),
    "baton_rope": (None, (c_char_p, c_void_p, c_void_p, c_int32)),
    "baton_store_kv": (None, (c_char_p, c_void_p, c_int32, c_int32, c_int32, c_int32, POINTER(c_uint8))),
    "baton_convert_kv": (None, (c_char_p, POINTER(Shape), c_void_p, c_int32, c_int32, c_void_p)),
}


@functools.cache
def load() -> ctypes.CDLL:
    """The library, loaded once per process. Raises SetupError, in one sentence, where there can be none."""
    path = find_or_build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise SetupError(f"the host library does not load ({e}). Delete it and start again: it is compiled anew, or "
                         "set engine.backend=torch.") from e
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    assert library.baton_abi_version() == ABI_VERSION, (library.baton_abi_version(), ABI_VERSION)
    return library


def isas() -> tuple[str, ...]:
    """What this CPU and the library have, best first."""
    library = load()
    return tuple(isa for isa in ISAS if library.baton_has_isa(isa.encode()))


def find_or_build(progress: Callable[[str], None] = lambda _: None) -> Path:
    """The library's file: out of the package, or compiled into the cache directory. Raises SetupError."""
    packaged = Path(build.__file__).with_name(build.packaged_name())
    if packaged.exists():
        return packaged
    wanted, cache = config.compiler(), config.cache_dir() / "kernels"
    compiler = build.find_compiler(wanted)
    if compiler is None:
        if there := [*cache.glob(f"{build.cached_name(None)}/{LIBRARY_NAME}")]:
            return max(there, key=lambda path: path.stat().st_mtime)
        what = f"$CXX is {wanted!r}, which is no command" if wanted else "there is no C++ compiler"
        raise SetupError(f"the host library cannot be compiled: {what}. Install g++ or clang++, or set "
                         "engine.backend=torch.")
    try:
        directory = cache / build.cached_name(compiler)

        def compile_it(building: Path) -> None:
            progress("compiling the host kernels")
            build.compile_library(compiler, building / LIBRARY_NAME)

        return made_once(directory, _opened, compile_it, "compile the host library", "BATON_CACHE")
    except build.BuildError as e:
        raise SetupError(f"the host library cannot be compiled: {e}. Set CXX to another compiler, or "
                         "engine.backend=torch.") from e


def _opened(directory: Path) -> Path | None:
    library = directory / LIBRARY_NAME
    return library if library.exists() else None


def new_program(isa: str, shape: Shape, ops: Sequence[Op], matrices: Sequence[Matrix]) -> int:
    """For baton_step; ends with baton_program_free. Raises SetupError if the kernels cannot run it."""
    error = c_char_p()
    program: int | None = load().baton_program_new(
        isa.encode(), shape, (Op * len(ops))(*ops), len(ops), (Matrix * len(matrices))(*matrices), len(matrices), error)
    if program is None:
        raise SetupError(f"the host kernels cannot run this model: {(error.value or b'').decode()}. Set "
                         "engine.backend=torch.")
    return program


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack_digest() -> str:
    """Names the way in which matrices are packed: memory packed in another way is not read."""
    return build.digest_of(("isa.h", "pack.h", "pack.cpp"))


def packed_bytes(form: str, n: int, k: int) -> int:
    return int(load().baton_packed_bytes(FORMATS[form], n, k))


def aligned(num_bytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that begins at a cache line, as the kernels want all theirs."""
    raw = np.zeros(num_bytes + LINE, np.uint8)
    first = -raw.ctypes.data % LINE
    return raw[first : first + num_bytes]


def pack(array: NDArray[np.float32], form: str, panels: NDArray[np.uint8]) -> None:
    """A matrix [n, k] fp32 as fp32, bf16 or int8 panels."""
    function = getattr(load(), f"baton_pack_{form}")
    rows = np.ascontiguousarray(array)
    assert panels.nbytes == packed_bytes(form, *rows.shape), (panels.nbytes, form, rows.shape)
    function(rows.ctypes.data, *rows.shape, panels.ctypes.data)


def pack_int4(
    nibbles: NDArray[np.uint8], scale: NDArray[np.float32], minimum: NDArray[np.float32], panels: NDArray[np.uint8]
) -> None:
    """nibbles [n, k], scale and minimum [n, k / 32]: value = nibble * scale - minimum."""
    parts = [np.ascontiguousarray(part) for part in (nibbles, scale, minimum)]
    assert panels.nbytes == packed_bytes("int4", *nibbles.shape), (panels.nbytes, nibbles.shape)
    load().baton_pack_int4(*(part.ctypes.data for part in parts), *nibbles.shape, panels.ctypes.data)
