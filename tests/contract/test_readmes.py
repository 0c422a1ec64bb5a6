"""What the pages for people name is there: files, folders and make's targets."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "loadtest/README.md",
    "services/worker/engine/README.md",
    "services/batch/README.md",
    "services/billing/README.md",
    "services/worker/README.md",
    "infra/docker/README.md",
    "infra/requirements/README.md",
)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#]+)\)")
_PATH = re.compile(r"[\w.*-]*(?:/[\w.*-]+)+/?|[\w-]+\.(?:py|md|yml|txt|toml|sql|in)|[\w-]+/")
# Made on the machine, not committed; and addresses of the API, which are tested with it.
NOT_COMMITTED = (
    ".local",
    ".venv",
    ".env",
    "/api",
    "/v1",
    "/metrics",
    "/livez",
    "/readyz",
    "/var",
    "/models",
    "/openapi.json",
)
FENCE = re.compile(r"```.*?```", re.DOTALL)


def tracked() -> list[str]:
    """Every file that git tracks or would track, and every folder of them with a slash at its end."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    files = [name for name in listed if name and (ROOT / name).exists()]
    folders = {f"{parent}/" for name in files for parent in Path(name).parents if str(parent) != "."}
    return [f"/{name}" for name in (*files, *sorted(folders))]


def paths_named(page: str) -> list[str]:
    text = FENCE.sub("", page)
    named = [word for code in _CODE.findall(text) for word in code.split() if _PATH.fullmatch(word)]
    return [name for name in named if not name.startswith(NOT_COMMITTED)]


def test_paths_are_told_from_other_words() -> None:
    page = "`shared/broker.py` and `edge.py`, `tests/`; `x_y`, `1.5`, `make up`, `.local/env`, `/api/keys`"
    assert paths_named(page) == ["shared/broker.py", "edge.py", "tests/"]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_folder_that_is_named_exists(page: str) -> None:
    there = tracked()
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [
        name
        for name in paths_named(text)
        if not any(known.rstrip("/").endswith(f"/{name.rstrip('/')}") for known in there)
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in _LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_every_target_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for name in (*PAGES, ".ci/run"):
        named |= set(
            re.findall(r"(?:`|^|\n|&& )make ([a-z][a-z-]*)", (ROOT / name).read_text(encoding="utf-8"))
        )
    assert named
    assert named - targets == set()
    assert "README.md" in PAGES and {"up", "down", "status", "logs", "clean", "test"} <= named


def test_every_measuring_script_is_described() -> None:
    page = (ROOT / "loadtest/README.md").read_text(encoding="utf-8")
    scripts = {
        path.stem
        for path in (ROOT / "loadtest").glob("*.py")
        if '"--json"' in path.read_text(encoding="utf-8")
    }
    assert scripts
    assert [name for name in sorted(scripts) if f"## `loadtest.{name}`" not in page] == []
