"""The same weights for everybody: Baton's own source, written as each peer reads it.

    peers/<model>-gguf-<digest>/          what llama-quantize made of the GGUF file that Baton reads
    peers/<model>-hf-<digest>/            bf16 safetensors of the same values, with Baton's tokenizer, for vLLM

A source of 4 bits is dequantised for bf16 and quantised again for Q8_0 and Q4_0: right for speed, and no statement
about what these formats cost in quality.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.bench.peers.builds import Say
from baton.core.errors import SetupError
from baton.core.once import made_once
from baton.models.convert import ModelFiles, read_checkpoint
from baton.models.hf_directory import tensor_name
from baton.models.spec import ModelSpec
from baton.models.weights import weights_of

GGUF_FORMATS = ("BF16", "Q8_0", "Q4_0")
GGUF_FORMAT_OF = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
"""The format of llama.cpp that has as many bits as Baton's."""


def gguf_files(source: Path, cache: Path, llama_cpp: Path, say: Say) -> Mapping[str, Path]:
    """Format -> file. Raises SetupError if the source is no GGUF file."""
    if source.suffix != ".gguf":
        raise SetupError(f"llama.cpp reads GGUF, and {source} is none. Set model.name to a .gguf file, or leave "
                         "llama.cpp out with --skip llama.cpp.")

    def build(building: Path) -> None:
        for form in GGUF_FORMATS:
            say(f"writing {source.stem} as {form} for llama.cpp")
            command = [str(llama_cpp / "llama-quantize"), "--allow-requantize", str(source),
                       str(building / f"{form}.gguf"), form]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SetupError(f"llama-quantize cannot write {form}: {done.stderr.strip()[-300:]}")

    def opened(directory: Path) -> Mapping[str, Path] | None:
        files = {form: directory / f"{form}.gguf" for form in GGUF_FORMATS}
        return files if all(file.is_file() for file in files.values()) else None

    return made_once(_place(source, cache, f"gguf-{llama_cpp.name}"), opened, build, "write GGUF files")


def hf_directory(source: Path, files: ModelFiles, cache: Path, say: Say) -> Path:
    """A Llama in bf16 as `transformers` and vLLM read it."""

    def build(building: Path) -> None:
        import torch
        from safetensors.torch import save_file

        say(f"writing {files.name} as bf16 safetensors for vLLM")
        checkpoint = read_checkpoint(source)
        parts = [name for weight in weights_of(files.spec).values() for name, _ in weight.parts]
        tensors = {tensor_name(part): torch.from_numpy(checkpoint.read(part).copy()).bfloat16() for part in parts}
        save_file(tensors, building / "model.safetensors", {"format": "pt"})
        (building / "tokenizer.json").write_text(checkpoint.tokenizer_json(), encoding="utf-8")
        for name, document in documents(files.spec, checkpoint.bos_token_id).items():
            (building / name).write_text(json.dumps(document, indent=1), encoding="utf-8")

    def opened(directory: Path) -> Path | None:
        return directory if (directory / "tokenizer_config.json").is_file() else None

    return made_once(_place(source, cache, "hf"), opened, build, "write safetensors")


def documents(spec: ModelSpec, bos_token_id: int | None) -> dict[str, Any]:
    """The JSON files beside the tensors; the tokenizer's last, which says that the directory is complete."""
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "vocab_size": spec.vocab_size,
            "max_position_embeddings": spec.max_model_len,
            "rope_theta": spec.rope_theta,
            "rms_norm_eps": spec.rms_norm_eps,
            "tie_word_embeddings": spec.tied_embeddings,
            "bos_token_id": bos_token_id,
            "eos_token_id": list(spec.eos_token_ids),
            "torch_dtype": "bfloat16",
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": spec.max_model_len,
            "clean_up_tokenization_spaces": False,
        },
    }


def _place(source: Path, cache: Path, what: str) -> Path:
    state = source.stat()
    digest = hashlib.sha256(repr((str(source.resolve()), state.st_size, state.st_mtime_ns, what)).encode()).hexdigest()
    return cache / "peers" / f"{source.stem}-{what.partition('-')[0]}-{digest[:12]}"
