"""The hash model: what it must answer depends on all that a hand-off has to carry, and its files serve a router."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime
from pathlib import Path

import pytest

from baton.core.config import ModelConfig
from baton.core.errors import SetupError
from baton.core.request import Choice, Request, SamplingParams
from baton.models.catalog import open_model
from baton.models.hash_files import END, MAX_MODEL_LEN, TURN, VOCAB_SIZE, HashFiles, HashSpec
from baton.models.hash_model import EOS, VOCABULARY, Draw, expected, sample
from baton.router.text import TextCodec

REQUEST = Request("r", (5, 6, 7, 8, 9), SamplingParams(max_tokens=6, ignore_eos=True))


def tokens(request: Request, choice: int = 0, head_dim: int = 1) -> tuple[int, ...]:
    (answer,) = expected(dataclasses.replace(request, choices=(Choice(choice),)), 100, head_dim)
    return answer.token_ids


def sampling(**changed: object) -> Request:
    return dataclasses.replace(REQUEST, sampling=dataclasses.replace(REQUEST.sampling, **changed))  # type: ignore[arg-type]


def test_an_answer_ends_as_a_worker_would_end_it() -> None:
    (answer,) = expected(sampling(max_tokens=500, ignore_eos=False), 1000)
    assert (answer.finish, answer.token_ids.index(EOS)) == ("stop", len(answer.tokens) - 1)
    (cut,) = expected(REQUEST, len(REQUEST.prompt) + 3)
    assert (cut.token_ids, cut.finish) == (tokens(REQUEST)[:3], "length")
    third = tokens(REQUEST)[2]
    (stopped,) = expected(sampling(stop_token_ids=(third,)), 1000)
    assert (stopped.token_ids[-1], stopped.finish) == (third, "stop")


def test_everything_a_hand_off_carries_has_a_say_in_the_tokens() -> None:
    """Each of these is a thing that a hand-off could lose."""
    answers = {
        "plain": tokens(REQUEST),
        "seed": tokens(sampling(seed=7)),
        "choice": tokens(REQUEST, 1),
        "bias": tokens(sampling(logit_bias=((3, 1.0),))),
        "frequency": tokens(sampling(frequency_penalty=0.5)),
        "presence": tokens(sampling(presence_penalty=0.5)),
        "repetition": tokens(sampling(repetition_penalty=1.5)),
        "model": tokens(REQUEST, head_dim=2),
        "prompt": tokens(dataclasses.replace(REQUEST, prompt=(5, 6, 7, 9, 8))),
    }
    assert len(set(answers.values())) == len(answers), answers


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty", "repetition_penalty"])
def test_penalties_see_where_the_prompt_ends_and_each_token_before(name: str) -> None:
    params = dataclasses.replace(REQUEST.sampling, **{name: 1.5})
    drawn = {
        sample(bytes(64), Draw(params, 1, 0, 9, history, border)).token_id
        for history, border in (((5, 6, 7), 2), ((5, 6, 7), 1), ((5, 6), 2), ((5, 6, 7, 7), 2), ((), 0))
    }
    assert len(drawn) >= 4, "two of five may agree by chance among 97"


def test_logprobs_are_those_of_the_raw_state_and_sum_to_one() -> None:
    state = bytes(range(64))

    def logprobs_of(params: SamplingParams) -> dict[int, float]:
        sampled = sample(state, Draw(params, 1, 0, 9, (), 0))
        assert sampled.logprob is not None
        assert len(sampled.logprob.top) == params.logprobs
        assert sampled.logprob.top == tuple(sorted(sampled.logprob.top, key=lambda t: (-t[1], t[0])))
        return {sampled.token_id: sampled.logprob.logprob, **dict(sampled.logprob.top)}

    whole = logprobs_of(SamplingParams(logprobs=VOCABULARY))
    assert math.fsum(map(math.exp, whole.values())) == pytest.approx(1.0, abs=1e-5)
    biased = logprobs_of(SamplingParams(logprobs=3, logit_bias=((4, 9.0),)))
    assert biased.items() <= whole.items(), "logit_bias does not change log-probs"
    assert logprobs_of(SamplingParams(logprobs=0)).items() <= whole.items()
    assert sample(state, Draw(SamplingParams(), 1, 0, 9, (), 0)).logprob is None


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path) -> HashFiles:
    files = open_model(ModelConfig(name="hash:head_dim=128,token_s=0.001", cache_dir=str(tmp_path)))
    assert isinstance(files, HashFiles)
    return files


def test_its_name_sets_the_size_of_its_blocks_and_its_speed(opened: HashFiles, tmp_path: Path) -> None:
    assert opened.spec == HashSpec(head_dim=128, token_s=0.001)
    assert opened.spec.layout(16, "fp32").block_bytes == 64 << 10
    plain = open_model(ModelConfig(name="hash", cache_dir=str(tmp_path)))
    slow = open_model(ModelConfig(name="hash:step_s=0.5", cache_dir=str(tmp_path)))
    assert plain.fingerprint == slow.fingerprint != opened.fingerprint
    assert len({plain.directory, slow.directory, opened.directory}) == 3
    assert open_model(ModelConfig(name="hash", cache_dir=str(tmp_path))).directory == plain.directory


@pytest.mark.parametrize(
    "settings",
    ["head_dim=x", "heads=3", "head_dim=0", "step_s=-1", "token_s=nan", "context_s=-1", "max_model_len=1", "step_s"],
)
def test_a_wrong_setting_in_the_name_is_refused_by_its_name(settings: str, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=f"hash:.*{settings.partition('=')[0]}"):
        open_model(ModelConfig(name=f"hash:{settings}", cache_dir=str(tmp_path)))


def test_the_router_reads_its_files_and_text_survives_there_and_back(opened: HashFiles) -> None:
    codec = TextCodec(opened.directory, datetime.now)
    assert codec.card.fingerprint == opened.fingerprint
    assert (codec.card.vocab_size, codec.card.max_model_len) == (VOCAB_SIZE, MAX_MODEL_LEN)
    assert codec.card.eos_token_ids == (EOS,)
    text = "Hello, wörld\n\t\x00 ☃"
    assert codec.decode(codec.encode(text)) == text
    assert len(codec.encode(text)) == len(text.encode())
    assert sorted({t for b in range(128) for t in codec.encode(chr(b))} | {EOS})[:VOCABULARY] == list(range(VOCABULARY))


def test_what_it_says_is_printable_and_control_tokens_come_from_the_template_alone(opened: HashFiles) -> None:
    codec = TextCodec(opened.directory, datetime.now)
    spoken = codec.decode(range(VOCABULARY))
    assert len(spoken) == VOCABULARY - 1
    assert all(c.isprintable() or c == "\n" for c in spoken)
    chat = codec.encode_chat([{"role": "user", "content": f"a{END}b{TURN}"}])
    assert codec.decode(chat, skip_special=False) == f"{TURN}user\na{END}b{TURN}\n{TURN}assistant\n"
    turns = [t for t in chat if t == VOCAB_SIZE - 1]
    assert (len(turns), chat.count(EOS)) == (2, 0)
