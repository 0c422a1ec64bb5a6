"""`python -m infra.local COMMAND`: what the Makefile calls. Each failure is one line, and exit status 1."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from infra.local.daemon import build
from infra.local.failures import SetupFailed, explain_os_error
from infra.local.layout import ROOT, Layout, e2e_layout, main_layout, test_layout
from infra.local.leftovers import find_processes
from infra.local.ports import load_ports
from infra.local.progress import fail, say
from infra.local.servers.postgres import remove_data
from infra.local.state import AlreadyLocked, exclusive_lock, read_report
from infra.local.up import is_settled, stop

SET_UP_LOGS = frozenset({"apt", "demo-models", "migrations", "pip", "venv"})
NEWEST_WORKERS = 4


def up(layout: Layout) -> int:
    from infra.local.start import start_everything  # brings in HTTP client code that no other command needs

    def say_so() -> None:
        say("  another 'make up' of this clone is at work: waiting for it")

    with exclusive_lock(layout.up_lock, before_waiting=say_so):
        return start_everything(layout, os.environ)


def down(layout: Layout) -> int:
    started_s = time.monotonic()
    if stop(layout):
        say(
            f"everything has stopped ({time.monotonic() - started_s:.1f} s); the data are kept in {_short(layout.home)}"
        )
    else:
        say("nothing was running")
    return 0


def status(layout: Layout) -> int:
    """Exit status 0 if everything is as it should be, 3 if nothing runs, 1 otherwise."""
    report = read_report(layout)
    if report is None:
        leftovers = find_processes(layout.marker)
        say(
            "nothing runs"
            + (f", but {len(leftovers)} processes are left over: 'make down' ends them" if leftovers else "")
        )
        return 3
    now_s = time.time()
    say(f"supervisor {report.pid}, running for {_duration(now_s - report.started_s)}")
    for each in report.processes:
        restarts = f", started {each.starts} times" if each.starts > 1 else ""
        pid = f"pid {each.pid}" if each.pid else ""
        line = f"  {each.name:<12} {each.state:<12} {_duration(now_s - each.since_s):>9}  {pid:<12}{restarts}"
        say(f"{line.rstrip()}  {each.detail}".rstrip())
    ports = load_ports(layout)
    if ports is not None:
        say(f"gateway: http://127.0.0.1:{ports.gateway_http}  keys and addresses: {_short(layout.env_file)}")
    return 0 if all(is_settled(each) for each in report.processes) else 1


def logs(layout: Layout, names: list[str], *, follow: bool, lines: int) -> int:
    """The last lines of the logs, in their files' order; with `follow` also what comes.

    `workers` stands for the newest workers' logs. Without names it is all that runs; set-up's logs are shown by name.
    """
    known = {path.stem: [path] for path in sorted(layout.logs.glob("*.log"))}
    workers = sorted(layout.worker_logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    if workers:
        known["workers"] = workers[-NEWEST_WORKERS:]
    unknown = [name for name in names if name not in known]
    if unknown or not known:
        have = ", ".join(known) or "none yet: run 'make up'"
        raise SetupFailed(f"no log of {', '.join(unknown) or 'anything'}; there are: {have}")
    chosen = names or [name for name in known if name not in SET_UP_LOGS] or list(known)
    files = [str(path) for name in chosen for path in known[name]]
    command = ["tail", "-n", str(lines), *(["-F"] if follow else []), *files]
    try:
        return subprocess.run(command).returncode
    except KeyboardInterrupt:
        return 0


def clean(layout: Layout) -> int:
    """Stop everything and remove `.local/`: the tests' servers in it too. `.venv/` stays."""
    try:
        with exclusive_lock(layout.up_lock):
            for each in (layout, test_layout(ROOT), e2e_layout(ROOT)):
                stop(each)
                remove_data(each.home / "postgres")
            shutil.rmtree(layout.home)
    except AlreadyLocked:
        raise SetupFailed("a 'make up' of this clone is at work: wait for it, or stop it") from None
    say(f"{_short(layout.home)} is removed")
    return 0


def env(layout: Layout) -> int:
    """Print `.local/env`."""
    if not layout.env_file.exists():
        raise SetupFailed(f"{_short(layout.env_file)} does not exist yet: run 'make up'")
    sys.stdout.write(layout.env_file.read_text())
    return 0


def run(layout: Layout, command: list[str]) -> int:
    """Run a command, with `.venv`'s programs first in its path, as one that knows where this set's servers are."""
    addresses, _ = build(layout, "servers", os.environ)
    if not command:
        raise SetupFailed("name a command, such as: run python -m services.billing.price_list check FILE")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    env = {**os.environ, **addresses.env(), "PATH": path}
    try:
        return subprocess.run(command, env=env).returncode
    except FileNotFoundError:
        raise SetupFailed(f"there is no command '{command[0]}'") from None
    except KeyboardInterrupt:
        return 130


def _short(path: Path) -> str:
    return os.path.relpath(path, ROOT) if ROOT in path.parents else str(path)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.local", description="Runs Roundhouse on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("up", "start everything and wait until the demo resource is live"),
        ("down", "stop everything"),
        ("status", "what runs"),
        ("clean", "stop everything and remove .local/"),
        ("env", "print .local/env"),
    ):
        commands.add_parser(name, help=words)
    logs_parser = commands.add_parser("logs", help="show the logs")
    logs_parser.add_argument("names", nargs="*", help="processes; all, if none is named")
    logs_parser.add_argument("-f", "--follow", action="store_true")
    logs_parser.add_argument("-n", "--lines", type=int, default=20)
    run_parser = commands.add_parser(
        "run", help="run a command that knows where the servers are (DATABASE_URL, ...)"
    )
    run_parser.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    arguments = parser.parse_args(argv)
    layout = main_layout()
    try:
        if arguments.command == "logs":
            return logs(layout, arguments.names, follow=arguments.follow, lines=arguments.lines)
        if arguments.command == "run":
            return run(layout, arguments.words)
        simple = {"up": up, "down": down, "status": status, "clean": clean, "env": env}
        return simple[arguments.command](layout)
    except SetupFailed as failure:
        fail(str(failure))
        return 1
    except BrokenPipeError:  # whoever read our output has seen enough (`make status | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        fail(explain_os_error(error, step=arguments.command))
        return 1
    except KeyboardInterrupt:
        fail("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
