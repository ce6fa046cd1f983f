"""The benches of the index and of large fleets: they run, and their rows say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from baton.bench import route_index, route_scale


def test_the_index_bench_has_a_row_for_each_number_of_workers(tmp_path: Path) -> None:
    route_index.main(["--workers", "4,16", "--chains", "64", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["workers"] for row in rows] == [4, 16]
    for row in rows:
        copies = route_index.CHAIN * (route_index.COPIES - 1) * 64 // route_index.EVERY
        assert row["entries"] == 64 * route_index.CHAIN + copies
        assert row["find_miss_us"] < row["find_full_us"]
        assert 0 < row["dropped_entries"] < row["entries"]
        assert min(row["store_blocks_per_s"], row["drop_ms"], row["bytes_per_entry"]) > 0


def test_the_scale_bench_asks_a_fleet_of_each_size_with_prompts_of_each_length(tmp_path: Path) -> None:
    route_scale.main([
        "--workers", "6,40", "--tokens", "256,512", "--requests", "3", "--json", str(tmp_path / "rows.json"),
    ])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["workers"], row["tokens"]) for row in rows] == [(6, 256), (6, 512), (40, 256), (40, 512)]
    assert all(row["request_us"] > row["hash_us"] > 0 for row in rows)
    assert all(row["index_entries"] > row["workers"] * route_scale.OWN_BLOCKS for row in rows)
