"""Weights as the host kernels read them: every matrix of a model packed into one file, made once per host and format.

    packed-<quantization>-<digest>/arena.bin    in the model's directory; the digest names the code that packs

Norms and embedding rows are not packed: they are read from the mapped fp32 file (models/weights.py), of which a
process so touches only the rows it looks up.

Life of an arena:
1. `packed_file` finds the file, or packs it matrix by matrix, from a mapping of the fp32 file. int4 is taken from a
   GGUF file's own nibbles where it has such; anything else is quantised from fp32.
2. The worker reads it into huge pages of its own (see `PackedWeights`). Where no file can be written, as in a model's
   directory that is mounted read-only, it packs into them, at every start anew.
3. `close` gives the memory back; nobody may compute with it any more.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from baton.core.errors import NotWritable, SetupError
from baton.core.once import made_once
from baton.kernels.host import library
from baton.models.checkpoint import Checkpoint, Int4
from baton.models.convert import ModelFiles, Progress, fingerprint
from baton.models.spec import ModelSpec
from baton.models.weights import Array, Weight, map_arrays, weights_of

log = logging.getLogger(__name__)

ARENA = "arena.bin"
GROUP = 32
ReadInt4 = Callable[[str], Int4 | None]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix [n, k] in the arena."""

    n: int
    k: int
    format: str
    offset: int
    num_bytes: int


class PackedWeights:
    """An arena in memory: this process' own, in huge pages where the machine has them.

    A mapping of the file, shared by the workers of a host, saves their copies (256 MB each of SmolLM2 in bf16), but is
    read through 4 KB pages, and a batch-1 step is nothing but reading. SmolLM2 on one Sapphire Rapids core: 19.1 ms
    of bf16 against 21.2 ms shared, 10.2 of int8 against 11.0."""

    def __init__(self, memory: mmap.mmap, matrices: Mapping[str, PackedMatrix]) -> None:
        self.matrices, self._memory = matrices, memory
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def close(self) -> None:
        self._memory.close()


def _huge_memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def open_packed(files: ModelFiles, quantization: str) -> PackedWeights:
    """The arena of a converted model in memory, packed if it is not there yet. Raises SetupError."""
    matrices = plan(files.spec, quantization)
    memory = _huge_memory(_size(matrices))
    try:
        path = packed_file(files, quantization)
    except NotWritable as e:
        log.warning("packed weights are not kept, and every start packs them: %s", e.message)
        _write(memory, files, quantization)
    else:
        with path.open("rb") as file:
            if file.readinto(memory) != len(memory):
                raise SetupError(f"{path} was cut short while it was read. Delete it and start again.")
    return PackedWeights(memory, matrices)


def packed_file(files: ModelFiles, quantization: str, progress: Progress = lambda _: None) -> Path:
    """The arena's file, made if it is not there yet. Safe to call from many processes at once. Raises NotWritable, or
    SetupError if the source of its 4-bit weights is gone."""
    size = _size(plan(files.spec, quantization))
    directory = files.directory / f"packed-{quantization}-{library.pack_digest()}"

    def opened(directory: Path) -> Path | None:
        path = directory / ARENA
        return path if path.exists() and path.stat().st_size == size else None

    def build(building: Path) -> None:
        progress(f"packing weights as {quantization}")
        with (building / ARENA).open("wb") as out:
            _write(out, files, quantization)
        for stale in files.directory.glob(f"packed-{quantization}-*/"):  # of older code; who uses it has it in memory
            if stale.suffix != ".building":
                shutil.rmtree(stale, ignore_errors=True)

    return made_once(directory, opened, build, f"pack the weights of {files.name} as {quantization}")


def plan(spec: ModelSpec, quantization: str) -> dict[str, PackedMatrix]:
    """Where each matrix lies. The LM head of an int4 model has 8 bits: its errors go straight into the logits."""
    matrices, offset = {}, 0
    head = "embed" if spec.tied_embeddings else "lm_head"
    for name, weight in weights_of(spec).items():
        if len(weight.shape) == 1 or (name == "embed" and head != "embed"):
            continue
        n, k = weight.shape
        form = "int8" if quantization == "int4" and name == head else quantization
        size = library.packed_bytes(form, n, k)
        matrices[name] = PackedMatrix(n, k, form, offset, size)
        offset += size
    return matrices


def _size(matrices: Mapping[str, PackedMatrix]) -> int:
    return max(m.offset + m.num_bytes for m in matrices.values())


def _is_gguf(files: ModelFiles) -> bool:
    return Path(_document(files)["source"]).suffix == ".gguf"


def _document(files: ModelFiles) -> dict[str, str]:
    document: dict[str, str] = json.loads((files.directory / "config.json").read_text())
    return document


def _source(files: ModelFiles) -> Checkpoint:
    """The GGUF file that a model was converted from, and still is."""
    from baton.models.gguf_file import read_gguf  # only he who packs needs its libraries

    path = Path(_document(files)["source"])
    checkpoint = read_gguf(path) if path.exists() else None
    if checkpoint is None or fingerprint(checkpoint) != files.fingerprint:
        raise SetupError(f"int4 takes its weights from {path}, and it is gone or changed. Put it back, or set "
                         "engine.quantization to another format.")
    return checkpoint


def _write(out: BinaryIO | mmap.mmap, files: ModelFiles, quantization: str) -> None:
    """The matrices of `plan`, which lie without a gap."""
    read_int4 = _source(files).read_int4 if quantization == "int4" and _is_gguf(files) else lambda part: None
    arrays, weights = map_arrays(files.directory / "weights.safetensors"), weights_of(files.spec)
    for name, matrix in plan(files.spec, quantization).items():
        panels = library.aligned(matrix.num_bytes)
        if matrix.format == "int4":
            four = _int4(weights[name], arrays[name], read_int4)
            library.pack_int4(four.nibbles, four.scale, four.minimum, panels)
        else:
            library.pack(arrays[name], matrix.format, panels)
        out.write(panels.data)


def _int4(weight: Weight, array: Array, read_int4: ReadInt4) -> Int4:
    """Its parts one above the other, each as its file has it or else quantised."""
    parts = [read_int4(name) or quantise_int4(rows) for name, rows in _rows(weight, array)]
    return Int4(*(np.concatenate([getattr(p, field) for p in parts]) for field in ("nibbles", "scale", "minimum")))


def _rows(weight: Weight, array: Array) -> Iterator[tuple[str, Array]]:
    first = 0
    for name, shape in weight.parts:
        yield name, array[first : first + shape[0]]
        first += shape[0]


def quantise_int4(array: Array) -> Int4:
    """From the least to the greatest of each group in 15 equal steps, both ends met exactly (as GGUF's Q4_1)."""
    n, k = array.shape
    if k % GROUP:
        raise SetupError(f"int4 needs matrices with rows of a multiple of {GROUP}, and one has {k}. Set "
                         "engine.quantization to another format.")
    groups = array.reshape(n, k // GROUP, GROUP)
    least = groups.min(axis=-1).astype(np.float16).astype(np.float32)
    scale = ((groups.max(axis=-1) - least) / 15).astype(np.float16).astype(np.float32)
    step = np.where(scale > 0, scale, 1)[..., None]  # of equal values, all are the least
    nibbles = np.clip(np.rint((groups - least[..., None]) / step), 0, 15).astype(np.uint8)
    return Int4(nibbles.reshape(n, k), scale, -least)
