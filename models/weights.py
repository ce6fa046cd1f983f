"""The weights file of a converted model: which tensors it holds, how it is written and how workers map it.

One safetensors file, fp32, written tensor by tensor (so that memory holds one at a time) and mapped read-only by every
worker of a host: they share its pages, and loading copies nothing.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from baton.core.errors import SetupError
from baton.models.spec import ModelSpec

if TYPE_CHECKING:  # so that what only looks for a model loads neither
    import numpy as np
    import torch
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float32]"

_ALIGNMENT = 64  # one cache line: where the first tensor starts


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of the file: `parts` stacked by rows. The parts' names are what a checkpoint is asked for."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def weights_of(spec: ModelSpec) -> dict[str, Weight]:
    """name -> Weight. Q, K and V are one tensor, as are gate and up: one matrix product instead of several."""

    hidden, mlp = spec.hidden_size, spec.intermediate_size
    weights = {"embed": _stacked("", hidden, embed=spec.vocab_size), "norm": _vector("norm", hidden)}
    if not spec.tied_embeddings:
        weights["lm_head"] = _stacked("", hidden, lm_head=spec.vocab_size)
    for layer in range(spec.num_layers):
        at = f"layers.{layer}."
        weights |= {
            at + "attn_norm": _vector(at + "attn_norm", hidden),
            at + "qkv": _stacked(at, hidden, q=spec.q_size, k=spec.kv_size, v=spec.kv_size),
            at + "o": _stacked(at, spec.q_size, o=hidden),
            at + "mlp_norm": _vector(at + "mlp_norm", hidden),
            at + "gate_up": _stacked(at, hidden, gate=mlp, up=mlp),
            at + "down": _stacked(at, mlp, down=hidden),
        }
    return weights


def _stacked(at: str, columns: int, **rows: int) -> Weight:
    return Weight((sum(rows.values()), columns), tuple((at + part, (n, columns)) for part, n in rows.items()))


def _vector(name: str, size: int) -> Weight:
    return Weight((size,), ((name, (size,)),))


def write_weights(path: Path, spec: ModelSpec, read: Callable[[str], Array]) -> None:
    """Write every weight of the spec; `read` gives a part as fp32. Raises SetupError for a part of another shape."""
    weights = weights_of(spec)
    header = _header(weights)
    with path.open("wb") as out:
        out.write(header)
        for weight in weights.values():
            for name, shape in weight.parts:
                part = read(name)
                if part.shape != shape:
                    raise SetupError(f"the model is damaged: {name} has shape {part.shape}, its configuration says "
                                     f"{shape}. Fetch the model again.")
                out.write(part.astype("<f4", order="C", copy=False).data)


def _header(weights: dict[str, Weight]) -> bytes:
    """Length and JSON header of the safetensors format; spaces at its end align the first tensor."""
    entries, offset = {}, 0
    for name, weight in weights.items():
        end = offset + 4 * math.prod(weight.shape)
        entries[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def weights_bytes(spec: ModelSpec) -> int:
    """Size of the whole file: what tells a complete one from one cut short."""
    weights = weights_of(spec)
    return len(_header(weights)) + sum(4 * math.prod(w.shape) for w in weights.values())


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Map the file: fp32 tensors whose memory is the file's page cache. They must not be written to."""
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def map_arrays(path: Path) -> dict[str, Array]:
    """The same file as numpy arrays, without torch."""
    import numpy as np

    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    size = int(mapped[:8].view("<u8")[0])
    entries = json.loads(mapped[8 : 8 + size].tobytes())
    start = 8 + size
    return {
        name: mapped[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]].view("<f4").reshape(
            entry["shape"])
        for name, entry in entries.items()
    }
