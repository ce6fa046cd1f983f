"""`baton model`: fetch models, convert them to what all workers on a host share, and say what is there."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from baton.cli.config import ConfigFile, Overrides, read_config
from baton.cli.progress import say
from baton.core.config import Config, ModelConfig, cache_dir

app = typer.Typer(no_args_is_help=True, help="Fetch and look at models.")

Name = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="A name of the catalog, a .gguf file, or a directory; default: model.name."),
]


@app.command()
def pull(name: Name = None, config: ConfigFile = None, override: Overrides = None) -> None:
    """Fetch a model, convert it and prepare what computes it, unless that was done; prints the directory."""
    from baton.engine.backend import prepare
    from baton.models.catalog import ModelFiles, open_model

    settings = read_config(config, override)
    files = open_model(chosen(settings, name), say)
    if isinstance(files, ModelFiles):
        prepare(settings.engine, files, say)
    print(files.directory)


@app.command("list")
def list_models(config: ConfigFile = None, override: Overrides = None) -> None:
    """The models that can be fetched by name, and which are here."""
    from baton.models.catalog import CATALOG, is_pulled

    where = cache_dir(read_config(config, override).model)
    for name, published in CATALOG.items():
        print(f"{name}  {published.about}, {published.licence}{', here' if is_pulled(name, where) else ''}")


@app.command()
def show(name: Name = None, config: ConfigFile = None, override: Overrides = None) -> None:
    """What a model is: its shape, fingerprint and files. Fetches and converts it if needed."""
    from baton.engine.backend import choose_backend
    from baton.models.catalog import open_model

    settings = read_config(config, override)
    files = open_model(chosen(settings, name), say)
    backend = choose_backend(settings.engine, files.spec.head_dim)
    layout = files.spec.layout(settings.engine.block_size, backend.kv_dtype)
    print(f"directory: {files.directory}\nfingerprint: {files.fingerprint}")
    for field in dataclasses.fields(files.spec):
        print(f"{field.name}: {getattr(files.spec, field.name)}")
    print(f"KV block: {layout.block_size} tokens of {layout.dtype}, {layout.block_bytes:,} bytes")
    print(f"computed by: {backend.numerics}")


def chosen(settings: Config, name: str | None) -> ModelConfig:
    return settings.model.model_copy(update={"name": name}) if name else settings.model
