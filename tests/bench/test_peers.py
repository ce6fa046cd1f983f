"""`baton bench peers`, its arithmetic: what counts as reached, what a machine allows, what is taken from answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.bench.load.record import Record
from baton.bench.peers import bars
from baton.bench.peers.bars import Bar, verdicts
from baton.bench.peers.command import BATON_FORMS, PEERS, Wanted
from baton.bench.peers.limits import Limits, kv_bytes_per_token, prefill_s, roofline, step_s, weight_bytes
from baton.bench.peers.report import ROW_OF, cell, markdown, middle_limits
from baton.bench.peers.rows import HOT, ROWS, Row, figure, pss_kb, quick
from baton.bench.peers.systems import baton_apart
from baton.core.errors import SetupError
from baton.models.spec import ModelSpec

SMOLLM2 = ModelSpec("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, 1e5, 1e-5, True, (2,))
LIMITS = Limits(16.0, 31.0, {"bf16": 414.0, "int8": 800.0, "int4": 800.0})
"""Of the Zen 4 machine that the peers were first measured on; int8 is a guess."""


def sample(system: str, row: str, value: float | None, number: int = 0, **more: Any) -> dict[str, Any]:
    return {"system": system, "row": row, "round": number, "value": value, **more}


def judged(
    monkeypatch: pytest.MonkeyPatch, bar: Bar, mine: list[float], theirs: list[float], roof: float | None
) -> Any:
    """The verdict on one bar; values are of rounds 0, 1, ..."""
    monkeypatch.setattr(bars, "BARS", (bar,))
    samples = [sample(bar.system, bar.row, value, n) for n, value in enumerate(mine)]
    samples += [sample(bar.peer, bar.row, value, n) for n, value in enumerate(theirs)]
    (verdict,) = verdicts(samples, ROW_OF, {} if roof is None else {(bar.system, bar.row): roof})
    return verdict


# ---- bars ------------------------------------------------------------------------------------------------------------

MORE = Bar("decode_1", "baton int8", "llama.cpp Q8_0", 1.25)
LESS = Bar("prefix_hit", "baton bf16", "llama.cpp BF16", 1.0)


@pytest.mark.parametrize(
    ("bar", "mine", "theirs", "roof", "met"),
    [
        (MORE, 125.0, 100.0, None, True),
        (MORE, 124.0, 100.0, None, False),
        (MORE, 124.0, 100.0, 155.0, True),
        (MORE, 123.0, 100.0, 155.0, False),
        (MORE, 125.0, 100.0, 1000.0, True),
        (LESS, 20.0, 20.0, None, True),
        (LESS, 21.0, 20.0, None, False),
        (LESS, 21.0, 20.0, 17.0, True),
        (LESS, 22.0, 20.0, 17.0, False),
        (LESS, 19.0, 20.0, 1.0, True),
    ],
)
def test_a_bar_is_the_ratio_or_80_percent_of_the_roofline_whichever_is_easier(
    bar: Bar, mine: float, theirs: float, roof: float | None, met: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert judged(monkeypatch, bar, [mine], [theirs], roof).met is met


def test_a_ratio_compares_neighbours_of_one_round_and_then_takes_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine halved its speed in the second round: a ratio of pooled figures would mix the two."""
    verdict = judged(monkeypatch, MORE, [300.0, 150.0, 270.0], [200.0, 100.0], None)
    assert verdict.ratio == 1.5
    assert (verdict.reached, verdict.needed) == (225.0, 1.25 * 150)


def test_a_bar_without_one_of_its_sides_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "BARS", (MORE,))
    alone = [sample(MORE.system, MORE.row, 100.0), sample(MORE.peer, MORE.row, None, failed="http 500")]
    assert list(verdicts(alone, ROW_OF, {})) == []


def test_every_bar_is_about_a_row_and_systems_that_exist() -> None:
    named = {f"baton {form}" for form in BATON_FORMS} | {bars.APART, "vllm bf16"}
    named |= {f"llama.cpp {form}" for form in ("BF16", "Q8_0", "Q4_0")}
    for bar in bars.BARS:
        assert bar.row in ROW_OF
        assert {bar.system, bar.peer} <= named


def test_the_default_stack_has_every_figure_but_those_of_the_longest_row_and_the_engine_alone() -> None:
    apart = baton_apart("bf16", 2, ())
    assert {row.name for row in ROWS} - apart.rows == {"out_32", "start"}
    assert apart.name == bars.APART


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_the_roofline_of_a_small_batch_is_reading_weights_and_kv_once() -> None:
    num_bytes = weight_bytes(SMOLLM2, "bf16") + (32 + 64) * kv_bytes_per_token(SMOLLM2)
    assert roofline(ROW_OF["decode_1"], SMOLLM2, LIMITS, "bf16") == pytest.approx(31e9 / num_bytes)
    assert kv_bytes_per_token(SMOLLM2) == 23_040
    assert 110 < 31e9 / num_bytes < 116, "269 MB at 31 GB/s"


def test_the_roofline_of_a_prompt_is_multiplying_at_the_peak() -> None:
    """By hand: 212 million operations a token, a triangle of attention, the LM head once; at 414 GFLOP/s."""
    linear = 2 * 106_168_320 * 2048 + 2 * 49152 * 576
    attention = 4 * 30 * 9 * 64 * 2048 * 2049 / 2
    found = roofline(ROW_OF["prefill_2048"], SMOLLM2, LIMITS, "bf16")
    assert found == pytest.approx(2048 / ((linear + attention) / 414e9))
    assert found == pytest.approx(1460, rel=0.02)


def test_a_large_batch_is_bound_by_multiplying_and_a_small_one_by_reading() -> None:
    slower = Limits(16.0, 31.0, {"bf16": 207.0})
    assert step_s(SMOLLM2, slower, "bf16", 1, 128) == step_s(SMOLLM2, LIMITS, "bf16", 1, 128)
    kv_s = 8 * 1000 * kv_bytes_per_token(SMOLLM2) / 31e9
    reading_s = step_s(SMOLLM2, LIMITS, "bf16", 8, 1000) - step_s(SMOLLM2, LIMITS, "bf16", 8, 0)
    assert reading_s == pytest.approx(kv_s), "each of eight sequences reads its own KV"
    assert step_s(SMOLLM2, slower, "bf16", 256, 0) == pytest.approx(2 * step_s(SMOLLM2, LIMITS, "bf16", 256, 0))


def test_cached_tokens_are_read_and_not_multiplied() -> None:
    fast = Limits(16.0, 31.0, {"bf16": 2000.0})
    cold, hot = prefill_s(SMOLLM2, fast, "bf16", 2048), prefill_s(SMOLLM2, fast, "bf16", 2048, 2032)
    assert cold > 20 * hot
    assert hot == pytest.approx((weight_bytes(SMOLLM2, "bf16") + 2032 * 23_040) / 31e9)
    assert roofline(ROW_OF["prefix_hit"], SMOLLM2, fast, "bf16") == pytest.approx(1e3 * hot)


def test_output_at_a_concurrency_pays_for_the_prompts_too() -> None:
    row = ROW_OF["out_32"]
    whole_s = 32 * prefill_s(SMOLLM2, LIMITS, "int8", 128) + 128 * step_s(SMOLLM2, LIMITS, "int8", 32, 128 + 64)
    assert roofline(row, SMOLLM2, LIMITS, "int8") == pytest.approx(32 * 128 / whole_s)


def test_what_no_limit_bounds_has_no_roofline() -> None:
    unbound = {row.name for row in ROWS if roofline(row, SMOLLM2, LIMITS, "bf16") is None}
    assert unbound == {"itl_long", "start", "memory"}


def test_a_peak_that_one_round_reached_is_one_that_the_machine_has() -> None:
    seen = [{"read_1_gb_s": 16.0, "read_gb_s": 25.0, "gemm_gflop_s": {"bf16": 400.0, "int8": 500.0}},
            {"read_1_gb_s": 12.0, "read_gb_s": 31.0, "gemm_gflop_s": {"bf16": 300.0, "int8": 600.0}}]  # fmt: skip
    assert middle_limits(seen) == Limits(16.0, 31.0, {"bf16": 400.0, "int8": 600.0})
    assert middle_limits([]) is None


# ---- figures ---------------------------------------------------------------------------------------------------------


def record(sent_s: float, *event_s: float, **more: Any) -> Record:
    """Meant to leave long before it was sent, as all in a closed loop."""
    return Record("requests", 0, 0.0, 512, len(event_s), sent_s, list(event_s), event_s[-1], **more)


def test_a_closed_loop_counts_from_when_a_request_was_sent_and_leaves_the_warm_up_out() -> None:
    row = Row("p", "p", "tok/s", True, 512, 1, 1, 4, warm_up=1, value=ROW_OF["prefill_512"].value)
    slow, *rest = [record(10.0, 19.0), record(20.0, 20.5), record(30.0, 30.25), record(40.0, 41.0, prompt_tokens=514)]
    found = figure(row, [slow, *rest])
    assert found["value"] == 512 / 0.5
    assert found["requests"] == 3


def test_decode_leaves_the_first_token_out() -> None:
    row = ROW_OF["decode_1"]
    answers = [record(0.0, 5.0, 5.5, 6.0), record(10.0, 10.1, 10.3, 10.6), record(20.0, 29.0, 29.25, 29.5)]
    assert figure(row, [answers[0], *answers])["value"] == pytest.approx(4.0)


def test_output_is_counted_from_the_first_request_to_the_last_token() -> None:
    found = figure(ROW_OF["out_8"], [record(1.0, 2.0, 3.0), record(1.5, 4.0, 5.0, usage_output_tokens=6)])
    assert found["value"] == (2 + 6) / (5.0 - 1.0)


def test_a_prefix_hit_is_of_prompts_that_were_sent_before() -> None:
    row = ROW_OF["prefix_hit"]
    assert row.again == HOT == 2
    records = [record(0.0, 4.0, cached_tokens=0), record(5.0, 5.25, cached_tokens=2032),
               record(6.0, 6.25, cached_tokens=2032), record(7.0, 9.0), record(10.0, 10.5), record(11.0, 11.25)]
    found = figure(row, records)
    assert (found["value"], found["cold_ms"], found["cached_tokens"]) == (250.0, 3000.0, 2032)


def test_a_row_with_a_failed_request_has_no_figure() -> None:
    broken = record(3.0, 4.0)
    broken.error, broken.message = "http 500", "no room"
    found = figure(ROW_OF["out_8"], [record(1.0, 2.0), broken])
    assert found == {"value": None, "failed": "http 500: no room"}


def test_a_quick_row_still_has_requests_that_count() -> None:
    for row in ROWS:
        assert quick(row).num_requests > row.warm_up or not row.asks
    assert quick(ROW_OF["out_32"]).num_requests == ROW_OF["out_32"].num_requests / 2


def test_pss_is_the_line_of_the_sum() -> None:
    assert pss_kb("55f0-7ffe ---p 00000000 00:00 0    [rollup]\nRss:  900 kB\nPss:   123 kB\nPss_Dirty:  7 kB\n") == 123


# ---- choosing and telling --------------------------------------------------------------------------------------------


def test_only_and_skip_choose_by_whose_which_format_and_which_row() -> None:
    everything = Wanted.chosen([], [], False)
    assert (everything.peers, everything.forms) == (frozenset(PEERS), frozenset(BATON_FORMS))
    assert [row.name for row in everything.rows] == [row.name for row in ROWS]
    assert everything.apart
    assert everything.limits
    some = Wanted.chosen(["baton", "vllm", "decode_1", "memory"], ["int4", "limits"], False)
    assert (some.peers, some.forms) == ({"baton", "vllm"}, {"bf16", "int8"})
    assert [row.name for row in some.rows] == ["decode_1", "memory"]
    assert some.apart
    assert not some.limits
    with pytest.raises(SetupError, match="'int3' names nothing"):
        Wanted.chosen([], ["int3"], False)


def report(samples: list[dict[str, Any]], limits: list[Any]) -> dict[str, Any]:
    systems = [{"name": name, "peer": name.split()[0], "form": form, "apart": False}
               for name, form in (("baton int8", "int8"), ("llama.cpp Q8_0", "int8"))]  # fmt: skip
    made = {"threads": 2, "spec": SMOLLM2.to_json(), "limits": limits, "systems": systems, "samples": samples}
    loaded: dict[str, Any] = json.loads(json.dumps(made))
    return loaded


def test_the_tables_say_figures_spread_roofline_bars_and_what_disturbed() -> None:
    quiet, busy = ({"cpu_cores": {"client": 0.1, "server": 1.5, "others": others}} for others in (0.01, 0.5))
    limits = {"read_1_gb_s": 16.0, "read_gb_s": 31.0, "gemm_gflop_s": {"bf16": 414.0, "int8": 800.0}}
    samples = [
        sample("baton int8", "decode_1", 180.0, 0, **quiet), sample("baton int8", "decode_1", 190.0, 1, **quiet),
        sample("llama.cpp Q8_0", "decode_1", 130.0, 0, **busy), sample("llama.cpp Q8_0", "decode_1", 140.0, 1, **quiet),
        sample("llama.cpp Q8_0", "out_8", None, 0, failed="http 500: no room", **quiet),
        sample("baton int8", "memory", 900.0, 1, processes={"7 python": 900.0}),
    ]  # fmt: skip
    text = "\n".join(markdown(report(samples, [limits])))
    assert "| baton int8 | 185 (180-190) |" in text
    assert "| llama.cpp Q8_0 | 135* (130-140) | failed |" in text
    assert "llama.cpp Q8_0, out_8, round 0: http 500: no room" in text
    assert "in 1 of 6 measurements: 0.50 cores" in text
    assert "| decode, batch 1 | baton int8 | 185 tok/s | 2" in text
    assert "at least 1.25x llama.cpp Q8_0 | 1.37x | 185 | 169 |" in text
    assert "7 python 900" in text
    assert cell(samples, "baton int8", "out_8") == ""


def test_a_run_without_limits_has_bars_by_ratio_alone() -> None:
    samples = [sample("baton int8", "decode_1", 180.0), sample("llama.cpp Q8_0", "decode_1", 160.0)]
    text = "\n".join(markdown(report(samples, [])))
    assert "| 1.12x | 180 | 200 |  | 200 | **no** |" in text
    assert "| roofline |" not in text
