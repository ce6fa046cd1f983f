"""Chooses what computes: the host kernels with an instruction set and formats, or plain torch. One choice per worker,
made before its memory is laid out, because the element type of KV and the capability document follow from it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from baton.core.config import EngineConfig
from baton.core.errors import ConfigError, NotWritable, SetupError
from baton.core.layout import KVLayout

if TYPE_CHECKING:
    from baton.core.step import Runner
    from baton.models.convert import ModelFiles

HEAD_DIM_MULTIPLE, HEAD_DIM_MOST = 16, 256
"""What the host kernels' attention takes (kernels/host/csrc/program.cpp)."""
NUMERICS_VERSION = 2
"""Of the host kernels' results: another one whenever they change by a bit, so that builds that differ are no peers."""
NO_VECTORS = ("the host kernels have only plain C for this CPU, which is slower than torch. Set engine.backend=host to "
              "use it all the same.")


@dataclass(frozen=True, slots=True)
class Backend:
    name: Literal["host", "torch"]
    quantization: str
    kv_dtype: str
    isa: str = ""
    """Of the host kernels."""
    fallback: str = ""
    """Not empty: why torch computes although the host kernels would be preferred."""

    @property
    def numerics(self) -> str:
        """How KV is computed: workers that compute it otherwise, by a bit, are no peers."""
        return f"host{NUMERICS_VERSION}-{self.quantization}-{self.isa}" if self.name == "host" else "torch-fp32"

    def open(self, files: ModelFiles, memory: memoryview, num_blocks: int, layout: KVLayout, threads: int) -> Runner:
        """A runner over `memory`, which must outlive it. Imported here: torch takes seconds and 200 MB, and the host
        kernels do without it."""
        if self.name == "host":
            from baton.engine.host_runner import HostRunner

            return HostRunner(files, memory, layout, threads, self)
        from baton.engine.torch_runner import TorchRunner

        return TorchRunner(files.directory, memory, num_blocks, layout, threads)


TORCH = Backend("torch", "fp32", "fp32")


def choose_backend(engine: EngineConfig, head_dim: int, isas: Sequence[str] | None = None) -> Backend:
    """What the configuration asks for, if this machine and model have it. `isas`: of the host kernels, best first;
    default: this machine's.

    Raises SetupError where they do not: `auto` falls back to torch only if torch computes the same formats."""
    torch_computes_it = engine.quantization in ("auto", "fp32") and engine.kv_dtype in (None, "fp32")
    quantization = "bf16" if engine.quantization == "auto" else engine.quantization
    kv_dtype = engine.kv_dtype or ("fp32" if quantization == "fp32" else "bf16")
    if engine.backend == "torch":
        if not torch_computes_it:
            raise ConfigError(f"engine.backend=torch computes in fp32 alone, not with {engine.quantization} weights "
                              f"and {kv_dtype} KV. Set engine.backend=host.", "engine.backend")
        return TORCH
    may_fall_back = engine.backend == "auto" and torch_computes_it
    try:
        isa = _isa(engine.isa, head_dim, isas)
    except SetupError as e:
        if not may_fall_back:
            raise
        return dataclasses.replace(TORCH, fallback=str(e))
    if isa == "scalar" and engine.isa == "auto" and may_fall_back and _has_torch():
        return dataclasses.replace(TORCH, fallback=NO_VECTORS)
    return Backend("host", quantization, kv_dtype, isa)


def prepare(engine: EngineConfig, files: ModelFiles, progress: Callable[[str], None]) -> None:
    """Make what a worker would make at its start, and others wait for: the library, packed weights. Raises SetupError
    where it would."""
    if engine.backend != "torch":
        with contextlib.suppress(SetupError, ImportError):  # what follows from it is said below
            from baton.kernels.host import library

            library.find_or_build(progress)
    backend = choose_backend(engine, files.spec.head_dim)
    if backend.name == "host":
        from baton.models.packed import packed_file

        try:
            packed_file(files, backend.quantization, progress)
        except NotWritable as e:
            progress(f"packed weights are not kept, and every start of a worker packs them: {e.message}")


def _has_torch() -> bool:
    """Without importing it."""
    return importlib.util.find_spec("torch") is not None


def _isa(wanted: str, head_dim: int, there: Sequence[str] | None) -> str:
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > HEAD_DIM_MOST:
        raise SetupError(f"the host kernels take head sizes that are multiples of {HEAD_DIM_MULTIPLE} up to "
                         f"{HEAD_DIM_MOST}, and this model has {head_dim}. Set engine.backend=torch.")
    try:
        from baton.kernels.host import library
    except ImportError as e:
        raise SetupError(f"the host kernels need {e.name}. Install it: pip install 'baton-serve[engine]'.") from e
    there = library.isas() if there is None else there
    if wanted == "auto":
        return there[0]
    if wanted not in there:
        raise SetupError(f"engine.isa is {wanted}, and this machine has {', '.join(there)}. Set one of them, or auto.")
    return wanted
