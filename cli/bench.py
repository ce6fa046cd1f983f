"""`baton bench`: measurements that users run. Each has its own options, which are read where they are used; here they
only pass through."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Measure an endpoint under load.")

_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Open-loop load on an OpenAI-compatible endpoint: TTFT, ITL, TPOT and goodput at each rate."""
    from baton.bench.load import command

    command.serve(context.args, context.command_path)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def interference(context: typer.Context) -> None:
    """ITL of a steady decode load while long prompts arrive: Baton apart, Baton in one, and other endpoints."""
    from baton.bench.load import command

    command.interference(context.args, context.command_path)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def attention(context: typer.Context) -> None:
    """The host kernels' attention: speed per chunk, KV format and instruction set."""
    from baton.bench import attention

    attention.main(context.args, context.command_path)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def ops(context: typer.Context) -> None:
    """Where a step's time goes, by operation, and how near each is to what this machine can do."""
    from baton.bench import ops

    ops.main(context.args, context.command_path)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def step(context: typer.Context) -> None:
    """What a decode step costs in Python on this machine's engine, and how much of that is hidden."""
    from baton.bench import step

    step.main(context.args, context.command_path)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def peers(context: typer.Context) -> None:
    """Baton beside llama.cpp and vLLM on the same weights and cores; sets them up the first time."""
    from baton.bench.peers import command

    command.main(context.args, context.command_path)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def route(context: typer.Context) -> None:
    """Routing policies on a recorded trace: hit rate and TTFT of the production router on virtual time."""
    from baton.bench.route import command

    command.main(context.args, context.command_path)


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def overload(context: typer.Context) -> None:
    """A stack of real processes that is asked for more than it can do: goodput, refusals, memory, recovery."""
    from baton.bench import overload

    overload.main(context.args, context.command_path)
