"""What cannot start says so in one sentence and exits with 2, before anything was started."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Baton = Callable[..., subprocess.CompletedProcess[str]]
SERVE = ("serve", "--pool", "local", "--set", "router.http_port=0", "--set", "router.grpc_port=0")


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """Of the progress on stderr the last line is the error, and there is no stack trace."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("baton: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.rstrip().endswith(errors[0])
    return errors[0]


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("setting", ["router.http_port", "router.grpc_port"])
def test_a_taken_port(setting: str, taken_port: int, baton: Baton) -> None:
    said = one_sentence(baton(*SERVE, "--set", f"{setting}={taken_port}"))
    assert f"127.0.0.1:{taken_port}" in said
    assert f"--set {setting}=0" in said


def test_one_port_for_two_servers(free_port: int, baton: Baton) -> None:
    said = one_sentence(
        baton(*SERVE, "--set", f"router.http_port={free_port}", "--set", f"router.grpc_port={free_port}")
    )
    assert "must differ" in said


def test_no_redis_at_the_given_address(free_port: int, baton: Baton) -> None:
    url = f"redis://127.0.0.1:{free_port}/0"
    assert url in one_sentence(baton(*SERVE, "--set", f"cluster.redis_url={url}"))


def test_a_redis_address_that_is_none(baton: Baton) -> None:
    assert "cluster.redis_url" in one_sentence(baton(*SERVE, "--set", "cluster.redis_url=http://127.0.0.1"))


def test_no_ray(baton: Baton, tmp_path: Path) -> None:
    # An interpreter in which `ray` is not installed: what is found first is a package that cannot be found.
    script = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'ray' else find(name, *a)\n"
        "from baton.cli.main import main\n"
        "sys.argv = ['baton', 'serve', '--pool', 'ray']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert "--pool local" in one_sentence(done)


def test_a_model_that_is_not_there(baton: Baton) -> None:
    assert "nowhere.gguf" in one_sentence(baton(*SERVE, "--set", "model.name=nowhere.gguf"))
    assert "smollm2-135m" in one_sentence(baton(*SERVE, "--set", "model.name=smollm2-135"))


@pytest.mark.slow
def test_a_gguf_file_cut_short(baton: Baton, tmp_path: Path) -> None:
    # The header promises 272 tensors and 30 entries; nothing follows.
    (tmp_path / "cut.gguf").write_bytes(
        b"GGUF" + (3).to_bytes(4, "little") + (272).to_bytes(8, "little") + (30).to_bytes(8, "little")
    )
    assert "cut.gguf" in one_sentence(baton(*SERVE, "--set", "model.name=cut.gguf"))


@pytest.mark.model
def test_the_real_gguf_file_cut_in_its_weights(baton: Baton, tmp_path: Path) -> None:
    from baton.core.config import ModelConfig
    from baton.models.catalog import resolve

    whole = resolve(ModelConfig())
    with whole.open("rb") as source:
        (tmp_path / "cut.gguf").write_bytes(source.read(50_000_000))
    assert "cut.gguf" in one_sentence(baton(*SERVE, "--set", "model.name=cut.gguf"))


def test_nobody_to_decode(baton: Baton) -> None:
    assert "decode.replicas" in one_sentence(baton(*SERVE, "--decode", "0"))


def test_more_memory_than_there_is(baton: Baton) -> None:
    assert "engine.kv_memory_bytes" in one_sentence(baton(*SERVE, "--set", "engine.kv_memory_bytes=1000000000000000"))


@pytest.mark.slow
def test_more_blocks_than_memory_for_them(baton: Baton, tiny_model_dir: Path, tmp_path: Path) -> None:
    source, cache = tiny_model_dir.parents[2] / "llama", tiny_model_dir.parents[1]
    model = ("--set", f"model.name={source}", "--set", f"model.cache_dir={cache}")
    done = baton(*SERVE, *model, "--set", "engine.num_blocks=1000000000000", env={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0), done.stderr
    assert "Lower engine.num_blocks" in done.stderr
    (kept,) = tmp_path.glob("baton-failed-*")
    assert str(kept) in done.stderr
    assert "Lower engine.num_blocks" in (kept / "decode-0.log").read_text()


def test_a_config_typo_names_the_field_and_the_nearest_right_one(baton: Baton) -> None:
    said = one_sentence(baton(*SERVE, "--set", "engine.blok_size=32"))
    assert "'engine.blok_size'" in said
    assert "'engine.block_size'" in said


def test_commands_that_need_a_running_stack_say_how_to_start_one(free_port: int, baton: Baton) -> None:
    assert "baton serve" in one_sentence(baton("status", "--router", f"127.0.0.1:{free_port}"))
    assert "baton serve" in one_sentence(baton("trace", "--router", f"127.0.0.1:{free_port}"))
    assert "baton serve" in one_sentence(baton("chat", "--url", f"http://127.0.0.1:{free_port}"))
