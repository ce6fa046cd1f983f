"""Bugs of exactness, planted in a copy of the host kernels to see that the runner's tests catch them. Each is one that
libraries of matrix products really have: another order of sums for another number of rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from baton.core.config import cache_dir, child_env
from baton.kernels.host import build, library

ROOT = Path(__file__).resolve().parents[2]
SAME_BITS = "test_a_row_gets_the_same_bits_in_any_batch and bf16 and scalar"
DRAFTS = "test_each_row_of_a_draft_gets_the_bits_of_its_token_alone and bf16-bf16 and scalar"
TAILS = "test_the_bytes_of_a_tail_block_depend_on_its_tokens_alone"

RUN = """
import sys
from pathlib import Path
from baton.kernels.host import build
build.SOURCES = Path(sys.argv[1])
import pytest
files = ["tests/engine/test_host_runner.py", "tests/engine/test_host_drafts.py"]
sys.exit(pytest.main(["-x", "-p", "no:cacheprovider", *files, "-k", sys.argv[2]]))
"""

SPLIT_K = """    case BATON_BF16:
      if (task.num_rows > 8) {
        const uint16_t* x = static_cast<const uint16_t*>(task.x.data) + offset;
        float other[kPanel] = {};
        multiply_bf16(panel, x, k / 2, out);
        multiply_bf16(panel + k / 2 * kPanel * 2, x + k / 2, k / 2, other);
        for (int c = 0; c < kPanel; ++c) out[c] += other[c];
        return;
      }
      return multiply_bf16("""

PLANTED: dict[str, tuple[str, str, str, str]] = {  # what -> (file, what is there, what is planted, tests that see it)
    "nothing": ("step.cpp", "", "", f"({SAME_BITS}) or {TAILS} or ({DRAFTS})"),
    "k is split in two when there are many rows": (
        "gemm_scalar.cpp",
        "    case BATON_BF16: return multiply_bf16(",
        SPLIT_K,
        SAME_BITS,
    ),
    "k is split in two when there are many rows of drafts": (
        "gemm_scalar.cpp", "    case BATON_BF16: return multiply_bf16(", SPLIT_K, DRAFTS,
    ),
    "a block that is begun keeps what lay in it": (
        "step.cpp", "if (tail < end && span.start <= tail) {", "if (tail < end && span.start < 0) {", TAILS,
    ),
}


# In the products that this CPU takes by itself. Of int8 the sums are exact in any order: what counts is how they become
# fp32.
FAST_PLANTED: dict[str, tuple[str, str, list[tuple[str, str]]]] = {  # isa and weights -> (what, file, edits)
    "avx512-bf16": ("k is split in two when there are many rows", "gemm_avx512.cpp", [
        ("sums[kRows][kPanels] = {};", "sums[kRows][kPanels] = {}, halves[kRows][kPanels] = {}, none = {};"),
        ("        __m512i line[kPanels];", """        if (kRows > 2 && i == lines / 2)
          for (int r = 0; r < kRows; ++r)
            for (int p = 0; p < kPanels; ++p) halves[r][p] = sums[r][p], sums[r][p] = none;
        __m512i line[kPanels];"""),
        ("factors.product(sums[r][p], block.row + r)", """kRows <= 2 ? factors.product(sums[r][p], block.row + r)
            : factors.product(halves[r][p], block.row + r) +
              (factors.product(sums[r][p], block.row + r) - factors.product(none, block.row + r))"""),
    ]),
    "amx-bf16": ("k is gone through downwards when there are many rows", "gemm_amx.cpp", [
        ("""    for (int64_t i = 0; i < depth; i += kLineBytes, w += kTileBytes) {
      ahead.fetch();
      _tile_stream_loadd""", """    w += (depth / kLineBytes - 1) * kTileBytes;
    for (int64_t i = depth - kLineBytes; i >= 0; i -= kLineBytes, w -= kTileBytes) {
      ahead.fetch();
      _tile_stream_loadd"""),
    ]),
    "amx-int8": ("scales are multiplied in another order when there are many rows", "gemm512.h", [
        ("  const int32_t* totals;\n", "  const int32_t* totals;\n  bool many;\n"),
        ("totals(task.x.totals) {}", "totals(task.x.totals), many(task.num_rows > 8) {}"),
        ("    return _mm512_mul_ps(_mm512_cvtepi32_ps(dot), ", """    if (many)
      return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(x_scales[row])), scales);
    return _mm512_mul_ps(_mm512_cvtepi32_ps(dot), """),
    ]),
}
FAST_PLANTED["avx512-int8"] = FAST_PLANTED["avx512-bf16"]


def plant(directory: Path, name: str, edits: Sequence[tuple[str, str]]) -> None:
    source = (directory / name).read_text()
    for there, instead in edits:
        assert there in source, f"{name} changed: plant it again"
        source = source.replace(there, instead, 1)
    (directory / name).write_text(source)


def run_tests(csrc: Path, tests: str, cache: Path) -> subprocess.CompletedProcess[str]:
    env = {**child_env(1), "BATON_CACHE": str(cache)}
    return subprocess.run([sys.executable, "-c", RUN, str(csrc), tests], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=240)


def copied(directory: Path, *without: str) -> Path:
    """The sources, less those of some instruction sets, which would only take time."""
    unused = shutil.ignore_patterns(*(f"*_{isa}.cpp" for isa in without))
    return shutil.copytree(build.SOURCES, directory / "csrc", ignore=unused)


@pytest.mark.slow
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_bug_fails_the_runners_tests(what: str, tmp_path: Path) -> None:
    if build.find_compiler(None) is None:
        pytest.skip("no C++ compiler")
    name, there, instead, tests = PLANTED[what]
    csrc = copied(tmp_path, "avx2", "avx512", "amx")
    plant(csrc, name, [(there, instead)])
    done = run_tests(csrc, tests, tmp_path / "cache")
    assert done.returncode == (0 if what == "nothing" else 1), done.stdout[-2000:] + done.stderr[-1000:]
    assert what == "nothing" or "AssertionError" in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("place", FAST_PLANTED)
def test_a_bug_planted_in_the_fast_products_fails_the_random_batches_of_the_real_model(
    place: str, tmp_path: Path, model_dir: Path
) -> None:
    """Within a few of them. In bf16 the tiny model has too few layers: rounding hides the difference again."""
    isa, weights = place.split("-")
    if build.find_compiler(None) is None:
        pytest.skip("no C++ compiler")
    if isa != library.isas()[0]:
        pytest.skip(f"this CPU does not choose {isa}")
    what, name, edits = FAST_PLANTED[place]
    csrc = copied(tmp_path, "avx2", *(["amx"] if isa == "avx512" else []))
    plant(csrc, name, edits)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(cache_dir() / "models")
    tests = f"test_the_real_model_gives_the_same_bits_in_any_batch and {weights}-bf16"
    done = run_tests(csrc, tests, tmp_path / "cache")
    assert done.returncode == 1, f"not seen: {what}\n" + done.stdout[-2000:] + done.stderr[-1000:]
    assert "assert_array_equal(logits" in done.stdout, done.stdout[-2000:]
    assert "1 failed" in done.stdout, done.stdout[-2000:]
