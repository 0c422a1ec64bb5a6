"""`infra.local run`: a command is told where the servers are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.local.__main__ import run
from infra.local.daemon import build
from infra.local.failures import SetupFailed
from infra.local.layout import Layout
from infra.local.ports import ensure_ports

SERVERS = ("DATABASE_URL", "REDIS_URL", "AMQP_URL")


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    for name in SERVERS:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    made = Layout(tmp_path / "home")
    ensure_ports(made)
    return made


def test_a_command_knows_the_servers_and_its_exit_status_is_handed_on(layout: Layout, tmp_path: Path) -> None:
    told = tmp_path / "told"
    script = f"import os, sys; open({str(told)!r}, 'w').write(os.environ['DATABASE_URL']); sys.exit(3)"
    assert run(layout, ["python", "-c", script]) == 3
    assert told.read_text() == build(layout, "servers", os.environ)[0].database_url


@pytest.mark.parametrize(("words", "said"), [([], "name a command"), (["no-such-thing"], "'no-such-thing'")])
def test_what_cannot_be_run_is_said(layout: Layout, words: list[str], said: str) -> None:
    with pytest.raises(SetupFailed, match=said):
        run(layout, words)


def test_before_anything_was_set_up_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="make up"):
        run(Layout(tmp_path / "home"), ["python", "-c", ""])
