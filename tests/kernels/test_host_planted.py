"""Bugs of exactness, planted in a copy of the host kernels to see that the runner's tests catch them. Each is one that
libraries of matrix products really have: another order of sums for another number of rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from baton.core.config import child_env
from baton.kernels.host import build

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


@pytest.mark.slow
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_bug_fails_the_runners_tests(what: str, tmp_path: Path) -> None:
    if build.find_compiler(None) is None:
        pytest.skip("no C++ compiler")
    name, there, instead, tests = PLANTED[what]
    others = ("*_avx2.cpp", "*_avx512.cpp", "*_amx.cpp")
    shutil.copytree(build.SOURCES, tmp_path / "csrc", ignore=shutil.ignore_patterns(*others))
    source = (tmp_path / "csrc" / name).read_text()
    assert there in source, f"{name} changed: plant it again"
    (tmp_path / "csrc" / name).write_text(source.replace(there, instead, 1))
    env = {**child_env(1), "BATON_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", RUN, str(tmp_path / "csrc"), tests], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == (0 if what == "nothing" else 1), done.stdout[-2000:] + done.stderr[-1000:]
    assert what == "nothing" or "AssertionError" in done.stdout, done.stdout[-2000:]
