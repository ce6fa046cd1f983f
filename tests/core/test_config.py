"""The configuration: nothing is ignored, and a wrong setting is named with what would be right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from baton.core.config import Config, apply_network_env, cache_dir, child_env, load, settings
from baton.core.errors import ConfigError


def test_without_anything_the_defaults_hold() -> None:
    assert load() == Config()
    assert load({}) == load(None, []) == Config()


def test_the_document_wins_over_defaults_and_an_override_over_both() -> None:
    config = load({"engine": {"block_size": 32, "threads": 2}}, ["engine.threads=3", "model.name=x.gguf"])
    assert (config.engine.block_size, config.engine.threads, config.model.name) == (32, 3, "x.gguf")
    assert config.decode == Config().decode, "a section that is not named keeps its own defaults"


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("handoff.strict=true", "handoff", "strict", True),
        ('handoff.transports=["tcp","shm"]', "handoff", "transports", ("tcp", "shm")),
        ("engine.num_blocks=null", "engine", "num_blocks", None),
        ("handoff.pull_timeout_s=0.25", "handoff", "pull_timeout_s", 0.25),
        (" model.name =a=b", "model", "name", "a=b"),
    ],
)
def test_an_override_is_json_or_else_plain_text(override: str, section: str, name: str, value: object) -> None:
    assert getattr(getattr(load(overrides=[override]), section), name) == value


@pytest.mark.parametrize(
    ("document", "overrides", "message"),
    [
        ({"engine": {"blocksize": 16}}, [], "no setting 'engine.blocksize'.*Did you mean 'engine.block_size'"),
        ({"router": {"block_size": 16}}, [], "Did you mean 'engine.block_size'"),
        ({"engine": {"plugh": 1}}, [], "no setting 'engine.plugh'.*`baton config show` lists them"),
        ({"ruter": {"http_port": 1}}, [], "no setting 'ruter.http_port'. Did you mean 'router.http_port'"),
        ({"ruter": {}}, [], "no section 'ruter'. Did you mean 'router'"),
        ({"xyzzy": None}, [], "no section 'xyzzy'. There are model, engine, prefill"),
        ({}, ["ruter.http_port=1"], "no setting 'ruter.http_port'.*Did you mean 'router.http_port'"),
        ({}, ["decod.max_step_tokens=1"], "Did you mean 'decode.max_step_tokens'"),
        ({"engine": 16}, [], "engine must hold settings, not 16"),
        ({"engine": None}, [], "engine must hold settings, not None"),
        ({3: 1}, [], "no section 3"),
        ({"engine": {16: 1}}, [], "no setting 'engine.16'"),
        ({}, ["engine.block_size"], "not of the form section.name=value"),
        ({}, ["block_size=16"], "no setting 'block_size'.*Did you mean 'engine.block_size'"),
        ({}, ["engine.block_size.x=16"], "no setting 'engine.block_size.x'"),
    ],
)
def test_a_typo_names_the_field_and_the_nearest_right_one(document: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(document, overrides)


@pytest.mark.parametrize(
    "override",
    [
        "engine.block_size=17", "engine.threads=0", "engine.threads=1.5", "handoff.pull_timeout_s=0",
        "handoff.pull_timeout_s=NaN", "handoff.pull_timeout_s=Infinity", "handoff.quarantine_cap=NaN",
        "handoff.transports=tcp", 'handoff.transports=["pigeon"]', 'handoff.transports=[]',
        'handoff.transports=["tcp","tcp"]', 'handoff.transports=["nixl","ucx","tcp"]', "engine.max_model_len=1",
        "router.http_port=65536", "cluster.pool=k8s",
        "model.name=null", "router.assumed_bandwidth_bytes_per_s=-1",
    ],
)
def test_a_wrong_value_is_refused_by_name(override: str) -> None:
    name = override.partition("=")[0]
    with pytest.raises(ConfigError, match=name) as caught:
        load(overrides=[override])
    assert caught.value.param == name


def test_the_tree_is_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Config().engine.threads = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Config.model_validate({"engine": {"blocksize": 16}})


def test_every_setting_explains_itself_and_there_are_not_too_many() -> None:
    listed = list(settings())
    assert len(listed) <= 80
    assert len({name for name, _, _ in listed}) == len(listed)
    for name, default, description in listed:
        assert description.endswith("."), name
        assert load({name.split(".")[0]: {name.split(".")[1]: default}}) == Config(), name


def test_the_users_environment_wins_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    env = child_env(2)
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("7", "2")


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [([], "lo"), (["cluster.worker_host=192.0.2.2"], None), (["handoff.data_bind=192.0.2.2"], None)],
)
def test_a_worker_on_loopback_keeps_ucx_there(
    overrides: list[str], devices: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    apply_network_env(load(overrides=overrides))
    assert os.environ.get("UCX_NET_DEVICES") == devices
    os.environ["UCX_NET_DEVICES"] = "eth0"
    apply_network_env(load())
    assert os.environ["UCX_NET_DEVICES"] == "eth0"


def test_the_cache_is_where_the_config_says_then_the_environment_then_home(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = load(overrides=["model.cache_dir=~/models"]).model
    monkeypatch.setenv("BATON_CACHE", "/somewhere")
    assert cache_dir(chosen) == Path.home() / "models"
    assert cache_dir() == Path("/somewhere")
    monkeypatch.delenv("BATON_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "baton"
