"""The virtual environment is built, left alone, renewed and mended; its failures are one line. No network is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra.local import bootstrap
from infra.local.bootstrap import ensure_venv
from infra.local.failures import SetupFailed


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with nothing to install, so that no index is asked; the torch step is its own test's matter."""
    root = tmp_path / "clone"
    requirements = root / "infra" / "requirements"
    requirements.mkdir(parents=True)
    (requirements / "dev.txt").write_text("# nothing\n")
    (requirements / "torch.txt").write_text("# nothing\n")
    (root / ".local" / "logs").mkdir(parents=True)
    monkeypatch.setattr(bootstrap, "ROOT", root)
    monkeypatch.setattr(bootstrap, "HOME", root / ".local")
    monkeypatch.setattr(bootstrap, "VENV", root / ".venv")
    monkeypatch.setattr(bootstrap, "REQUIREMENTS", requirements)
    monkeypatch.setattr(bootstrap, "_install_torch", lambda log: None)
    monkeypatch.setattr(bootstrap, "_is_cpu_build", lambda: True)
    monkeypatch.setattr(bootstrap, "VENV_FREE_BYTES", 100 * 1024**2)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return root


def test_it_is_built_once_then_left_alone_and_built_anew_when_broken_off(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = clone / ".venv"
    # Given nothing, it is built
    ensure_venv()
    witness = venv / "witness"
    witness.touch()
    assert "Python packages" in capsys.readouterr().out

    # When nothing changed, nothing is done and nothing said
    ensure_venv()
    assert witness.exists() and capsys.readouterr().out == ""

    # When the pins changed, they are installed into what is there
    (clone / "infra" / "requirements" / "dev.txt").write_text("# still nothing\n")
    ensure_venv()
    assert witness.exists() and "Python packages" in capsys.readouterr().out

    # When a run was killed half-way, it is built anew
    (venv / ".roundhouse-installing").touch()
    ensure_venv()
    assert not witness.exists() and "broken off" in capsys.readouterr().out
    assert not (venv / ".roundhouse-installing").exists()

    # When its Python is gone, too
    witness.touch()
    (venv / "bin" / "python").unlink()
    ensure_venv()
    assert not witness.exists() and (venv / "bin" / "python").exists()


def test_a_package_that_no_index_has_is_one_line_and_the_next_run_mends_it(clone: Path) -> None:
    requirement = clone / "infra" / "requirements" / "dev.txt"
    requirement.write_text(f"no-such-package==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(SetupFailed) as caught:
        ensure_venv()
    line = str(caught.value)
    assert line.startswith("the Python packages: the package index has no file for no-such-package==1.0")
    assert line.endswith("(all of it: .local/logs/pip.log)") and "\n" not in line
    assert "no-such-package" in (clone / ".local" / "logs" / "pip.log").read_text()
    requirement.write_text("# nothing\n")
    ensure_venv()
    assert (clone / ".venv" / ".roundhouse-stamp").exists()


def test_a_disk_without_room_is_said_before_anything_is_built(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "VENV_FREE_BYTES", 1 << 60)
    with pytest.raises(SetupFailed, match="GB free and set-up needs .* free some space"):
        ensure_venv()
    assert not (clone / ".venv").exists()


def test_missing_packages_without_root_or_sudo_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "missing_packages", lambda environ: ["redis-server", "postgresql"])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    with pytest.raises(
        SetupFailed, match="apt-get install -y --no-install-recommends redis-server postgresql"
    ):
        bootstrap.ensure_packages({})


def test_the_roundhouse_command_runs_this_clone_s_code_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given an environment with a space in its path, and a folder that bears our packages' name
    venv = tmp_path / "a venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(bootstrap, "VENV", venv)
    (tmp_path / "elsewhere" / "services").mkdir(parents=True)
    (tmp_path / "elsewhere" / "services" / "__init__.py").write_text("raise SystemExit('another services')\n")
    # When set-up is run twice
    bootstrap.ensure_command()
    made = (venv / "bin" / "roundhouse").stat()
    bootstrap.ensure_command()
    # Then it was written once, and works from there
    assert (venv / "bin" / "roundhouse").stat().st_mtime_ns == made.st_mtime_ns
    done = subprocess.run(
        [venv / "bin" / "roundhouse", "resources", "list"],
        cwd=tmp_path / "elsewhere",
        env={"PATH": "/usr/bin:/bin", "ROUNDHOUSE_URL": "gopher://x", "ROUNDHOUSE_API_KEY": "k"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "roundhouse: ROUNDHOUSE_URL is not an address: gopher://x\n"
