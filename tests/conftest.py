"""What many rooms' tests share: the real model (fetched and converted once), and a tiny one made on the spot."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:  # torch and its like are loaded by the tests that need them, not by all
    from baton.models.convert import ModelFiles

settings.register_profile("house", deadline=None)  # no test looks at the clock: machines are shared
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _what_is_logged_stays_as_it_was() -> Iterator[None]:
    """A test that silences a logger for good makes others fail that read it, a hundred files later."""
    ours = logging.getLogger("baton")
    yield
    assert (logging.root.manager.disable, ours.level, ours.propagate) == (0, logging.NOTSET, True)


@pytest.fixture
def quiet() -> Iterator[None]:
    """For tests in which what workers warn about is the point; pytest would keep every line."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def model_files() -> ModelFiles:
    """SmolLM2-135M in the usual cache ($BATON_CACHE); fetched if it is not there. Mark its tests `model`."""
    from baton.core.config import ModelConfig
    from baton.models.catalog import open_model

    return open_model(ModelConfig())


@pytest.fixture(scope="session")
def model_dir(model_files: ModelFiles) -> Path:
    return model_files.directory


@pytest.fixture(scope="session")
def hf_model(model_files: ModelFiles) -> Any:
    """The same file in `transformers`, fp32. Takes some 20 s."""
    from baton.core.config import ModelConfig
    from baton.models.catalog import resolve

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, while it imports and loads
        import torch
        from transformers import AutoModelForCausalLM

        path = resolve(ModelConfig())
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted two-layer Llama with random weights, 4 heads on 2 KV heads, vocabulary 64."""
    from baton.models.convert import convert
    from tests.models.reference import TinyLlama, write_tiny_llama

    home = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(home / "llama", TinyLlama())
    return convert(home / "llama", home / "cache").directory
