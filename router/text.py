"""Text and tokens of one model, from the three files its directory holds: tokenizer.json, chat_template.jinja,
config.json. No torch, no weights.

What a client may write as control tokens: in /v1/completions and Tokenize everything (the caller writes the whole
prompt, templates included); in chat messages nothing: `<|im_end|>` inside a message stays ten harmless characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from baton.core.errors import InvalidRequest, NotSupported, SetupError
from baton.router.chat_template import ChatTemplate
from baton.router.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer

NONCHARACTERS = tuple(chr(c) for c in range(0xFDD0, 0xFDF0))
"""Unicode reserves these for use inside a program; one that the messages do not contain breaks their control text."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the router has to know of config.json."""

    name: str
    """What the model is called where no setting says."""
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def read(cls, path: Path) -> ModelCard:
        try:
            data: Any = json.loads(path.read_text())
            bos = data.get("bos_token_id")
            return cls(str(data["name"]), str(data["fingerprint"]), int(data["vocab_size"]), int(data["max_model_len"]),
                       tuple(int(i) for i in data["eos_token_ids"]), None if bos is None else int(bos))
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise SetupError(f"{path} cannot be read as a converted model's config.json ({type(e).__name__}: {e}). "
                             "Convert the model again: baton model pull.") from None


class TextCodec:
    """Immutable after construction and safe to share between threads."""

    def __init__(self, model_dir: Path, today: Callable[[], datetime]) -> None:
        """Reads the three files (0.3 s for 49,152 tokens). Raises SetupError naming the file that is missing or bad.

        `today`: the date, for templates that tell it to the model."""
        self.card = ModelCard.read(model_dir / "config.json")
        self._tokenizer = _load(model_dir / "tokenizer.json")
        self._plain = _load(model_dir / "tokenizer.json")
        self._plain.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {token.content: token_id for token_id, token in added.items() if token.special}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._special_ids = frozenset(self._specials.values())
        self.longest_token = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)), default=1)
        """Characters. A text of n characters has at least n / longest_token tokens."""
        self._bytes_of: dict[int, bytes] = {}
        self._byte_level = isinstance(self._tokenizer.decoder, decoders.ByteLevel)
        self._template = self._read_template(model_dir / "chat_template.jinja", today)

    def encode(self, text: str) -> list[int]:
        """Control tokens written out in the text become control tokens."""
        return _ids(self._tokenizer, text)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The templated conversation. Control tokens come from the template alone."""
        if self._template is None:
            raise NotSupported("this model has no chat template. Use /v1/completions.", "messages")
        texts = [text for message in messages for text in message.values()]
        if not any(self._special_text.search(text) for text in texts):
            rendered = self._template.render(messages)
            return _ids(self._tokenizer, rendered, add_special_tokens=False)
        return self._encode_guarded(messages, "".join(texts))

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        """One shot; control tokens are left out unless asked for."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special))

    def spelled(self, token_id: int) -> bytes:
        """What one token stands for, alone: not always whole characters. Control tokens as they are written."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special_ids:
            return str(token).encode()
        if self._byte_level:
            return self._token_bytes(token_id)
        return bytes([int(token[3:5], 16)]) if self._is_byte_piece(token_id) else token.replace("\u2581", " ").encode()

    def detokenizer(self) -> Detokenizer:
        """A new one per request; its pieces joined equal `decode` of all tokens."""
        if self._byte_level:
            return ByteDetokenizer(self._token_bytes)
        return WindowDetokenizer(self.decode, self._is_byte_piece)

    def _encode_guarded(self, messages: Sequence[Mapping[str, str]], all_text: str) -> list[int]:
        """Somebody wrote a control token into a message. A noncharacter put inside keeps it from being read as one
        while the template's own are cut out; it is taken away again before the rest is encoded as plain text."""
        guard = next((c for c in NONCHARACTERS if c not in all_text), None)
        if guard is None:
            raise InvalidRequest("messages hold both control tokens and all 32 Unicode noncharacters U+FDD0..U+FDEF. "
                                 "Remove one of the two.", "messages")
        assert self._template is not None

        def broken(found: re.Match[str]) -> str:
            return found[0][0] + guard + found[0][1:]

        rendered = self._template.render(
            [{name: self._special_text.sub(broken, text) for name, text in message.items()} for message in messages])
        ids: list[int] = []
        position = 0
        for control in [*self._special_text.finditer(rendered), None]:
            plain = rendered[position : control.start() if control else len(rendered)].replace(guard, "")
            ids += _ids(self._plain, plain, add_special_tokens=False)
            if control:
                ids.append(self._specials[control[0]])
                position = control.end()
        return ids

    def _token_bytes(self, token_id: int) -> bytes:
        known = self._bytes_of.get(token_id)
        if known is None:
            known = self._bytes_of[token_id] = self._read_bytes(token_id)
        return known

    def _read_bytes(self, token_id: int) -> bytes:
        """Control tokens and ids without a token read as nothing, like in `decode`."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        raw = [BYTE_OF.get(c) for c in token]
        return token.encode() if None in raw else bytes(b for b in raw if b is not None)

    def _is_byte_piece(self, token_id: int) -> bool:
        token = self._tokenizer.id_to_token(token_id)
        return token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _read_template(self, path: Path, today: Callable[[], datetime]) -> ChatTemplate | None:
        if not path.exists():
            return None
        ids = {"bos_token": self.card.bos_token_id, "eos_token": next(iter(self.card.eos_token_ids), None)}
        tokens = {name: self._tokenizer.id_to_token(i) or "" for name, i in ids.items() if i is not None}
        return ChatTemplate(path.read_text(), tokens, today)


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """As a batch, which lets other threads run meanwhile; `fast` counts no offsets, a fifth of the time."""
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def _load(path: Path) -> Any:
    try:
        return Tokenizer.from_str(path.read_text())
    except Exception as e:  # tokenizers raises no other class
        raise SetupError(f"{path} is not a tokenizer ({e}). Convert the model again: baton model pull.") from None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: itself where it is printable Latin-1, else the next
    free one from U+0100 on (Radford et al. 2019, GPT-2's encoder)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
