"""Who may import what, and what no code here does: read from the source, so that it holds for code that no test runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = "services.worker.engine"
AGENT = "services.worker.agent"
SERVICES = sorted(path.name for path in (ROOT / "services").iterdir() if (path / "__init__.py").exists())

# Reading the environment outside of settings, and why.
READS_ENVIRONMENT = {
    "shared/settings.py": "the one place where it is read",
    "shared/telemetry.py": "the exporters' own OTEL_ variables, whose names are a standard",
    "shared/model_folder.py": "tells the tokenizers library to start no threads",
    "services/worker/image_store.py": "a child that makes an image gets PATH alone",
    "services/worker/agent/__main__.py": "workers inherit the agent's environment, less what they may not have",
    "services/gateway/children.py": "processes for strangers' files get PATH, and what is named for them",
    "services/gateway/hub.py": "the process that speaks to a hub gets the machine's proxies and certificates",
}
# Tasks outside of a TaskGroup, and who holds and ends them.
HOLDS_TASKS = {
    "shared/database.py": "a query that is given up goes on without us; its end is logged",
    "services/gateway/threads.py": "a thread cannot be stopped: the call waits for it also when it is cancelled",
    "services/gateway/management/idempotency.py": "the request that is repeated goes on when its client goes; held in a set",
    "services/gateway/inference/generation.py": "pumps of one answer: held, and cancelled in its close",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pickletools"}
"""Whatever reads these runs code of whoever wrote the file."""


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> Iterator[str]:
    """Full names of everything that the file imports, at any depth."""
    parts = _module(path).split(".")
    return _imported(_tree(path), parts if path.name == "__init__.py" else parts[:-1])


def _imported(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """`a.b` for `import a.b`; `a.b` and `a.b.c` for `from a.b import c`. `package` is where relative names begin."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _under(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _offences(paths: list[Path], *forbidden: str, but: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{_shown(path)} imports {name}"
        for path in paths
        for name in sorted(set(_imports(path)))
        if _under(name, *forbidden) and not _under(name, *but)
    ]


# ---- imports


def test_the_reader_of_imports_sees_every_kind() -> None:
    """All the tests below are worth nothing where it is blind."""
    source = """
import a.b as c
from d import e
from . import f
from ..g import h
if TYPE_CHECKING:
    import i
def function():
    from j.k import l
"""
    assert set(_imported(ast.parse(source), ["p", "q"])) == {
        *("a.b", "d", "d.e", "p.q", "p.q.f", "p.g", "p.g.h", "i", "j.k", "j.k.l")
    }
    assert "shared.broker.Broker" in set(_imports(ROOT / "services" / "billing" / "__main__.py"))


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_no_other_service(service: str) -> None:
    own = f"services.{service}"
    assert _offences(_sources(f"services/{service}"), "services", but=(own,)) == []


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_neither_infra_nor_tests(service: str) -> None:
    assert _offences(_sources(f"services/{service}"), "infra", "tests", "loadtest") == []


def test_redis_is_known_to_rate_limits_alone() -> None:
    """What a budget has left, and everything else about money, is the database's: losing Redis changes none of it."""
    limits = ROOT / "services/gateway/rate_limit.py"
    others = [path for path in _sources("services", "shared") if path != limits]
    assert _offences([limits], "redis") != []
    assert _offences(others, "redis") == []
    assert _offences([limits], "shared.budgets", "shared.database") == []


def test_shared_imports_nothing_of_the_services() -> None:
    assert _offences(_sources("shared"), "services", "infra", "tests", "loadtest") == []


def test_the_agent_knows_nothing_of_the_worker_s_process_or_its_engine() -> None:
    paths = _sources("services/worker/agent")
    assert _offences(paths, "services.worker", but=(AGENT,)) == []
    assert _offences(paths, "torch", "transformers", "numpy", "safetensors") == []


def test_the_worker_does_not_reach_into_the_agent() -> None:
    paths = [path for path in _sources("services/worker") if not _under(_module(path), AGENT)]
    assert _offences(paths, AGENT) == []


def test_the_engine_needs_only_its_libraries() -> None:
    """It is measured alone on machines that have nothing else."""
    allowed = {
        "torch",
        "xxhash",  # and does without
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "triton",
        *sys.stdlib_module_names,
    }
    offences = [
        f"{_shown(path)} imports {name}"
        for path in _sources("services/worker/engine")
        for name in sorted(set(_imports(path)))
        if name.partition(".")[0] not in allowed and not _under(name, ENGINE) and name != "services.worker"
    ]
    assert offences == []


def test_the_engine_opens_no_connection_and_runs_no_event_loop() -> None:
    assert _offences(_sources("services/worker/engine"), "asyncio", "socket", "http", "urllib", "ssl") == []


@pytest.mark.parametrize("service", [service for service in SERVICES if service != "worker"])
def test_only_the_worker_imports_torch_or_transformers(service: str) -> None:
    assert _offences(_sources(f"services/{service}", "shared"), "torch", "transformers") == []


def test_only_the_broker_modules_speak_amqp() -> None:
    doors = (
        "shared/broker.py",
        "shared/teams_broker.py",
        "shared/queue_client.py",
        "shared/amqp_decoding.py",
    )
    paths = [path for path in _sources("services", "shared") if _shown(path) not in doors]
    assert _offences(paths, "aio_pika", "aiormq", "pamqp", "pika") == []


def test_nothing_reads_formats_that_run_code() -> None:
    paths = _sources("services", "shared", "infra", "loadtest")
    assert _offences(paths, *FORBIDDEN_MODULES) == []
    calls = []
    for path in paths:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load"):
                calls.append(f"{_shown(path)}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                if ast.unparse(node.value) != "False":
                    calls.append(f"{_shown(path)}:{node.value.lineno}: {node.arg}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
                calls.append(f"{_shown(path)}:{node.lineno}: {ast.unparse(node.func)}")
    assert calls == []


# ---- environment, tasks, time-outs


def test_only_settings_read_the_environment() -> None:
    reading = {
        _shown(path)
        for path in _sources("services", "shared")
        for node in ast.walk(_tree(path))
        if (
            isinstance(node, ast.Attribute)
            and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb")
        )
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {"environ", "getenv"} & _names(node))
    }
    settings = {name for name in reading if name.startswith("services/") and name.endswith("/settings.py")}
    assert reading - settings == set(READS_ENVIRONMENT)


def _names(node: ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


_LOOSE = re.compile(
    r"^(asyncio|loop|self\._loop|asyncio\.get_running_loop\(\))\.(create_task|ensure_future)$"
)


def _is_loose_task(node: ast.AST) -> bool:
    """A task that no group owns: when it dies, nobody hears of it unless somebody took care."""
    return isinstance(node, ast.Call) and _LOOSE.match(ast.unparse(node.func)) is not None


def test_tasks_belong_to_a_group_or_to_somebody_who_is_named_here() -> None:
    holding = {
        _shown(path)
        for path in _sources("services", "shared")
        if any(_is_loose_task(node) for node in ast.walk(_tree(path)))
    }
    assert holding == set(HOLDS_TASKS)


def test_no_task_is_started_and_forgotten() -> None:
    forgotten = [
        f"{_shown(path)}:{node.lineno}"
        for path in _sources("services", "shared", "infra", "loadtest")
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Expr) and _is_loose_task(node.value)
    ]
    assert forgotten == []


def test_no_loop_waits_with_wait_for() -> None:
    """On Python 3.11 `asyncio.wait_for` can swallow a cancellation; in a loop the task then never ends."""
    inside = sorted(
        {
            f"{_shown(path)}:{call.lineno}"
            for path in _sources("services", "shared", "infra", "loadtest")
            for loop in ast.walk(_tree(path))
            if isinstance(loop, ast.While | ast.AsyncFor)
            for call in ast.walk(loop)
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("asyncio.wait_for", "wait_for")
        }
    )
    assert inside == []


# ---- importing opens nothing

_IMPORT_ALL = """
import importlib, socket, subprocess, sys, threading

class Refused(BaseException):
    pass

def refuse(*arguments, **named):
    raise Refused(*arguments)

socket.socket.__init__ = refuse
socket.getaddrinfo = refuse
subprocess.Popen.__init__ = refuse
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert threading.active_count() == 1, f"{name} starts a thread"
print(*sys.modules)
"""


def _import_all(*folders: str) -> list[str]:
    names = [_module(path) for path in _sources(*folders)]
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *names],
        cwd=ROOT,
        env={},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_light_services_opens_nothing_and_brings_no_torch() -> None:
    light = [f"services/{service}" for service in SERVICES if service != "worker"]
    assert {"torch", "transformers"}.isdisjoint(_import_all("shared", *light, "services/worker/agent"))


def test_importing_the_worker_opens_nothing() -> None:
    assert "torch" in _import_all("services/worker")


# ---- texts


@pytest.mark.parametrize("folder", ["services", "shared", "infra", "loadtest"])
def test_every_module_says_what_it_is_for(folder: str) -> None:
    silent = [
        _shown(path)
        for path in _sources(folder)
        if _tree(path).body and ast.get_docstring(_tree(path)) is None
    ]
    assert silent == []


def _texts() -> list[Path]:
    """Every text file that is, or is about to be, in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    found = [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]
    assert len(found) > 50
    return found


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        # A registry is the machine's setting: mirrors, air-gapped sites and proxies have their own.
        ("a package registry", r"pypi\.org|pythonhosted\.org|npmjs\.(org|com)|rubygems\.org|crates\.io"),
        ("a package index option", r"(?i)(index[-_]url|find[-_]links)\W{0,3}https?:"),
        ("a path of somebody's machine", r"(?<![\w.])/(work|root|Users|home/\w+)/(?!\W)"),
        ("this clone's path", re.escape(str(ROOT)) + r"\b"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_no_text_names(what: str, pattern: str) -> None:
    named = [
        f"{_shown(path)}:{number}: {line.strip()[:120]}"
        for path in _texts()
        if path != Path(__file__)  # it has to spell what it looks for
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line)
    ]
    assert named == [], f"names {what}"
