"""The `baton` command: what each subcommand needs is imported when it runs, so that `--help` and the light commands
work without torch, Ray or a Redis client.

Exit codes: 0 done, 1 it failed, 2 this machine, configuration or command line cannot start it (one sentence says why).
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated

import typer

import baton
from baton.cli import bench, chat, config, drain, explain, model, serve, simulate, status, trace
from baton.core.errors import BatonError, SetupError

app = typer.Typer(
    name="baton",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    help="Serve large language models with prefill and decode apart; the KV cache changes hands.",
)


def version(wanted: bool) -> None:
    if wanted:
        print(f"baton {baton.__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


app.command()(serve.serve)
app.command()(chat.chat)
app.command()(status.status)
app.command()(explain.explain)
app.command()(trace.trace)
app.command()(drain.drain)
app.command()(simulate.simulate)
app.add_typer(bench.app, name="bench")
app.add_typer(model.app, name="model")
app.add_typer(config.app, name="config")


def main() -> None:
    try:
        app()
    except BatonError as e:
        print(f"baton: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, SetupError) else 1)
    except BrokenPipeError:
        # The reader of our output left (`baton ... | head`). Python would complain once more when it flushes at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
