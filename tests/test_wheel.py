"""What users get: the wheel holds the whole house and nothing else, and its light core works without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from baton.kernels.host import build

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(p.name for p in (ROOT / "src/baton").iterdir() if p.is_symlink())
TIMEOUT_S = 300

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * TIMEOUT_S)]


def run(*command: str | Path, cwd: Path) -> str:
    """Outside the checkout and without its paths: what is found is what was installed."""
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV", "BATON_CONFIG"}}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def shipped_files() -> set[str]:
    """Names in the wheel of every file the rooms hold that a user needs."""
    kinds = {".py", ".pyi", ".cpp", ".h", ".json", ".html", ".jinja"}
    return {
        f"baton/{p.relative_to(ROOT)}"
        for room in ROOMS
        for p in (ROOT / room).rglob("*")
        if p.suffix in kinds and "__pycache__" not in p.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools leaves a build folder beside the source, and what lies there would get in again.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            "cp",
            "-a",
            *(str(ROOT / name) for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src", *ROOMS)),
            str(source),
        ],
        check=True,
        timeout=60,
    )
    for stale in source.glob("src/*.egg-info"):
        subprocess.run(["rm", "-r", str(stale)], check=True, timeout=60)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_room_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {n for n in names if ".dist-info/" not in n}
    library = {f"baton/kernels/host/{build.packaged_name()}"} if build.find_compiler(None) else set()
    assert shipped_files() | {"baton/__init__.py", "baton/py.typed"} | library == inside
    assert wheel.name.endswith("-any.whl") == (not library)
    assert {"baton/wire/worker_pb2.py", "baton/wire/inference_pb2_grpc.py", "baton/wire/admin_pb2.pyi"} <= inside
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not [n for n in names if "test" in n.lower() and n.startswith("baton/tests")]
    assert not [
        n
        for n in names
        if "__pycache__" in n or n.endswith((".pyc", ".o", "__init__.py")) and n != "baton/__init__.py"
    ]


def test_the_light_core_runs_from_the_wheel_without_torch(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python, baton = tmp_path / "venv/bin/python", tmp_path / "venv/bin/baton"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    installed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    heavy = {line.partition("==")[0] for line in installed.splitlines()} & {
        "torch",
        "ray",
        "numpy",
        "transformers",
        "nixl-cu13",
    }
    assert not heavy, f"the light core pulls {heavy}"
    assert "serve" in run(baton, "--help", cwd=tmp_path)
    shown = run(baton, "config", "show", cwd=tmp_path)
    (tmp_path / "all.yaml").write_text(shown)
    assert run(baton, "config", "show", "--config", "all.yaml", cwd=tmp_path) == shown
    first = run(baton, "simulate", "--seed", "1", cwd=tmp_path)
    assert first == run(python, "-m", "baton.cli.main", "simulate", "--seed", "1", cwd=tmp_path)
    for module in ("baton.router.server", "baton.cluster.store", "baton.wire.client"):
        run(python, "-c", f"import {module}", cwd=tmp_path)
