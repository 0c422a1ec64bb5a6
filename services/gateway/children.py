"""Child processes that deal with strangers' files: one answer, one deadline, none of our secrets."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]


async def run_child(
    module: str, arguments: list[str], timeout_s: float, environment: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Run a module of ours; return its status (negative: the signal that ended it) and what it printed.

    It is killed with its caller, and after `timeout_s`: raises `TimeoutError`.
    """
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        *arguments,
        cwd=PROJECT_ROOT,
        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8", **(environment or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(timeout_s):
            stdout, _ = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
            await asyncio.shield(child.wait())
    return child.returncode or 0, stdout
