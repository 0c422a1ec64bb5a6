"""Turns what tools print when they fail into one clear line that says what to do.

Pure, standard library only: the set-up uses it before there is a virtual environment. The whole output of the
tool stays in a log file; the line names it.
"""

from __future__ import annotations

import errno
import re
from typing import NamedTuple


class SetupFailed(Exception):
    """Set-up or start cannot go on. Its text is the one line that the user sees; it says what to do."""


class Rule(NamedTuple):
    """If `pattern` is found in a tool's output, `line` tells the user; `{0}`, `{1}` are the pattern's groups."""

    pattern: str
    line: str


# The first rule that matches wins, so the more telling causes stand first: a full disk also breaks downloads.
RULES = (
    Rule(r"No space left on device|ENOSPC|Errno 28", "the disk is full: free some space and run it again"),
    Rule(
        r"Disk quota exceeded|Errno 122",
        "your disk quota is used up: free some space and run it again",
    ),
    Rule(
        r"THESE PACKAGES DO NOT MATCH THE HASHES",
        "a downloaded package does not have the pinned hash: the index or a proxy serves another file; "
        "check the pip configuration and run it again",
    ),
    Rule(
        r"no matching distribution found for (\S+)",
        "the package index has no file for {0} that fits this Python and machine: check the pip configuration "
        "(PIP_INDEX_URL, PIP_EXTRA_INDEX_URL) and the network, and run it again",
    ),
    Rule(
        r"Temporary failure in name resolution|Temporary failure resolving|Could not resolve|"
        r"Name or service not known|NewConnectionError|Network is unreachable|No route to host|"
        r"Connection refused.*(?:http|index)|ConnectTimeoutError|Connection timed out|Read timed out|"
        r"Unable to connect to|Failed to fetch|ProxyError",
        "no network to the package servers: check the connection (and any proxy), and run it again",
    ),
    Rule(
        r"Could not get lock (\S+)|Unable to acquire the dpkg frontend lock",
        "another package manager is at work: wait until it has finished, and run it again",
    ),
    Rule(
        r"dpkg was interrupted",
        "an earlier package installation was broken off: run 'sudo dpkg --configure -a', then run it again",
    ),
    Rule(
        r"Unable to locate package (\S+)|Package '?([\w.+-]+)'? has no installation candidate",
        "this system's package sources do not have a needed package: on Debian 12 or newer run "
        "'sudo apt-get update'; elsewhere install RabbitMQ, Redis and PostgreSQL 15 or newer yourself",
    ),
    Rule(
        r"ensurepip is not available|No module named '?(?:ensurepip|venv)'?",
        "this Python cannot make virtual environments: install python3-venv and run it again",
    ),
    Rule(
        r"(?i)address already in use|eaddrinuse|could not bind|port .* in use",
        "a port is taken by another program: run it again, and another port is chosen "
        "(or set ROUNDHOUSE_HTTP_PORT to a free one)",
    ),
    Rule(
        r"(?i)cannot allocate memory|out of memory|MemoryError|oom-kill",
        "this machine ran out of memory: about 3 GB must be free; close something and run it again",
    ),
    Rule(
        r"password authentication failed|ACCESS_REFUSED|WRONGPASS",
        "a server refused our password: its data and .local/secrets.json do not belong together; "
        "run 'make clean' and start again",
    ),
    Rule(
        r"(?i)permission denied(?:: '?([^'\n]+))?",
        "a file or folder may not be written by this user: was an earlier run made by another user (root)? "
        "Give the folder to this user, or remove .venv and .local, and run it again",
    ),
)


def explain(output: str, *, step: str, log: str | None = None) -> str:
    """One line for the user about a failed step, from the failed tool's output.

    1. The first rule whose pattern occurs gives its line.
    2. Otherwise the last telling line of the output itself (an `E:`/`ERROR` line, else the last line).
    3. Silence is said to be silence.

    step: what was being done, as a noun ("the Python packages"). log: where the whole output lies, if anywhere.
    """
    return f"{step}: {_cause(output)}" + (f" (all of it: {log})" if log else "")


def _cause(output: str) -> str:
    for rule in RULES:
        found = re.search(rule.pattern, output, flags=re.IGNORECASE)
        if found:
            return rule.line.format(*(group or "" for group in found.groups()))
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if not lines:
        return "it ended without a word"
    telling = [line for line in lines if re.match(r"E:|ERROR|error|fatal|FATAL", line)]
    return (telling or lines)[-1][:300]


def explain_os_error(error: OSError, *, step: str) -> str:
    """The same for an operating system error of our own."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{step}: the disk is full: free some space and run it again"
    return explain(str(error), step=step)
