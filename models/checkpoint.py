"""A model as somebody else published it, read through one door: what a conversion needs, whatever the file format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.models.spec import ModelSpec
from baton.models.weights import Array


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


def their_name(part: str, outer: dict[str, str], layer_prefix: str, inner: dict[str, str]) -> str:
    """Our part name in another format's words, by that format's tables."""
    if part in outer:
        return outer[part]
    _, layer, leaf = part.split(".")
    return f"{layer_prefix}.{layer}.{inner[leaf]}.weight"
