"""Prefixes on their way against a naive model: the prompts in flight, each compared block by block."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.core.block_hash import BlockHash, HashScope, block_hashes
from baton.router.coming import STRIDE, Coming

SCOPE = HashScope("f00d", "fp32", "toy")
TOKENS = st.lists(st.integers(0, 1), max_size=24)


def hashes(tokens: list[int]) -> list[BlockHash]:
    return block_hashes(SCOPE, tokens, 2)


def common(a: list[BlockHash], b: list[BlockHash]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    st.lists(st.tuples(st.sampled_from(["b0", "b1", "b2"]), st.integers(0, 5), TOKENS, TOKENS), max_size=20),
    st.integers(1, 4),
)
def test_it_answers_like_a_list_of_the_prompts_in_flight(
    steps: list[tuple[str, int, list[int], list[int]]], stride: int
) -> None:
    coming = Coming(stride)
    prompts: dict[int, tuple[str, list[BlockHash]]] = {}
    for boot, key, tokens, asked in steps:
        if prompts.pop(key, None) is None:
            prompts[key] = boot, hashes(tokens)
            coming.expect(boot, key, hashes(tokens))
        else:
            coming.settle(key)
        truth: dict[str, int] = {}
        for where, prompt in prompts.values():
            blocks = common(prompt, hashes(asked)) // stride * stride
            truth[where] = max(truth.get(where, 0), blocks)
        found = coming.match(hashes(asked))
        assert found == {where: n for where, n in truth.items() if n}
        assert list(found.values()) == sorted(found.values(), reverse=True), "most first"
    for key in prompts:
        coming.settle(key)
    assert coming.num_entries == 0


def test_the_end_of_one_prompt_leaves_the_prefix_to_the_others_that_bring_it() -> None:
    coming, prefix = Coming(), hashes([0, 1] * 2 * STRIDE)
    coming.expect("b0", "first", prefix)
    coming.expect("b0", "second", prefix[:STRIDE])
    assert coming.match(prefix) == {"b0": 2 * STRIDE}
    coming.settle("first")
    coming.settle("first")
    assert coming.match(prefix) == {"b0": STRIDE}
    coming.settle("second")
    assert coming.match(prefix) == {}
