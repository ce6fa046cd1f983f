from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from baton.core.config import Config, load, settings

Baton = Callable[..., subprocess.CompletedProcess[str]]


def test_what_config_show_prints_config_show_reads_back(baton: Baton, tmp_path: Path) -> None:
    shown = baton("config", "show", "--set", "decode.replicas=3", "--set", "model.name=a: #b").stdout
    (tmp_path / "all.yaml").write_text(shown)
    assert baton("config", "show", "--config", "all.yaml").stdout == shown
    read = load(yaml.safe_load(shown))
    assert (read.decode.replicas, read.model.name) == (3, "a: #b")


def test_defaults_are_shown_in_full(baton: Baton) -> None:
    shown = baton("config", "show").stdout
    assert load(yaml.safe_load(shown)) == Config()
    assert all(f"\n  {name.partition('.')[2]}: " in shown and text in shown for name, _, text in settings())


def test_the_environment_names_the_file(baton: Baton, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("engine: {block_size: 32}\n")
    assert "block_size: 32" in baton("config", "show", env={"BATON_CONFIG": "mine.yaml"}).stdout


def test_later_sources_win(baton: Baton, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("engine: {block_size: 32, threads: 2}\n")
    shown = baton("config", "show", "--config", "mine.yaml", "--set", "engine.block_size=48").stdout
    assert "block_size: 48" in shown
    assert "threads: 2" in shown


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("engine: {blok_size: 32}", "engine.block_size"),
        ("engin: {block_size: 32}", "engine.block_size"),
        ("engine: {block_size: 17}", "engine.block_size"),
        ("engine: {block_size: [}", "not YAML"),
        ("- a\n- b", "must hold sections"),
        ("router: {}\nengine: {}\nrouter: {}", "'router' twice (again in line 3)"),
        ("engine:\n  threads: 1\n  threads: 2", "'threads' twice (again in line 3)"),
        ("engine: 3", "engine must hold settings"),
        ("router: {http_port: 99999}", "router.http_port"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_the_place(
    content: str | bytes, said: str, baton: Baton, tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = baton("config", "show", "--config", "wrong.yaml")
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_missing_file_is_one_sentence(baton: Baton) -> None:
    done = baton("config", "show", "--config", "nowhere.yaml")
    assert (done.returncode, done.stderr) == (
        2,
        "baton: cannot read the configuration nowhere.yaml: No such file or directory.\n",
    )


def test_a_typo_on_the_command_line_names_the_nearest_setting(baton: Baton) -> None:
    done = baton("config", "show", "--set", "handoff.lease_ttl=3")
    assert done.returncode == 2
    assert "Did you mean 'handoff.lease_ttl_s'?" in done.stderr


def test_a_reader_that_leaves_early_is_no_error_message(baton: Baton) -> None:
    done = baton("--version")
    assert done.stdout.startswith("baton ")
    assert done.returncode == 0
