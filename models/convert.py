"""Converts a published model, once, into the directory that every worker and router of a host maps or reads.

    weights.safetensors    fp32, fused (models/weights.py)
    config.json            spec, fingerprint, end tokens, context length, source
    tokenizer.json         as `tokenizers` reads it
    chat_template.jinja    only if the model has one

Life of a model directory:
1. Its name is derived from the source's path, size and time of change, so that finding it again reads nothing.
2. One process makes it, the others wait (core/once.py).
3. A directory whose config or weights are incomplete (a full disk, a power cut) counts as absent and is built again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import SetupError
from baton.core.once import made_once
from baton.models.checkpoint import Checkpoint
from baton.models.spec import ModelSpec
from baton.models.weights import weights_bytes, write_weights

FORMAT = 1
"""Raise it when what is written changes: old directories are then ignored and fingerprints differ."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A converted model on this host."""

    name: str
    directory: Path
    spec: ModelSpec
    fingerprint: str
    """Names spec and weights by content: equal on every host that converted the same files. 32 hex digits."""


def convert(source: Path, cache_dir: Path, progress: Progress = lambda _: None) -> ModelFiles:
    """The converted form of a .gguf file or Hugging Face directory, made if it is not there yet.

    Safe to call from many processes at once. Raises SetupError, in one sentence, for anything wrong with the source.
    """
    directory = cache_dir / "models" / f"{model_name(source)}-{_stamp(source)}"

    def build(building: Path) -> None:
        progress(f"converting {source.name}")
        _build(source, building)

    return made_once(directory, _opened, build, f"convert {source}")


def model_name(source: Path) -> str:
    """What a model is called that nobody gave a name."""
    source = source.resolve()
    return source.name if source.is_dir() else source.stem


def _stamp(source: Path) -> str:
    """Changes when the source does. Of a directory, every file counts."""
    source = source.resolve()
    files = sorted(p for p in source.iterdir() if p.is_file()) if source.is_dir() else [source]
    state = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(repr((FORMAT, state)).encode()).hexdigest()[:12]


def _opened(directory: Path) -> ModelFiles | None:
    try:
        document = json.loads((directory / "config.json").read_text())
        spec = ModelSpec.from_json(document["spec"])
        complete = (directory / "weights.safetensors").stat().st_size == weights_bytes(spec)
        return ModelFiles(document["name"], directory, spec, document["fingerprint"]) if complete else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_converted(directory: Path) -> ModelFiles:
    """A directory that `convert` made, on this host. Raises SetupError if it is not one, or incomplete."""
    files = _opened(directory)
    if files is None:
        raise SetupError(f"{directory} is not a complete converted model. Delete it and start again: it is made anew.")
    return files


def _build(source: Path, directory: Path) -> None:
    checkpoint = read_checkpoint(source)
    spec = checkpoint.spec
    write_weights(directory / "weights.safetensors", spec, checkpoint.read)
    (directory / "tokenizer.json").write_text(checkpoint.tokenizer_json(), encoding="utf-8")
    if checkpoint.chat_template is not None:
        (directory / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    document = {
        "format": FORMAT,
        "name": model_name(source),
        "fingerprint": fingerprint(checkpoint),
        "max_model_len": spec.max_model_len,
        "vocab_size": spec.vocab_size,
        "eos_token_ids": list(spec.eos_token_ids),
        "bos_token_id": checkpoint.bos_token_id,
        "source": str(source.resolve()),
        "spec": spec.to_json(),
    }
    (directory / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def read_checkpoint(source: Path) -> Checkpoint:
    # Imported here: finding a converted model needs none of the readers' libraries, and the light install has none.
    try:
        from baton.models.gguf_file import read_gguf
        from baton.models.hf_directory import read_hf
    except ImportError as e:
        raise SetupError(f"converting a model needs {e.name}. Install it: pip install 'baton-serve[engine]'.") from e
    return read_hf(source) if source.is_dir() else read_gguf(source)


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over format, spec and the weight files' bytes, length-prefixed; the first 16 bytes as hex."""
    digest = hashlib.sha256(json.dumps([FORMAT, checkpoint.spec.to_json()], sort_keys=True).encode())
    for path in checkpoint.weight_files:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:32]
