"""Text of a wished length in tokens, different each time, the same for the same seed.

Words are joined by spaces, and tokenisers split at spaces: so the tokens of a text are the sum over its words, and a
length is met by adding up. What a word costs is counted with the model's tokenizer where there is one, else taken as
the mean that the endpoint's own `usage` shows for two probes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.core.errors import SetupError

WORDS = (
    "river", "stone", "winter", "letter", "engine", "garden", "signal", "copper", "window", "harbour", "summer",
    "bridge", "market", "forest", "paper", "silver", "morning", "table", "water", "mountain", "number", "story",
    "music", "teacher", "village", "doctor", "machine", "island", "orange", "animal", "castle", "captain", "butter",
    "season", "corner", "planet", "travel", "moment", "picture", "question", "answer", "history", "language",
    "science",
)  # fmt: skip
FILLERS = ("a", "I", ".")
"""Short ends, for tokenizers that split words: the last few tokens of a text that no word fits any more."""
GUESS = 1.3
"""Tokens per word of English where nothing is known."""


@dataclass(frozen=True, slots=True)
class Prose:
    """Writes texts. `costs` is tokens per piece, `frame_tokens` what the endpoint puts around a prompt (a chat
    template, a first token)."""

    costs: Mapping[str, float]
    frame_tokens: float = 0.0

    @classmethod
    def counted(cls, tokenizer_json: Path, frame_tokens: float = 0.0) -> Prose:
        """With the model's own tokenizer: a `tokenizer.json`, or a directory that holds one."""
        from tokenizers import Tokenizer

        path = tokenizer_json / "tokenizer.json" if tokenizer_json.is_dir() else tokenizer_json
        if not path.is_file():
            raise SetupError(f"there is no tokenizer {path}; name a tokenizer.json, or leave --tokenizer out.")
        tokenizer = Tokenizer.from_file(str(path))

        def tokens(text: str) -> int:
            return len(tokenizer.encode(text, add_special_tokens=False).ids)

        # Inside a text: what a tokenizer adds at the beginning of one is no cost of a word.
        fixed = tokens(" river river")
        return cls({piece: tokens(f" river{piece} river") - fixed for piece in _pieces()}, frame_tokens)

    @classmethod
    def estimated(cls, per_word: float, frame_tokens: float = 0.0) -> Prose:
        return cls({f" {word}": per_word for word in WORDS}, frame_tokens)

    def text(self, num_tokens: float, rng: random.Random) -> str:
        """As near to `num_tokens` as the pieces allow, exact where one of them costs 1; never empty."""
        words = [f" {word}" for word in WORDS]
        dearest = max(self.costs[word] for word in words)
        said, left = [rng.choice(words)], float(num_tokens)
        left -= self.costs[said[0]]
        while left >= dearest:
            said.append(rng.choice(words))
            left -= self.costs[said[-1]]
        while fitting := [piece for piece, cost in self.costs.items() if cost <= left]:
            said.append(max(fitting, key=lambda piece: (self.costs[piece], rng.random())))
            left -= self.costs[said[-1]]
        last = min(self.costs, key=self.costs.__getitem__)
        if self.costs[last] / 2 < left:  # only where no piece costs 1
            said.append(last)
        return "".join(said)

    def tokens(self, text: str) -> float:
        """Of a text that was made here."""
        return sum(self._cost(word) for word in text.split())

    def beginning(self, text: str, num_tokens: float) -> str:
        """The words of a text that was made here which fit into `num_tokens`."""
        kept, left = [], num_tokens
        for word in text.split():
            left -= self._cost(word)
            if left < -0.5:
                break
            kept.append(f" {word}")
        return "".join(kept)

    def _cost(self, word: str) -> float:
        bare = word.rstrip(".")
        return self.costs[f" {bare}"] + self.costs.get(".", 0.0) * (len(word) - len(bare))


def every_word(times: int, rng: random.Random) -> str:
    """For probes: each word so many times, in any order, so that what is billed is their mean, and no luck."""
    words = list(WORDS) * times
    rng.shuffle(words)
    return "".join(f" {word}" for word in words)


def _pieces() -> list[str]:
    return [f" {word}" for word in WORDS] + [piece if piece == "." else f" {piece}" for piece in FILLERS]
