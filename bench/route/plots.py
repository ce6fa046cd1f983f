"""The policy tables as pictures: hit rate, mean and p99 TTFT of each policy, side by side in each column of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.bench.load.plots import figure

Row = Mapping[str, Any]

PANELS = (("hit", "prompt tokens not computed", "linear"), ("mean_ttft_s", "mean TTFT, s", "log"),
          ("p99_ttft_s", "p99 TTFT, s", "log"))
"""(figure of a row, its axis, the axis' scale)."""
GROUP_WIDTH = 0.85


def draw(rows: Sequence[Row], path: Path) -> None:
    """Raises SetupError if matplotlib is missing."""
    drawn, axes = figure(len(PANELS))
    columns = list(dict.fromkeys(column(row) for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    width = GROUP_WIDTH / len(policies)
    for ax, (name, words, scale) in zip(axes, PANELS, strict=True):
        for i, policy in enumerate(policies):
            some = [row for row in rows if row["policy"] == policy]
            left = (i + 0.5) * width - GROUP_WIDTH / 2
            ax.plot([columns.index(column(row)) + left for row in some], [row[name] for row in some], "o", label=policy)
        ax.set(ylabel=words, yscale=scale, xticks=range(len(columns)))
        ax.set_xticklabels(columns, fontsize=7)
        ax.grid(visible=False, axis="x")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    about = dict.fromkeys(f"{row['trace']}, {row['num_requests']:,} requests" for row in rows)
    drawn.suptitle("; ".join(about), fontsize=9)
    drawn.savefig(path)


def column(row: Row) -> str:
    """What a column of a table is called."""
    more = [f"{row['routers']} routers"] if row["routers"] > 1 else []
    more += [row["world"]] if row["world"] != "simulated" else []
    return "\n".join([f"{row['workers']} workers", f"load {row['load']:g}", *more])
