"""Reads a Hugging Face model directory: config.json, safetensors (one file or an index of shards), tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from baton.core.errors import SetupError
from baton.models.checkpoint import Checkpoint, their_name
from baton.models.spec import ModelSpec
from baton.models.weights import Array

_OUTER = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_INNER = {
    "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def read_hf(directory: Path) -> Checkpoint:
    """Raises SetupError if a file is missing or damaged, or the model is one that Baton cannot run yet."""
    config = _document(directory / "config.json")
    spec = _spec(directory, config)
    where, files = _tensors(directory)
    mapped = {file: _open(file) for file in files}

    def read(part: str) -> Array:
        name = tensor_name(part)
        if name not in where:
            raise SetupError(f"{directory} is incomplete: no safetensors file holds {name}. Fetch the model again.")
        array: Array = mapped[where[name]].get_tensor(name).to(torch.float32).numpy()
        return array

    def tokenizer_json() -> str:
        return _text(directory / "tokenizer.json")

    return Checkpoint(spec, read, files, tokenizer_json, _chat_template(directory), config.get("bos_token_id"))


def tensor_name(part: str) -> str:
    """What a Llama's part is called in such a directory."""
    return their_name(part, _OUTER, "model.layers", _INNER)


def _spec(directory: Path, config: Mapping[str, Any]) -> ModelSpec:
    architecture = (config.get("architectures") or [config.get("model_type")])[0]
    if architecture != "LlamaForCausalLM":
        raise SetupError(f"{directory} has architecture {architecture!r}; Baton runs 'LlamaForCausalLM' so far.")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    unsupported = {
        "quantization_config": bool(config.get("quantization_config")),
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        f"rope scaling {rope!r}": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    for what, present in unsupported.items():
        if present:
            raise SetupError(f"{directory} uses {what}, which is not supported yet.")
    try:
        heads = config["num_attention_heads"]
        spec = ModelSpec(
            architecture="llama",
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // max(heads, 1),
            vocab_size=config["vocab_size"],
            max_model_len=config["max_position_embeddings"],
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            rms_norm_eps=float(config["rms_norm_eps"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=_eos(directory, config),
        )
        spec.check(str(directory / "config.json"))
    except KeyError as e:
        raise SetupError(f"{directory / 'config.json'} is damaged: it does not say {e}. Fetch the model again.") from e
    except (TypeError, ValueError) as e:
        raise SetupError(f"{directory / 'config.json'} is damaged: {e}. Fetch the model again.") from e
    return spec


def _eos(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json knows every end token of a chat model; config.json often only the base model's."""
    ids = _optional(directory / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _tensors(directory: Path) -> tuple[dict[str, Path], tuple[Path, ...]]:
    """Tensor name -> the file that holds it, and the files in order of their names."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            where = {name: directory / Path(file).name for name, file in _document(index)["weight_map"].items()}
        except (KeyError, TypeError, AttributeError) as e:
            raise SetupError(f"{index} is damaged: weight_map does not map names to files. Fetch it again.") from e
    else:
        single = directory / "model.safetensors"
        with ExitStack() as stack:
            where = dict.fromkeys(stack.enter_context(_open(single)).keys(), single)
    return where, tuple(sorted(set(where.values())))


def _open(file: Path) -> Any:
    if not file.exists():
        raise SetupError(f"{file} is missing: {file.parent} is not a complete Hugging Face model. Fetch it again.")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as e:
        raise SetupError(f"{file} is cut short or damaged ({e}). Fetch the model again.") from e


def _chat_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return _text(file)
    template = _optional(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SetupError(f"{path} is missing: {path.parent} is not a complete Hugging Face model.") from None
    except UnicodeDecodeError as e:
        raise SetupError(f"{path} is damaged ({e}). Fetch the model again.") from e


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except ValueError as e:
        raise SetupError(f"{path} is not JSON ({e}). Fetch the model again.") from e
    if not isinstance(document, dict):
        raise SetupError(f"{path} does not hold a JSON object. Fetch the model again.")
    return document


def _optional(path: Path) -> dict[str, Any]:
    return _document(path) if path.exists() else {}
