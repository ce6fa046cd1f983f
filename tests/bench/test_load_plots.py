"""Pictures of a report; and one sentence where matplotlib is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from baton.bench.load import plots
from baton.bench.load.record import Record, Slo
from baton.bench.load.report import Json, Window, measured
from baton.core.errors import SetupError


def run(rate: float, empty: bool = False) -> Json:
    records = [] if empty else [Record("r", 0, at, 4, 2, at, [at + 0.1, at + rate], at + rate) for at in (0.0, 1.0)]
    figures = measured(records, Window(0.0, 2.0), Slo())
    labels = {"decode": figures, "long": figures}
    return {"rate": rate, "long_rate": rate, **figures, "cpu_cores": None, "labels": labels}


SWEEP = {
    "target": {"model": "m", "url": "http://x"},
    "measuring": {"slo": {"ttft_s": 0.2, "itl_s": None}},
    "runs": [run(2.0), run(1.0), run(3.0, empty=True)],
}
INTERFERENCE = {"systems": {"one": [run(0.5), run(1.0)], "single": [run(0.5)], "other": [run(0.5, empty=True)]}}


@pytest.mark.slow
def test_a_report_becomes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    plots.draw_sweep(SWEEP, tmp_path / "sweep.png")
    plots.draw_interference(INTERFERENCE, tmp_path / "interference.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SetupError, match=r"baton-serve\[bench\]"):
        plots.figure(1)
