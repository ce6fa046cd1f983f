"""`python -m baton.chaos`: real processes, real faults, and every token compared with an undisturbed run.

Exit codes: 0 no rule was broken, 1 some were (the report says which, with the seed and the faults), 2 it cannot run.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys

from baton.chaos.plan import HASH_MODEL, Plan
from baton.chaos.report import document, table, write_json
from baton.chaos.run import run_chaos
from baton.core.errors import SetupError


def main(arguments: list[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    plan = Plan(
        asked.seed, asked.duration, HASH_MODEL if asked.model == "hash" else asked.model, num_clients=asked.clients,
        lanes=asked.lanes, use_namespaces=not asked.loopback,
        faults=tuple(filter(None, asked.faults.split(","))),
    )
    try:
        findings = asyncio.run(run_chaos(plan, lambda line: print(line, file=sys.stderr, flush=True)))
    except SetupError as e:
        print(e.message, file=sys.stderr)
        return 2
    found = document(findings)
    print("\n".join(table(found)))
    if asked.json:
        write_json(found, asked.json)
    return 1 if found["violations"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m baton.chaos", description="Faults on a real stack.")
    parser.add_argument("--duration", type=float, default=180.0, metavar="S", help="Seconds of faults.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="hash", help="hash (answers are computed), or a model to serve.")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--lanes", type=int, default=2, help="Faults at once.")
    parser.add_argument("--faults", default="", metavar="KIND,KIND", help="Only these kinds.")
    parser.add_argument("--loopback", action="store_true", help="No namespaces, no faults of the network.")
    parser.add_argument("--json", metavar="FILE", help="Write the figures there.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
