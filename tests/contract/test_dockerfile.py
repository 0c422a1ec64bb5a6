"""The Dockerfile and its scripts, as far as they can be checked without a Docker engine."""

from __future__ import annotations

import http.server
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.docker.probe import refusal
from tests.contract import compose_file
from tests.contract.compose_file import ROOT

DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
REQUIREMENTS = ROOT / "infra" / "requirements"
TARGETS = ("base", "cpu", "gpu")


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, rest), with continued lines joined."""
    text = "\n".join(
        line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    )
    found: list[tuple[str, str, str]] = []
    stage = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stage = rest.split(" AS ")[1].strip()
        found.append((stage, word, rest))
    return found


def lineage(stage: str) -> list[str]:
    """The stage and those that it is built from, by FROM alone."""
    parents = {name: rest.split(" AS ")[0].strip() for name, word, rest in instructions() if word == "FROM"}
    chain = [stage]
    while parents[chain[-1]] in parents:
        chain.append(parents[chain[-1]])
    return chain


def test_the_base_image_is_pinned_to_a_python_and_a_debian() -> None:
    images = {rest.split("=")[1] for stage, word, rest in instructions() if word == "ARG" and not stage}
    assert images == {"python:3.11-slim-bookworm"}
    roots = {rest.split(" AS ")[0] for _, word, rest in instructions() if word == "FROM"}
    assert {root for root in roots if root.startswith("$")} == {"${PYTHON_IMAGE}"}


def test_each_target_that_compose_builds_exists() -> None:
    containers = compose_file.raw()["services"].values()
    wanted = {container["build"]["target"] for container in containers if "build" in container}
    assert wanted == set(TARGETS) <= {stage for stage, word, _ in instructions() if word == "FROM"}


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_runs_as_root(target: str) -> None:
    users = [rest for stage, word, rest in instructions() if stage == target and word == "USER"]
    assert len(users) == 1 and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[0])


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for _, word, rest in instructions():
        if word != "COPY" or rest.startswith("--from="):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in kept, f"{source} is kept from the builder by .dockerignore"


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_holds_the_same_code_above_its_packages(target: str) -> None:
    copies = [rest for stage, word, rest in instructions() if stage == target and word == "COPY"]
    assert copies[0].startswith("--from=packages") and copies[0].endswith("/opt/venv /opt/venv")
    kernels = ["--from=kernels /native/_build /app/services/worker/engine/native/_build"]
    assert copies[1:] == [
        *("infra /app/infra", "shared /app/shared", "services /app/services"),
        *(kernels if target == "cpu" else []),
    ]


def test_each_target_has_the_packages_of_its_kind() -> None:
    torch = {
        stage: re.search(r"install-torch\.sh (cpu|gpu) ", rest)
        for stage, word, rest in instructions()
        if word == "RUN" and "install-torch" in rest
    }
    assert {stage: match[1] for stage, match in torch.items() if match} == {
        "packages-cpu": "cpu",
        "packages-gpu": "gpu",
    }
    sources = {
        stage: rest.split("=")[1].split()[0]
        for stage, word, rest in instructions()
        if word == "COPY" and rest.startswith("--from=packages")
    }
    assert sources == {"base": "packages", "cpu": "packages-cpu", "gpu": "packages-gpu"}
    assert lineage("packages-cpu") == ["packages-cpu", "packages"]


def test_volumes_find_a_folder_that_the_user_owns() -> None:
    made = " ".join(rest for stage, word, rest in instructions() if stage == "machine" and word == "RUN")
    containers = compose_file.raw()["services"].values()
    for container in containers:
        for volume in container.get("volumes", []) if "build" in container else []:
            assert volume.split(":")[1] in made.split(), volume


def test_packages_are_installed_by_hash_and_no_index_is_named() -> None:
    for path in (DOCKERFILE, ROOT / "infra" / "docker" / "install-torch.sh", compose_file.COMPOSE):
        assert not re.search(
            r"index-url[ =]+http|https?://[a-z0-9.-]*(pypi|pytorch)", path.read_text(encoding="utf-8")
        )
    environment = " ".join(
        rest for stage, word, rest in instructions() if stage == "packages" and word == "ENV"
    )
    assert "PIP_REQUIRE_HASHES=1" in environment


# ---- install-torch.sh, with a pip that only notes what it is asked for


def install(tmp_path: Path, build: str, *, cpu_build_exists: bool) -> tuple[int, list[str], str]:
    """(exit status, what was installed, what python was asked to check)."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "pip").write_text(
        "#!/bin/sh\n"
        'for last; do :; done\necho "$last $(grep -o "^torch==[^ ]*" "$last") $*" >> "$NOTES"\n'
        f'grep -q "^torch==[0-9.]*+cpu" "$last" && exit {0 if cpu_build_exists else 1}\nexit 0\n'
    )
    (programs / "python").write_text('#!/bin/sh\necho "$2" > "$NOTES.check"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    notes = tmp_path / "notes"
    done = subprocess.run(
        ["sh", str(ROOT / "infra" / "docker" / "install-torch.sh"), build, str(REQUIREMENTS)],
        env={"PATH": f"{programs}:/usr/bin:/bin", "NOTES": str(notes), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = notes.read_text().splitlines() if notes.exists() else []
    check = Path(f"{notes}.check")
    return done.returncode, lines, check.read_text() if check.exists() else ""


def test_the_cpu_target_takes_the_cpu_build_where_there_is_one(tmp_path: Path) -> None:
    status, installed, check = install(tmp_path, "cpu", cpu_build_exists=True)

    assert status == 0
    assert len(installed) == 1 and re.search(r"torch==[\d.]+\+cpu install --no-deps -r", installed[0])
    assert "not torch.version.cuda" in check


def test_the_cpu_target_takes_the_default_build_and_its_libraries_where_there_is_none(tmp_path: Path) -> None:
    status, installed, check = install(tmp_path, "cpu", cpu_build_exists=False)

    assert status == 0
    assert [Path(line.split()[0]).name for line in installed][1:] == ["torch.txt", "torch-cuda.txt"]
    assert "+cpu" in installed[0] and "+cpu" not in "".join(installed[1:])
    assert "assert torch.version.cuda" in check


def test_the_gpu_target_never_asks_for_a_cpu_build(tmp_path: Path) -> None:
    status, installed, _ = install(tmp_path, "gpu", cpu_build_exists=True)

    assert status == 0
    assert [Path(line.split()[0]).name for line in installed] == ["torch.txt", "torch-cuda.txt"]
    assert all("--no-deps" in line for line in installed)


def test_another_build_is_refused(tmp_path: Path) -> None:
    assert install(tmp_path, "tpu", cpu_build_exists=True)[:2] == (64, [])


# ---- the health probe


@contextmanager
def answering(status: int) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()
            self.wfile.write(b'{"waiting_for": ["broker"]}')

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_probe_is_content_with_200_alone() -> None:
    with answering(200) as port:
        assert refusal(port, "/readyz") is None
        assert "404" in (refusal(port, "/other") or "")
    with answering(503) as port:
        assert "broker" in (refusal(port, "/readyz") or "")
    assert "does not answer" in (refusal(port, "/readyz") or "")
