"""The same figures as pictures. matplotlib is an extra: everything else works without it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baton.bench.load.interference import curve
from baton.bench.load.report import Json
from baton.core.errors import SetupError

DPI = 120


def figure(columns: int) -> tuple[Any, Any]:
    """A figure and its row of axes. Raises SetupError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        raise SetupError(
            "plots need matplotlib; install it (pip install 'baton-serve[bench]'), or leave --plot out."
        ) from None
    drawn = Figure(figsize=(4.6 * columns, 3.6), layout="constrained", dpi=DPI)
    axes = drawn.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.grid(alpha=0.3)
    return drawn, axes


def draw_sweep(report: Json, path: Path) -> None:
    """Goodput, TTFT and ITL over the offered rate."""
    drawn, (goodput, ttft, itl) = figure(3)
    runs = sorted(report["runs"], key=lambda run: run["offered_rate"])
    rates = [run["offered_rate"] for run in runs]
    goodput.plot(rates, rates, ":", color="grey", label="offered")
    goodput.plot(rates, [run["achieved_rate"] for run in runs], "o-", label="achieved")
    goodput.plot(rates, [run["goodput_rate"] for run in runs], "s-", label="within the SLO")
    goodput.set(xlabel="offered requests/s", ylabel="requests/s", ylim=(0, None))
    goodput.legend()
    for ax, name in ((ttft, "ttft_s"), (itl, "itl_s")):
        ax.set(xlabel="offered requests/s", ylabel=f"{name[:-2].upper()}, ms", yscale="log")
        percentiles_over(ax, rates, [run[name] for run in runs])
        if report["measuring"]["slo"][name] is not None:
            ax.axhline(report["measuring"]["slo"][name] * 1e3, ls="--", color="grey", label="SLO")
        fit(ax)
    drawn.suptitle(f"{report['target']['model']} at {report['target']['url']}", fontsize=9)
    drawn.savefig(path)


def percentiles_over(ax: Any, across: Sequence[float], figures: Sequence[Json | None]) -> None:
    """Points where there is something; p50 and p99 of one curve."""
    seen = [(x, f) for x, f in zip(across, figures, strict=True) if f is not None]
    for percent in ("p50", "p99"):
        ax.plot([x for x, _ in seen], [f[percent] * 1e3 for _, f in seen], "o-", label=percent)


def fit(ax: Any) -> None:
    """Limits around what is there, which may be one point or none, and what the lines are."""
    if seen := [y for line in ax.lines for y in line.get_ydata()]:
        ax.set_autoscaley_on(False)  # it would look first, and warn about a single value
        ax.set_ylim(min(seen) / 1.5, max(seen) * 1.5)
        ax.legend(fontsize=8)


def draw_interference(report: Json, path: Path) -> None:
    """ITL of the decode load and TTFT of the long prompts over the rate of long prompts, a colour per system; medians
    of the repeats and their extremes."""
    drawn, (itl, ttft) = figure(2)
    for ax, what in ((itl, "ITL of the decode load, ms"), (ttft, "TTFT of the long prompts, ms")):
        ax.set(xlabel="long prompts/s", ylabel=what, yscale="log")
    for number, (name, runs) in enumerate(report["systems"].items()):
        points = curve(runs)
        for ax, measure, style in ((itl, "itl_p50", ":"), (itl, "itl_p99", "-"), (ttft, "ttft_p99", "-")):
            seen = [(p.long_rate, values) for p in points if (values := getattr(p, measure))]
            middle = [statistics.median(values) for _, values in seen]
            reach = [[m - min(v) for m, (_, v) in zip(middle, seen, strict=True)],
                     [max(v) - m for m, (_, v) in zip(middle, seen, strict=True)]]  # fmt: skip
            ax.errorbar([x for x, _ in seen], middle, reach, fmt=f"o{style}", color=f"C{number}", capsize=3,
                        label=f"{name} {measure[-3:]}")  # fmt: skip
    for ax in (itl, ttft):
        fit(ax)
    drawn.savefig(path)
