"""Commands of the operating system, run to their end: ip, nft, tc."""

from __future__ import annotations

import asyncio

from baton.core.errors import SetupError

TIMEOUT_S = 10.0


async def run_tool(*words: str) -> str:
    """What it printed. Raises SetupError with its own words if it fails, is missing, or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as e:
        raise SetupError(f"{words[0]} cannot be run: {e.strerror}") from None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise SetupError(f"`{' '.join(words)}` took longer than {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SetupError(f"`{' '.join(words)}` failed: {err.decode(errors='replace').strip() or process.returncode}")
    return out.decode(errors="replace")
