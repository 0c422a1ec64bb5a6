from __future__ import annotations

import pytest

from services.cli.output import plain, print_table


def test_text_from_elsewhere_cannot_steer_the_terminal() -> None:
    assert plain("a\x1b[2Jb\x9b31mc\x07\nd\te\x7f\r") == "a[2Jb31mc\nd\te"
    assert plain("ünï 漢字 🙂") == "ünï 漢字 🙂"


def test_a_table_without_a_terminal_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 150
    print_table(("name", "tokens", "id"), [(long, 1234567, "[red]not markup[/]"), ("b", None, None)])
    lines = capsys.readouterr().out.splitlines()
    assert any(long in line and "1,234,567" in line and "[red]not markup[/]" in line for line in lines)
    assert "\x1b" not in "".join(lines)
