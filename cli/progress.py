"""What a person sees while something sets itself up: a spinner on a terminal, plain lines in a log. To stderr, so
that stdout holds what was asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Around one piece of set-up. Says nothing at the end if it failed: the error speaks."""
    start = time.monotonic()
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(f"{text} ...", markup=False)
        yield
    console.print(f"{text}: done in {time.monotonic() - start:.1f} s", markup=False)


def say(text: str = "") -> None:
    console.print(text, markup=False)
