"""The set-up's decisions: which Python, which packages, which build of torch; and the pins themselves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infra.local import bootstrap
from infra.local.bootstrap import Interpreter, choose_interpreter, cpu_requirements, requirements_digest

PYTHON_310 = Interpreter("/a/python3.10", (3, 10, 9), True)
PYTHON_311 = Interpreter("/b/python3.11", (3, 11, 2), True)
PYTHON_311_BARE = Interpreter("/c/python3.11", (3, 11, 2), False)
PYTHON_313 = Interpreter("/d/python3.13", (3, 13, 0), True)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([], None),
        ([PYTHON_310], None),
        ([PYTHON_311_BARE], None),
        ([PYTHON_310, PYTHON_313], PYTHON_313),
        ([PYTHON_313, PYTHON_311], PYTHON_311),
        ([PYTHON_311_BARE, PYTHON_313], PYTHON_313),
    ],
)
def test_choose_interpreter(found: list[Interpreter], chosen: Interpreter | None) -> None:
    assert choose_interpreter(found) == chosen


def test_a_server_that_the_environment_names_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(bootstrap, "find_interpreters", lambda: [PYTHON_311])
    compiler, servers = ["gcc", "libc6-dev"], ["rabbitmq-server", "redis-server", "postgresql"]
    assert bootstrap.missing_packages({}) == [*compiler, *servers]
    named = {"DATABASE_URL": "postgresql://x", "REDIS_URL": "redis://x"}
    assert bootstrap.missing_packages(named) == [*compiler, "rabbitmq-server"]
    assert bootstrap.missing_packages({**named, "AMQP_URL": "amqp://x"}) == compiler
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc" if name == "cc" else None)
    assert bootstrap.missing_packages({**named, "AMQP_URL": "amqp://x"}) == []


def test_the_cpu_requirements_differ_from_the_default_ones_in_the_version_only() -> None:
    text = (bootstrap.REQUIREMENTS / "torch.txt").read_text()
    narrowed = cpu_requirements(text)
    assert re.search(r"^torch==[\d.]+\+cpu \\$", narrowed, re.MULTILINE)
    assert narrowed.replace("+cpu", "") == text.replace("+cpu", "")


def test_cpu_requirements_refuses_a_file_without_one_torch_pin() -> None:
    with pytest.raises(ValueError, match="torch once"):
        cpu_requirements("numpy==2.0\n")


def test_the_digest_changes_with_any_requirements_file(tmp_path: Path) -> None:
    (tmp_path / "dev.txt").write_text("a==1\n")
    before = requirements_digest(tmp_path)
    (tmp_path / "dev.in").write_text("not a lock\n")
    assert requirements_digest(tmp_path) == before
    (tmp_path / "torch.txt").write_text("b==1\n")
    assert requirements_digest(tmp_path) != before


@pytest.mark.parametrize("path", sorted(bootstrap.REQUIREMENTS.glob("*.txt")), ids=lambda path: path.name)
def test_every_requirement_is_pinned_with_a_hash(path: Path) -> None:
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert lines
    for line in lines:
        assert re.match(r"^[A-Za-z0-9._-]+(\[[a-z0-9,]+\])?==\S+.*--hash=sha256:[0-9a-f]{64}", line), line[
            :80
        ]


def test_what_runs_is_part_of_what_is_tested() -> None:
    def pins(name: str) -> set[str]:
        return set(
            re.findall(r"^([\w.-]+==[\w.]+)", (bootstrap.REQUIREMENTS / name).read_text(), re.MULTILINE)
        )

    assert pins("runtime.txt") <= pins("dev.txt")
