"""Writes small GGUF files as llama.cpp's converter does: Q and K in its row order, a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

Quant = GGMLQuantizationType

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, model: Any, types: Mapping[str, Quant] | None = None, **changes: Any) -> None:
    """Write transformers' Llama `model`; `types` names tensors (by their end) that are not F32.

    `changes` override what the file says: architecture, or any key with `__` for its dots.
    """
    config = model.config
    writer = GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, config.vocab_size)
    for key, value in changes.items():
        writer.add_string(key.replace("__", "."), value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        for which, count in heads.items():
            if f"{which}_proj" in name:  # the halves of each head's rows become neighbours
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        theirs = gguf_name(name)
        kind = next((t for end, t in (types or {}).items() if theirs.endswith(end + ".weight")), Quant.F32)
        writer.add_tensor(theirs, quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def add_tokenizer(writer: GGUFWriter, vocab_size: int) -> None:
    """Control tokens 0 to 2, letters, and one merge: `ab`."""
    letters = [chr(c) for c in range(ord("A"), ord("A") + vocab_size - 4)]
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (vocab_size - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
