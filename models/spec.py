"""What a decoder is, as data: its sizes and constants. Everything else about a model follows from its spec."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.core.errors import SetupError
from baton.core.layout import KVLayout


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder of the Llama family: RMSNorm, rotary embedding (half-split), grouped-query attention, SwiGLU."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    """Longest context the model was made for, in tokens."""
    rope_theta: float
    rms_norm_eps: float
    tied_embeddings: bool
    """The LM head is the embedding matrix."""
    eos_token_ids: tuple[int, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def layout(self, block_size: int, dtype: str = "fp32") -> KVLayout:
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, block_size, dtype)

    def check(self, where: str) -> None:
        """Raise SetupError if the sizes do not fit together; `where` names the file they came from."""
        for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim",
                     "vocab_size", "max_model_len", "rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise SetupError(f"{where} is damaged: {name} is {getattr(self, name)}. Fetch the model again.")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise SetupError(
                f"{where} is damaged: {self.num_heads} heads do not share {self.num_kv_heads} KV heads evenly, or the "
                f"head size {self.head_dim} is odd. Fetch the model again.")
        if not all(0 <= t < self.vocab_size for t in self.eos_token_ids):
            raise SetupError(f"{where} is damaged: end tokens {self.eos_token_ids} are outside the vocabulary.")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ModelSpec:
        return cls(**{**document, "eos_token_ids": tuple(document["eos_token_ids"])})
