"""A model as somebody else published it, read through one door: what a conversion needs, whatever the file format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from baton.models.spec import ModelSpec
from baton.models.weights import Array

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Int4:
    """A matrix [n, k] in groups of 32 along k: value = nibble * scale - minimum."""

    nibbles: NDArray[np.uint8]
    """[n, k], 0 to 15."""
    scale: Array
    """[n, k / 32]."""
    minimum: Array


@dataclass(frozen=True, slots=True)
class Checkpoint:
    spec: ModelSpec
    read: Callable[[str], Array]
    """A weight's part by our name (`layers.3.q`), fp32, in our conventions (half-split rotary)."""
    weight_files: tuple[Path, ...]
    """Their bytes, with the spec, are the model's identity."""
    tokenizer_json: Callable[[], str]
    """The tokenizer as `tokenizers` reads it."""
    chat_template: str | None
    bos_token_id: int | None
    read_int4: Callable[[str], Int4 | None] = lambda part: None
    """The same part as the file itself holds it in 4 bits, nothing rounded again; None where it holds it otherwise."""


def their_name(part: str, outer: dict[str, str], layer_prefix: str, inner: dict[str, str]) -> str:
    """Our part name in another format's words, by that format's tables."""
    if part in outer:
        return outer[part]
    _, layer, leaf = part.split(".")
    return f"{layer_prefix}.{layer}.{inner[leaf]}.weight"
