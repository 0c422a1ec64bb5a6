"""What tools print becomes one line that says what to do."""

from __future__ import annotations

import errno

import pytest

from infra.local.failures import RULES, explain, explain_os_error

CASES = [
    ("OSError: [Errno 28] No space left on device", "the disk is full"),
    ("dpkg: error: write failed (No space left on device)\nE: Failed to fetch http://x", "the disk is full"),
    (
        (
            "WARNING: Retrying ... NewConnectionError('Failed to establish a new connection: [Errno 101] Network is "
            "unreachable')\nERROR: Could not install packages"
        ),
        "no network",
    ),
    ("Err:1 http://deb bookworm InRelease\n  Temporary failure resolving 'deb'", "no network"),
    ("E: Failed to fetch http://deb/x.deb  404  Not Found", "no network"),
    (
        (
            "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)\n"
            "ERROR: No matching distribution found for torch==2.13.0"
        ),
        "the package index has no file for torch==2.13.0",
    ),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "pinned hash"),
    ("E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7", "another package manager"),
    ("E: dpkg was interrupted, you must manually run 'dpkg --configure -a'", "dpkg --configure -a"),
    ("E: Unable to locate package rabbitmq-server", "package sources"),
    ("The virtual environment was not created: ensurepip is not available", "python3-venv"),
    ('FATAL:  could not bind IPv4 address "127.0.0.1": Address already in use', "a port is taken"),
    ("{failed_to_start_child,{listen_error,{1,2},eaddrinuse}}", "a port is taken"),
    ("OSError: [Errno 12] Cannot allocate memory", "out of memory"),
    ('FATAL:  password authentication failed for user "roundhouse"', "make clean"),
    ("PermissionError: [Errno 13] Permission denied: '/x/.venv/bin'", "may not be written by this user"),
    ("some noise\nE: a cause nobody has seen before\n", "E: a cause nobody has seen before"),
    ("first\nlast words\n\n", "last words"),
    ("", "without a word"),
]


@pytest.mark.parametrize(("output", "expected"), CASES)
def test_explain_gives_one_line_with_the_cause(output: str, expected: str) -> None:
    line = explain(output, step="this step", log=".local/logs/x.log")
    assert expected in line
    assert line.startswith("this step: ") and line.endswith("(all of it: .local/logs/x.log)")
    assert "\n" not in line and len(line) < 500


def test_each_rule_is_reached_by_some_case() -> None:
    lines = [explain(output, step="s") for output, _ in CASES]
    for rule in RULES:
        fixed_part = rule.line.split("{")[0]
        if "quota" not in fixed_part:  # told by errno, below
            assert any(fixed_part in line for line in lines), rule.pattern


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_from_the_error_number_in_any_language(number: int) -> None:
    assert "the disk is full" in explain_os_error(OSError(number, "Kein Platz"), step="set-up")
