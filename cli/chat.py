"""`baton chat`: a conversation with a running stack, over the same HTTP API any client uses.

1. read a line          Ctrl-D or /quit leaves, /new forgets the conversation
2. stream the answer    Ctrl-C stops this answer only; what was said so far stays in the conversation
3. go to 1
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import httpx
import typer

from baton.cli.answers import CHAT_PATH, error_message, piece
from baton.cli.config import ConfigFile, Overrides, read_config
from baton.core.errors import BatonError, InternalError, SetupError

Message = dict[str, str]


def chat(
    url: Annotated[str | None, typer.Option(help="Where Baton serves; default: from the settings.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    config: ConfigFile = None,
    override: Overrides = None,
) -> None:
    """Talk to a running stack."""
    router = read_config(config, override).router
    base = (url or f"http://{router.host}:{router.http_port}").rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base, timeout=httpx.Timeout(router.request_timeout_s, connect=5)) as client:
        model = served_model(client)
        say(f"{model} at {base}. /new starts over, /quit leaves, Ctrl-C stops an answer.")
        all_answered = converse(
            client,
            {"model": model, "max_tokens": max_tokens, "temperature": temperature},
            [{"role": "system", "content": system}] if system else [],
        )
    if not all_answered and not sys.stdin.isatty():  # a person has read it; a script sees the exit code
        raise typer.Exit(1)


def served_model(client: httpx.Client) -> str:
    """The first model the server lists. Raises SetupError where nobody answers."""
    try:
        answer = client.get("/v1/models")
    except httpx.TransportError as e:
        raise SetupError(
            f"nobody answers at {client.base_url} ({e}); start a stack with `baton serve`, or name one with --url."
        ) from e
    try:
        return str(answer.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as e:
        raise SetupError(
            f"{client.base_url} is no OpenAI-compatible server: its /v1/models answered {answer.status_code}, without "
            "a model; name one with --url."
        ) from e


def converse(client: httpx.Client, options: dict[str, object], opening: list[Message]) -> bool:
    """Whether every answer came to its end, or to Ctrl-C."""
    messages, all_answered = list(opening), True
    for line in questions():
        if line in {"/quit", "/exit"}:
            break
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            answer, complete = stream_answer(client, {**options, "messages": messages, "stream": True})
            all_answered &= complete
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()
    return all_answered


def questions() -> Iterator[str]:
    """Lines from the terminal, or from a pipe. Ctrl-C at the prompt drops the line, it does not leave."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # line editing and history, where the platform has it
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\n(/quit leaves)")


def stream_answer(client: httpx.Client, body: dict[str, object]) -> tuple[str, bool]:
    """Print an answer as it comes; returns what came, and False if an error cut it short. Closing the connection early
    is what cancels the request."""
    said: list[str] = []
    complete = True
    try:
        with client.stream("POST", CHAT_PATH, json=body) as response:
            if response.status_code != 200:
                raise InternalError(error_message(response.status_code, response.read()))
            for line in response.iter_lines():
                news = piece(line)
                if news:
                    said.append(news.text)
                    print(news.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except httpx.TransportError as e:
        say(f"\nthe connection broke: {e}")
        complete = False
    except BatonError as e:
        say(f"\n{e}")
        complete = False
    print()
    return "".join(said), complete


def say(text: str) -> None:
    """Beside the conversation: stdout holds answers only, so that a pipe gets nothing else."""
    print(text, file=sys.stderr)
