"""What is asked: texts of the wished length, prompts that share what they are meant to share, and nothing more."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from baton.bench.load.arrivals import Process
from baton.bench.load.plan import Lengths, Scale, Session, Shape, from_trace, synthetic
from baton.bench.load.prose import Prose
from baton.bench.load.traces import read_trace
from baton.core.errors import SetupError
from baton.models.hash_files import tokenizer_json

HERE = Path(__file__).parent
ONE_EACH = Prose.estimated(1.0)
"""A token per word, so that words can be counted."""


def plan(seed: str = "s", prose: Prose = ONE_EACH, **shape: object) -> list[Session]:
    return synthetic(Shape(**shape), Process("constant"), 10.0, 4.0, prose, seed)  # type: ignore[arg-type]


def first_texts(sessions: list[Session]) -> list[str]:
    return [s.turns[0].text for s in sessions]


def words(text: str) -> list[str]:
    return text.split()


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prose, Callable[[str], int]]:
    """A tokenizer with one token per byte, where words cost from four to eight."""
    home = tmp_path_factory.mktemp("bytes")
    (home / "tokenizer.json").write_text(tokenizer_json())
    tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
    return Prose.counted(home), lambda text: len(tokenizer.encode(text).ids)


@given(num_tokens=st.integers(9, 600), seed=st.integers(0, 99))
def test_a_text_has_exactly_the_tokens_that_were_asked(
    bytewise: tuple[Prose, Callable[[str], int]], num_tokens: int, seed: int
) -> None:
    prose, count = bytewise
    text = prose.text(num_tokens, random.Random(seed))
    assert count(text) == prose.tokens(text) == num_tokens


@pytest.mark.model
@pytest.mark.parametrize("num_tokens", [1, 17, 512, 2048])
def test_a_text_has_exactly_the_tokens_that_were_asked_of_a_real_model(model_dir: Path, num_tokens: int) -> None:
    text = Prose.counted(model_dir).text(num_tokens, random.Random(5))
    assert len(Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(text).ids) == num_tokens


@given(per_word=st.floats(0.5, 9), num_tokens=st.integers(1, 500))
def test_with_a_ratio_a_text_is_within_half_a_word_and_never_empty(per_word: float, num_tokens: int) -> None:
    text = Prose.estimated(per_word).text(num_tokens, random.Random(0))
    assert words(text)
    assert abs(len(words(text)) * per_word - num_tokens) <= max(per_word / 2, per_word - num_tokens) + 1e-6


def test_a_tokenizer_that_is_not_there_is_named_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="there is no tokenizer"):
        Prose.counted(tmp_path)


def test_what_the_endpoint_adds_is_taken_off_every_prompt() -> None:
    framed = Prose.estimated(1.0, frame_tokens=30.0)
    assert {len(words(t)) for t in first_texts(plan(prose=framed, prompt=Lengths(100, 100)))} == {70}


def test_prompts_of_one_seed_repeat_and_those_of_another_share_nothing() -> None:
    assert plan("a") == plan("a")
    ours, others = first_texts(plan("a")), first_texts(plan("b"))
    assert len({t[:60] for t in ours + others}) == len(ours) + len(others)


def test_lengths_are_drawn_from_their_whole_range() -> None:
    sessions = plan(prompt=Lengths(4, 6), output=Lengths(1, 2))
    assert {s.turns[0].prompt_tokens for s in sessions} == {4, 5, 6}
    assert {s.turns[0].output_tokens for s in sessions} == {1, 2}
    assert all(len(words(s.turns[0].text)) == s.turns[0].prompt_tokens for s in sessions)


@pytest.mark.parametrize("text", ["", "0", "5-3", "-4", "x", "3-", "1.5"])
def test_a_length_that_is_none_is_named_in_one_sentence(text: str) -> None:
    if text == "3-":
        assert Lengths.parse(text) == Lengths(3, 3)
        return
    with pytest.raises(SetupError, match="no number of tokens"):
        Lengths.parse(text)


def test_prompts_of_a_group_share_the_prefix_that_was_asked_and_then_part() -> None:
    texts = [words(t) for t in first_texts(plan(prompt=Lengths(40, 40), shared_prefix=0.5, prefix_groups=3))]
    groups = {tuple(t[:20]) for t in texts}
    assert len(groups) == 3
    assert {len(t) for t in texts} == {40}
    assert len({tuple(t[:24]) for t in texts}) == len(texts)


def test_shorter_prompts_of_a_group_take_the_beginning_of_its_prefix() -> None:
    texts = [words(t) for t in first_texts(plan(prompt=Lengths(20, 40), shared_prefix=0.5))]
    longest = max(texts, key=len)
    assert all(t[: len(t) // 2] == longest[: len(t) // 2] for t in texts)


def test_a_chat_has_its_turns_and_each_is_as_long_as_asked() -> None:
    for session in plan(turns=3, think_s=2.5, prompt=Lengths(9, 9)):
        assert [len(words(t.text)) for t in session.turns] == [9, 9, 9]
        assert len({t.text for t in session.turns}) == 3
        assert session.think_s == 2.5


def test_a_replayed_trace_shares_exactly_the_blocks_that_it_shared() -> None:
    sessions = from_trace(read_trace(HERE / "traces/mooncake.jsonl"), Scale(), ONE_EACH, "s")
    texts = [words(s.turns[0].text) for s in sessions]
    assert [len(t) for t in texts] == [1300, 1200, 600, 90, 2048]
    assert [s.turns[0].output_tokens for s in sessions] == [20, 7, 30, 1, 12]
    common = [[len(os.path.commonprefix([a, b])) // 16 * 16 for b in texts] for a in texts]
    assert common[0][1] == 1024  # blocks 0 and 1
    assert common[0][4] == 1024  # block 2 is not full in the first prompt
    assert common[1][2] == 512
    assert common[0][3] == 0


def test_a_scaled_trace_keeps_its_sharing_and_its_limits() -> None:
    scale = Scale(lengths=0.125, max_prompt_tokens=200, max_output_tokens=3)
    sessions = from_trace(read_trace(HERE / "traces/mooncake.jsonl"), scale, ONE_EACH, "s")
    texts = [words(s.turns[0].text) for s in sessions]
    assert [len(t) for t in texts] == [162, 150, 75, 11, 200]
    assert texts[0][:128] == texts[1][:128] == texts[4][:128]
    assert [s.turns[0].output_tokens for s in sessions] == [2, 1, 3, 1, 2]


def test_a_trace_without_blocks_becomes_prompts_that_share_nothing() -> None:
    texts = [s.turns[0].text for s in from_trace(read_trace(HERE / "traces/azure.csv"), Scale(), ONE_EACH, "s")]
    assert [len(words(t)) for t in texts] == [374, 396, 12]
    assert texts[0][:40] != texts[1][:40]
