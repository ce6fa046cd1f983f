"""`baton bench`: measurements that users run. Each has its own options, which are read where they are used; here they
only pass through."""

from __future__ import annotations

from importlib import import_module

import typer

app = typer.Typer(no_args_is_help=True, help="Measure an endpoint, an engine, a router.")

COMMANDS = (
    ("serve", "load.command", "serve",
     "Open-loop load on an OpenAI-compatible endpoint: TTFT, ITL, TPOT and goodput at each rate."),
    ("interference", "load.command", "interference",
     "ITL of a steady decode load while long prompts arrive: Baton apart, Baton in one, and other endpoints."),
    ("attention", "attention", "main", "The host kernels' attention: speed per chunk, KV format and instruction set."),
    ("ops", "ops", "main",
     "Where a step's time goes, by operation, and how near each is to what this machine can do."),
    ("step", "step", "main", "What a decode step costs in Python on this machine's engine, and how much is hidden."),
    ("peers", "peers.command", "main",
     "Baton beside llama.cpp and vLLM on the same weights and cores; sets them up the first time."),
    ("route", "route.command", "main",
     "Routing policies on a recorded trace: hit rate and TTFT of the production router on virtual time."),
    ("overload", "overload", "main",
     "A stack of real processes that is asked for more than it can do: goodput, refusals, memory, recovery."),
    ("router", "router_cost.command", "main",
     "What a request and a token cost in the router's process, beside SGLang's, vLLM's and Dynamo's."),
)
"""(name, module of baton.bench, its function, help). A module is imported when its command runs: some need torch."""


def _add(name: str, module: str, function: str, words: str) -> None:
    def run(context: typer.Context) -> None:
        getattr(import_module(f"baton.bench.{module}"), function)(context.args, context.command_path)

    passed_on = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command(name, help=words, context_settings=passed_on, add_help_option=False)(run)


for _command in COMMANDS:
    _add(*_command)
