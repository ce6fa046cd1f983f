"""Bugs that other systems of this kind have shipped, planted on purpose, to see the simulated world catch them.

Each `*.patch` here re-creates one; its head says which. `caught.json` keeps the seed that catches it. The patch is
applied to a copy of the sources, in which the simulator runs in a process of its own: nothing of it can get out.

    python -m tests.planted.hunt                     # every bug: search from seed 0, at most 2,000 seeds
    python -m tests.planted.hunt NAME... --write     # some of them, and keep the seeds found
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CAUGHT = HERE / "caught.json"
MAX_SEEDS = 2000
UNWANTED = shutil.ignore_patterns("__pycache__")


def names() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.patch"))


def caught() -> dict[str, int]:
    """Patch -> the first seed that catches it."""
    found: dict[str, int] = json.loads(CAUGHT.read_text()) if CAUGHT.exists() else {}
    return found


@contextmanager
def planted(name: str) -> Iterator[Path]:
    """A copy of the sources with this bug in it."""
    with tempfile.TemporaryDirectory(prefix="baton-planted-") as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "src/baton", copy / "src/baton", symlinks=True, ignore=UNWANTED)
        for link in (copy / "src/baton").iterdir():
            if link.is_symlink():
                shutil.copytree(ROOT / link.name, copy / link.name, ignore=UNWANTED)
        subprocess.run(
            ["git", "apply", "--whitespace=nowarn", str(HERE / f"{name}.patch")], cwd=copy, check=True,
            env={"GIT_CEILING_DIRECTORIES": str(copy.parent), "PATH": "/usr/bin:/bin:/usr/local/bin"},
        )
        yield copy


def simulate(copy: Path, first_seed: int, num_seeds: int, timeout_s: float) -> tuple[int | None, str]:
    """(the first seed that failed, what it said); None: none did."""
    command = [sys.executable, "-m", "baton.cli.main", "simulate", "--seed", str(first_seed), "--seeds", str(num_seeds),
               "--no-shrink"]
    paths = [str(copy / "src"), *(p for p in sys.path if p and Path(p).resolve() != ROOT / "src")]
    done = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, timeout=timeout_s,
        env={"PYTHONPATH": ":".join(paths), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(copy)},
    )
    said = done.stdout + done.stderr
    found = re.search(r"seed (\d+): FAILED", said)
    assert done.returncode == 0 or found, f"the simulator broke, it did not catch anything:\n{said[-3000:]}"
    return (int(found[1]) if found else None), said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seeds", type=int, default=MAX_SEEDS)
    parser.add_argument("--write", action="store_true", help="keep the seeds found")
    arguments = parser.parse_args()
    missed = []
    for name in arguments.names or names():
        with planted(name) as copy:
            seed, said = search(copy, arguments.seeds)
        print(f"{name}: {'not caught within ' + str(arguments.seeds) + ' seeds' if seed is None else f'seed {seed}'}")
        if seed is None:
            missed.append(name)
            continue
        print("    " + said[said.index("FAILED") :].splitlines()[2][:300], flush=True)
        if arguments.write:
            CAUGHT.write_text(json.dumps(dict(sorted({**caught(), name: seed}.items())), indent=2) + "\n")
    sys.exit(1 if missed else 0)


def search(copy: Path, num_seeds: int) -> tuple[int | None, str]:
    """As `simulate`, from seed 0, in growing helpings, so that what is caught early costs little."""
    first, helping = 0, 2
    while first < num_seeds:
        helping = min(helping, num_seeds - first)
        seed, said = simulate(copy, first, helping, timeout_s=3600.0)
        if seed is not None:
            return seed, said
        first, helping = first + helping, 2 * helping
    return None, ""


if __name__ == "__main__":
    main()
