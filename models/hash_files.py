"""The hash model as files: what a router reads of it, made on the spot. The model itself is models/hash_model.py.

Its name may carry settings: `hash`, or `hash:head_dim=128,step_s=0.004,token_s=0.0008`. head_dim makes blocks bigger
(16 tokens: 512 bytes times head_dim) and tokens different; the others say how long a step takes.

Its tokens are bytes: 0 ends an answer, 1 to 96 are printable ASCII and the newline (all that it ever says), the other
bytes follow, and one control token begins a turn of a chat.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from baton.core.errors import SetupError
from baton.core.layout import KVLayout
from baton.core.once import made_once
from baton.models import hash_model
from baton.models.hash_model import EOS, NUMERICS, VOCABULARY

NAME = "hash"
VERSION = 2
"""Raise it when the same request gets another answer."""
MAX_MODEL_LEN = 8192

_SPOKEN = [*range(0x20, 0x7F), 0x0A]
_BYTES = [*_SPOKEN, *(b for b in range(256) if b not in _SPOKEN)]
"""Byte of token 1, 2, ..."""
END, TURN = "<|end|>", "<|turn|>"
VOCAB_SIZE = 1 + len(_BYTES) + 1
CHAT_TEMPLATE = (
    "{% for message in messages %}" + TURN + "{{ message['role'] + '\\n' + message['content'] }}\n"
    "{% endfor %}" + TURN + "assistant\n\n"
)


@dataclass(frozen=True, slots=True)
class HashSpec:
    """What a ModelSpec is to other models: sizes, and here also how long a step is to take."""

    numerics: ClassVar[str] = NUMERICS
    eos_token_ids: ClassVar[tuple[int, ...]] = (EOS,)
    vocab_size: ClassVar[int] = VOCAB_SIZE

    head_dim: int = 1
    max_model_len: int = MAX_MODEL_LEN
    step_s: float = 0.0
    token_s: float = 0.0
    context_s: float = 0.0
    """For each token of context that a step reads."""

    @classmethod
    def parse(cls, name: str) -> HashSpec:
        """From the model's name. Raises SetupError naming the setting that is wrong."""
        values: dict[str, float] = {}
        kinds: dict[str, type[int] | type[float]] = {
            "head_dim": int, "max_model_len": int, "step_s": float, "token_s": float, "context_s": float,
        }
        for item in filter(None, name.removeprefix(NAME).removeprefix(":").split(",")):
            setting, _, text = item.partition("=")
            try:
                values[setting] = kinds[setting](text)
            except (KeyError, ValueError):
                raise SetupError(f"{item!r} in the model name {name!r} is wrong: it takes numbers for "
                                 f"{', '.join(kinds)}.") from None
        spec = cls(**values)  # type: ignore[arg-type]
        times = all(0 <= t <= 3600 for t in (spec.step_s, spec.token_s, spec.context_s))
        if not (times and 1 <= spec.head_dim <= 4096 and spec.max_model_len >= 2):
            raise SetupError(f"the model name {name!r} has a setting out of range: head_dim is 1 to 4096, "
                             "max_model_len at least 2, and a time 0 to 3600.")
        return spec

    def layout(self, block_size: int, dtype: str = "u64") -> KVLayout:
        """KV is u64 whatever the engine's dtype: nothing is computed in floats."""
        return hash_model.layout(block_size, self.head_dim)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"hash {VERSION} {self.head_dim}".encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class HashFiles:
    """What ModelFiles are to other models."""

    name: str
    directory: Path
    spec: HashSpec
    fingerprint: str


def text_of(token_ids: Iterable[int]) -> str:
    """What the router makes of tokens that the model says: one character each, and nothing of the end."""
    return "".join(chr(_BYTES[t - 1]) for t in token_ids if t != EOS)


def is_hash(name: str) -> bool:
    return name == NAME or name.startswith(f"{NAME}:")


def open_hash(name: str, cache_dir: Path) -> HashFiles:
    """Its files, made if they are not there yet. Raises SetupError for a wrong setting in the name."""
    spec = HashSpec.parse(name)
    stamp = hashlib.sha256(repr((VERSION, spec)).encode()).hexdigest()[:12]

    def opened(directory: Path) -> HashFiles | None:
        complete = (directory / "config.json").exists()
        return HashFiles(NAME, directory, spec, spec.fingerprint) if complete else None

    return made_once(cache_dir / "models" / f"{NAME}-{stamp}", opened, lambda d: _write(spec, d), f"make {name}")


def _write(spec: HashSpec, directory: Path) -> None:
    """The router's three files."""
    document = {
        "name": NAME,
        "fingerprint": spec.fingerprint,
        "max_model_len": spec.max_model_len,
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": [EOS],
        "bos_token_id": None,
        "spec": {"architecture": NAME, **dataclasses.asdict(spec)},
    }
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def tokenizer_json() -> str:
    """One token per byte, as byte-level BPE without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = _letters()
    vocabulary = {END: EOS} | {letters[b]: 1 + i for i, b in enumerate(_BYTES)} | {TURN: VOCAB_SIZE - 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, normalized=False), AddedToken(TURN, normalized=False)])
    return str(tokenizer.to_str())


def _letters() -> dict[int, str]:
    """Byte -> the character that byte-level BPE writes it as: itself where it is printable Latin-1, else the next free
    one from U+0100 on (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}


assert len(_SPOKEN) + 1 == VOCABULARY
