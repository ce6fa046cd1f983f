"""The block hash is what docs/block-hash.md says, vector by vector, and keeps apart what must be apart."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.block_hash import HASH_BYTES, HashScope, block_hashes, extend
from baton.core.layout import Capability, KVLayout

PAGE = (Path(__file__).parents[2] / "docs" / "block-hash.md").read_text(encoding="utf-8")
FOUND = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
assert FOUND is not None, "docs/block-hash.md has no vectors"
VECTORS: dict[str, Any] = json.loads(FOUND[1])
PLAIN = HashScope("m", "fp32", "torch-fp32")
tokens = st.lists(st.integers(0, 1), max_size=12)


@pytest.mark.parametrize("vector", VECTORS["roots"], ids=lambda v: v["root"][:8])
def test_a_root_is_as_published(vector: dict[str, Any]) -> None:
    version, fingerprint, kv_dtype, numerics, salt, adapter = vector["scope"]
    assert HashScope(fingerprint, kv_dtype, numerics, salt, adapter, version).root().hex() == vector["root"]


@pytest.mark.parametrize("vector", VECTORS["chains_of_the_first_root"], ids=lambda v: f"{len(v['tokens'])}tokens")
def test_a_chain_is_as_published(vector: dict[str, Any]) -> None:
    found = block_hashes(PLAIN, vector["tokens"], vector["block_size"])
    assert [h.hex() for h in found] == vector["hashes"]


@given(tokens, st.integers(0, 6))
def test_a_chain_can_be_continued_anywhere(known: list[int], split: int) -> None:
    whole = block_hashes(PLAIN, known, 2)
    head = whole[:split]
    assert head + extend(head[-1] if head else PLAIN.root(), known[len(head) * 2 :], 2) == whole


@given(tokens, tokens)
def test_hashes_are_equal_exactly_as_far_as_the_tokens_are(a: list[int], b: list[int]) -> None:
    for i, (x, y) in enumerate(zip(block_hashes(PLAIN, a, 2), block_hashes(PLAIN, b, 2), strict=False)):
        assert (x == y) == (a[: 2 * i + 2] == b[: 2 * i + 2])
        assert len(x) == HASH_BYTES


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(HashScope)])
def test_every_field_of_the_scope_separates(name: str) -> None:
    other = dataclasses.replace(PLAIN, **{name: 2 if name == "version" else "other"})
    assert other.root() != PLAIN.root()


def test_text_cannot_move_between_two_fields() -> None:
    assert HashScope("ab", "c", "x").root() != HashScope("a", "bc", "x").root()


def test_a_workers_scope_follows_from_its_capability() -> None:
    capability = Capability("name", "print", KVLayout(1, 1, 2, 2, "u64"), 64, 8, numerics="n", hash_version=3)
    assert HashScope.of(capability, "salt", "ad") == HashScope("print", "u64", "n", "salt", "ad", 3)
