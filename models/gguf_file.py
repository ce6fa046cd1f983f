"""Reads a GGUF file of the Llama family. The `gguf` package parses it and dequantises; the tokenizer is rebuilt from
the file's own tables, without transformers."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from baton.core.errors import SetupError
from baton.models.checkpoint import Checkpoint, Int4, their_name
from baton.models.gguf_int4 import unpack
from baton.models.spec import ModelSpec
from baton.models.weights import Array

_OUTER = {"embed": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}
_INNER = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
}
Number = TypeVar("Number", np.uint8, np.float32)
_CONTROL, _USER_DEFINED = 3, 4  # token types that stand for themselves, never for text


def read_gguf(path: Path) -> Checkpoint:
    """Raises SetupError if the file is no GGUF, is cut short, or holds what Baton cannot run yet."""
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tokenizer = {name: field for name, field in reader.fields.items() if name.startswith("tokenizer.")}

    def token_field(name: str, default: Any = None) -> Any:
        field = tokenizer.get(f"tokenizer.{name}")
        return default if field is None else field.contents()

    try:
        spec = _spec(path, fields, tied="output.weight" not in tensors, token_field=token_field)
    except (TypeError, ValueError) as e:
        raise SetupError(f"{path} is damaged: {e}. Fetch the model again.") from e

    def find(part: str) -> Any:
        name = their_name(part, _OUTER, "blk", _INNER)
        if name not in tensors:
            raise SetupError(f"{path} is damaged: it has no tensor {name}. Fetch the model again.")
        return tensors[name]

    def interleaved_heads(part: str) -> int:
        return {"q": spec.num_heads, "k": spec.num_kv_heads}.get(part.rpartition(".")[2], 0)

    def read(part: str) -> Array:
        tensor = find(part)
        try:
            array: Array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise SetupError(f"{path} stores {tensor.name} as {tensor.tensor_type.name}, which the installed gguf "
                             "package cannot expand. Use another quantisation, such as Q8_0.") from None
        heads = interleaved_heads(part)
        return _half_split(array, heads) if heads else array

    def read_int4(part: str) -> Int4 | None:
        tensor = find(part)
        k, n = (int(size) for size in tensor.shape)
        raw, heads = unpack(tensor.tensor_type.name, tensor.data, (n, k)), interleaved_heads(part)
        if raw is None or not heads:
            return raw
        return Int4(_half_split(raw.nibbles, heads), _half_split(raw.scale, heads), _half_split(raw.minimum, heads))

    return Checkpoint(spec, read, (path,), lambda: _tokenizer(path, token_field), token_field("chat_template"),
                      token_field("ggml.bos_token_id"), read_int4)


def _open(path: Path) -> GGUFReader:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SetupError(f"{path} is not a GGUF file. Give a .gguf file or a Hugging Face directory.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error, OSError) as e:
        raise SetupError(f"{path} is cut short or damaged ({type(e).__name__}). Fetch the model again.") from e


def _spec(path: Path, fields: Mapping[str, Any], tied: bool, token_field: Any) -> ModelSpec:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise SetupError(f"{path} has architecture {architecture!r}; Baton runs 'llama' so far.")
    if "llama.rope.scaling.type" in fields and fields["llama.rope.scaling.type"] != "none":
        raise SetupError(f"{path} scales its rotary embedding ({fields['llama.rope.scaling.type']!r}), which is not "
                         "supported yet.")

    def field(name: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise SetupError(f"{path} is damaged: it does not say llama.{name}. Fetch the model again.")
        return value

    heads, hidden = int(field("attention.head_count")), int(field("embedding_length"))
    ends = (token_field("ggml.eos_token_id"), token_field("ggml.eot_token_id"))
    spec = ModelSpec(
        architecture=architecture,
        num_layers=int(field("block_count")),
        hidden_size=hidden,
        intermediate_size=int(field("feed_forward_length")),
        num_heads=heads,
        num_kv_heads=int(field("attention.head_count_kv", heads)),
        head_dim=int(field("attention.key_length", hidden // max(heads, 1))),
        vocab_size=int(field("vocab_size", len(token_field("ggml.tokens", [])))),
        max_model_len=int(field("context_length")),
        rope_theta=float(field("rope.freq_base", 10_000.0)),
        # Stored as fp32: 1e-5 came back as 9.99999975e-06.
        rms_norm_eps=float(np.format_float_positional(np.float32(field("attention.layer_norm_rms_epsilon")))),
        tied_embeddings=tied,
        eos_token_ids=tuple(dict.fromkeys(int(end) for end in ends if end is not None)),
    )
    spec.check(str(path))
    return spec


def _half_split(weight: NDArray[Number], heads: int) -> NDArray[Number]:
    """Undo the row order in which llama-architecture GGUF files keep Q and K (pairs of neighbours, not of halves)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(path: Path, field: Any) -> str:
    kind, pre = field("ggml.model"), field("ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise SetupError(f"{path} has a tokenizer of kind {kind!r}/{pre!r}; Baton rebuilds 'gpt2'/"
                         f"{', '.join(map(repr, _PRE_TOKENIZERS))} so far. Use the model's Hugging Face directory.")
    tokens, merges, types = (field(f"ggml.{name}") for name in ("tokens", "merges", "token_type"))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ", 1)) for merge in merges]))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if field("ggml.add_bos_token", False):
        bos = tokens[field("ggml.bos_token_id")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])])
    return str(tokenizer.to_str())
