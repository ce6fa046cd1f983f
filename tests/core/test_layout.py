"""The capability document: every field of it either keeps a pair apart when it differs, or is listed here with the
reason why it may differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from baton.core.layout import (
    CONVERT_KV,
    CONVERTIBLE,
    FEATURES,
    HANDOFF_VERSION,
    HASH_VERSION,
    PROTOCOL_VERSION,
    Capability,
    KVLayout,
    difference,
    stored_alike,
)

MINE = Capability(
    model="smollm2-135m",
    model_fingerprint="f00d",
    layout=KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="fp32"),
    max_model_len=8192,
    num_blocks=512,
    eos_token_ids=(0, 2),
    transports=(("shm", b"here"), ("tcp", b"127.0.0.1:9")),
)

REFUSED: dict[str, list[Any]] = {
    "model_fingerprint": ["beef", "f00D", ""],
    "numerics": ["torch-bf16", "triton-fp32"],
    "hash_version": [HASH_VERSION + 1, 0],
    "eos_token_ids": [(0,), (0, 2, 3), (), (1, 2)],
    "features": [FEATURES[:-1], (*FEATURES, "draft"), ()],
    "protocol_versions": [(PROTOCOL_VERSION + 1,), (PROTOCOL_VERSION - 1,), ()],
    "handoff_versions": [
        (HANDOFF_VERSION + 1,),
        (HANDOFF_VERSION - 1,),
        (HANDOFF_VERSION, HANDOFF_VERSION + 1),  # it reads ours, and writes what we cannot read
        (),
    ],
    "transports": [(("nixl", b""),), (("nixl", b""), ("ucx", b"")), ()],
    "layout.num_layers": [29, 60],
    "layout.num_kv_heads": [1, 9],
    "layout.head_dim": [32, 128],
    "layout.block_size": [32, 48],
    "layout.dtype": ["fp16", "u64"],
}
MAY_DIFFER: dict[str, tuple[Any, str]] = {
    "model": ("the-same-weights-by-another-name", "a name; the fingerprint says whether the weights are the same"),
    "max_model_len": (2048, "a limit of that worker alone: the router asks it no more than it holds"),
    "num_blocks": (64, "a limit of that worker alone: credit and refusals look after it"),
    "layout": (MINE.layout, "looked at field by field"),
}
MAY_VARY: list[tuple[str, Any, str]] = [
    ("transports", (("tcp", b"elsewhere"),), "one in common is enough, and an advert is the worker's own"),
    ("transports", (("tcp", b""), ("shm", b"")), "the order is a preference; the pair's handshake measures"),
    ("eos_token_ids", (2, 0), "a set"),
    ("features", FEATURES[::-1], "a set"),
    ("protocol_versions", (PROTOCOL_VERSION, PROTOCOL_VERSION + 1), "both speak ours"),
    ("handoff_versions", (HANDOFF_VERSION - 1, HANDOFF_VERSION), "both read what the other writes"),
]


def changed(name: str, value: Any) -> Capability:
    outer, _, inner = name.partition(".")
    if inner:
        return dataclasses.replace(MINE, layout=dataclasses.replace(MINE.layout, **{inner: value}))
    return dataclasses.replace(MINE, **{outer: value})


def fields() -> list[str]:
    return [f.name for f in dataclasses.fields(Capability)] + [f"layout.{f.name}" for f in dataclasses.fields(KVLayout)]


@pytest.mark.parametrize("name", fields())
def test_every_field_is_either_refused_when_it_differs_or_listed_with_a_reason(name: str) -> None:
    assert (name in REFUSED) != (name in MAY_DIFFER), f"say in this test what becomes of a pair that differs in {name}"


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in REFUSED.items() for v in values])
def test_a_pair_that_differs_in_one_field_is_kept_apart_and_the_field_is_named(name: str, value: Any) -> None:
    theirs = changed(name, value)
    for pair in ((MINE, theirs), (theirs, MINE)):
        why = difference(*pair)
        assert why is not None
        assert why.startswith(f"{name}: "), why


def test_at_least_twenty_mutations_are_refused() -> None:
    assert sum(map(len, REFUSED.values())) >= 20


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n, (v, _) in MAY_DIFFER.items()] + [(n, v) for n, v, _ in MAY_VARY],
)
def test_what_may_differ_keeps_nobody_apart(name: str, value: Any) -> None:
    theirs = changed(name, value)
    assert difference(MINE, theirs) is None
    assert difference(theirs, MINE) is None


def test_both_values_are_named() -> None:
    assert difference(MINE, changed("layout.block_size", 32)) == "layout.block_size: 16 vs 32"
    assert difference(MINE, changed("transports", (("ucx", b""),))) == (
        "transports: ['shm', 'tcp'] vs ['ucx'] (none in common)"
    )


def test_element_types_that_are_converted_fit_where_both_workers_say_so() -> None:
    def with_dtype(dtype: str, *features: str) -> Capability:
        layout = dataclasses.replace(MINE.layout, dtype=dtype)
        return dataclasses.replace(MINE, layout=layout, features=(*FEATURES, *features))

    for dtype in CONVERTIBLE:
        lender, reader = with_dtype(dtype, CONVERT_KV), with_dtype("bf16", CONVERT_KV)
        assert difference(lender, reader) is None
        assert difference(reader, lender) is None
        assert stored_alike(lender, reader) == (dtype == "bf16")
    other = with_dtype("int8", CONVERT_KV)
    assert difference(with_dtype("bf16"), with_dtype("int8")) == (
        "layout.dtype: bf16 vs int8 (handoff.convert_kv lets them pair)")
    assert str(difference(with_dtype("bf16"), other)).startswith("features: ")
    assert difference(with_dtype("u64", CONVERT_KV), other) == "layout.dtype: u64 vs int8"
    wider = dataclasses.replace(other, layout=dataclasses.replace(other.layout, block_size=32))
    assert difference(with_dtype("bf16", CONVERT_KV), wider) == "layout.block_size: 16 vs 32"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_parts_of_all_layers_are_the_block(dtype: str) -> None:
    layout = dataclasses.replace(MINE.layout, dtype=dtype)
    ends = [layout.part_of(layer, layer + 1) for layer in range(layout.num_layers)]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == layout.block_bytes == layout.part_of(0, layout.num_layers)[1]
