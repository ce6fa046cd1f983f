"""The report as tables in Markdown and as a picture. Everything is computed from the samples that `--json` keeps."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from baton.bench.load import plots
from baton.bench.load.report import QUIET_CORES, Json, others_cores
from baton.bench.peers.bars import Verdict, easier, values, verdicts
from baton.bench.peers.limits import Limits, roofline
from baton.bench.peers.rows import ROWS, Row
from baton.models.spec import ModelSpec

CONTENDED = "*"
ROW_OF: Mapping[str, Row] = {row.name: row for row in ROWS}
DRAWN = ("prefill_512", "prefill_2048", "decode_1", "out_8", "out_32", "prefix_hit")


def markdown(report: Json) -> Iterator[str]:
    spec, limits = ModelSpec.from_json(report["spec"]), middle_limits(report["limits"])
    samples = report["samples"]
    rooflines = limits_of(report["systems"], spec, limits) if limits else {}
    if limits:
        yield from limits_table(report["limits"], limits, report["threads"])
    yield from figures_table(samples, report["systems"])
    yield from notes(samples)
    if rooflines:
        yield from roofline_table(samples, rooflines)
    yield from bars_table(list(verdicts(samples, ROW_OF, rooflines)))
    yield from memory_table(samples)


def middle_limits(found: Sequence[Json]) -> Limits | None:
    """Of all rounds; a peak that one of them reached is one that the machine has."""
    if not found:
        return None
    seen = [Limits(**limits) for limits in found]
    peaks = {form: max(limits.gemm_gflop_s[form] for limits in seen) for form in seen[0].gemm_gflop_s}
    return Limits(max(s.read_1_gb_s for s in seen), max(s.read_gb_s for s in seen), peaks)


def limits_of(systems: Sequence[Json], spec: ModelSpec, limits: Limits) -> dict[tuple[str, str], float]:
    """(system, row) -> roofline, of those that have one."""
    found = {}
    for system in systems:
        for row in ROWS:
            limit = roofline(row, spec, limits, system["form"])
            if limit is not None and not system["apart"]:
                found[system["name"], row.name] = limit
    return found


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def limits_table(found: Sequence[Json], limits: Limits, threads: int) -> Iterator[str]:
    seen = [Limits(**item) for item in found]

    def line(what: str, best: float, each: Iterable[float], unit: str) -> tuple[str, str, str]:
        return what, f"{number(best)} {unit}", " ".join(number(value) for value in each)

    yield from table(("limit", "best", "each round"), (
        line("read bandwidth, 1 thread", limits.read_1_gb_s, (s.read_1_gb_s for s in seen), "GB/s"),
        line(f"read bandwidth, {threads} threads", limits.read_gb_s, (s.read_gb_s for s in seen), "GB/s"),
        *(
            line(f"GEMM peak, {form}", limits.gemm_gflop_s[form], (s.gemm_gflop_s[form] for s in seen), "GFLOP/s")
            for form in ("bf16", "int8")
        ),
    ))  # fmt: skip


def figures_table(samples: Sequence[Json], systems: Sequence[Json]) -> Iterator[str]:
    """Medians and extremes of the rounds."""
    there = {s["row"] for s in samples}
    rows = [row for row in ROWS if row.name in there]
    yield from table(
        ("", *(f"{row.title}, {row.unit}" for row in rows)),
        ((system["name"], *(cell(samples, system["name"], row.name) for row in rows)) for system in systems),
    )


def cell(samples: Sequence[Json], system: str, row: str) -> str:
    seen = values(samples, system, row)
    if not seen:
        return "failed" if any((s["system"], s["row"]) == (system, row) for s in samples) else ""
    mark = CONTENDED if any(contended(s) for s in samples if (s["system"], s["row"]) == (system, row)) else ""
    reach = f" ({number(min(seen))}-{number(max(seen))})" if len(seen) > 1 else ""
    return f"{number(statistics.median(seen))}{mark}{reach}"


def contended(sample: Json) -> bool:
    return others_cores({"cpu_cores": sample.get("cpu_cores")}) > QUIET_CORES


def notes(samples: Sequence[Json]) -> Iterator[str]:
    """What makes figures less than they look, and what belongs to them."""
    busy = [others_cores(s) for s in samples if contended(s)]
    if busy:
        yield (f"{CONTENDED} Other processes used more than {QUIET_CORES:g} cores in {len(busy)} of {len(samples)} "
               f"measurements: {statistics.median(busy):.2f} cores in the median of these, {max(busy):.2f} at most.\n")
    for s in samples:
        if s.get("failed"):
            yield f"- {s['system']}, {s['row']}, round {s['round']}: {s['failed']}"
    for system, seen in grouped([s for s in samples if s.get("cold_ms")]).items():
        cached = seen[-1].get("cached_tokens")
        yield (f"- {system}: a prefix hit's prompt takes {number(statistics.median(s['cold_ms'] for s in seen))} ms "
               f"cold; {'unknown' if cached is None else f'{cached:.0f}'} tokens cached when hot")
    for system, seen in grouped([s for s in samples if s.get("long_rate")]).items():
        yield (f"- {system}: ITL p50 {number(statistics.median(s['itl_p50_ms'] for s in seen))} ms beside "
               f"{number(statistics.median(s['long_rate'] for s in seen))} long prompts a second")
    for system, seen in grouped([s for s in samples if s.get("stack_s")]).items():
        yield f"- {system}: {number(statistics.median(s['stack_s'] for s in seen))} s with router and registry"
    yield ""


def roofline_table(samples: Sequence[Json], rooflines: Mapping[tuple[str, str], float]) -> Iterator[str]:
    found = []
    for (system, name), limit in rooflines.items():
        if not (seen := values(samples, system, name)):
            continue
        row, reached = ROW_OF[name], statistics.median(seen)
        share = reached / limit if row.higher_is_better else limit / reached
        figures = (f"{number(value)} {row.unit}" for value in (reached, limit))
        found.append((row.title, system, *figures, f"{share:.0%}"))
    yield from table(("row", "system", "reached", "roofline", "of it"), sorted(found))


def bars_table(found: Sequence[Verdict]) -> Iterator[str]:
    def line(verdict: Verdict) -> tuple[str, ...]:
        bar, row = verdict.bar, ROW_OF[verdict.bar.row]
        sign = "at least" if row.higher_is_better else "at most"
        lower = easier(verdict.needed, verdict.by_roofline, row.higher_is_better)
        roof = "" if verdict.by_roofline is None else number(verdict.by_roofline)
        return (
            row.title, bar.system, f"{sign} {bar.factor:g}x {bar.peer}", f"{verdict.ratio:.2f}x",
            number(verdict.reached), number(verdict.needed), roof, number(lower), "yes" if verdict.met else "**no**",
        )  # fmt: skip

    if found:
        yield from table(
            ("row", "system", "bar", "ratio", "reached", "by ratio", "by 80 % of roofline", "the easier", "met"),
            map(line, found),
        )


def memory_table(samples: Sequence[Json]) -> Iterator[str]:
    """By process, in the last round."""
    last = {system: seen[-1]["processes"] for system, seen in grouped([s for s in samples if "processes" in s]).items()}
    if last:
        yield from table(
            ("system", "PSS by process, MB"),
            ((system, ", ".join(f"{name} {mb:.0f}" for name, mb in parts.items())) for system, parts in last.items()),
        )


def grouped(samples: Sequence[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for sample in samples:
        found.setdefault(sample["system"], []).append(sample)
    return found


def number(value: float) -> str:
    """Three digits that count; thousands are whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw(report: Json, path: Path) -> None:
    """A bar per system and row; a line where the roofline is."""
    samples, systems = report["samples"], report["systems"]
    limits, spec = middle_limits(report["limits"]), ModelSpec.from_json(report["spec"])
    drawn_rows = [ROW_OF[name] for name in DRAWN if any(s["row"] == name and s["value"] is not None for s in samples)]
    if not drawn_rows:
        return
    picture, axes = plots.figure(len(drawn_rows))
    colours = {"baton": "C0", "llama.cpp": "C1", "vllm": "C2"}
    rooflines = limits_of(systems, spec, limits) if limits else {}
    for ax, row in zip(axes, drawn_rows, strict=True):
        seen = [(s, found) for s in systems if (found := values(samples, s["name"], row.name))]
        for place, (system, found) in enumerate(seen):
            middle = statistics.median(found)
            ax.barh(place, middle, color=colours[system["peer"]], xerr=[[middle - min(found)], [max(found) - middle]])
            if limit := rooflines.get((system["name"], row.name)):
                ax.plot([limit, limit], [place - 0.4, place + 0.4], color="black", lw=1)
        ax.set_yticks(range(len(seen)), [system["name"] for system, _ in seen], fontsize=8)
        ax.invert_yaxis()
        ax.set(title=row.title, xlabel=row.unit)
    picture.set_size_inches(4 * len(drawn_rows), 0.35 * max(len(systems), 4) + 1)
    picture.savefig(path)
