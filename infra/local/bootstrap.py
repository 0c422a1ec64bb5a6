"""Prepares a machine: Debian's packages, then `.venv/` with pinned dependencies. Standard library only (3.8 or newer).

Every step looks first and does only what is missing, so a second run is instant and a run that was killed half-way
is mended by the next one. Afterwards it becomes `python -m MODULE ARGS...` of the virtual environment.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from infra.local.failures import SetupFailed, explain, explain_os_error
from infra.local.progress import fail, say, step

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".local"
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "infra" / "requirements"

# Torch's CPU build is published for this version, and the tests run on it; newer ones work with the default build.
PREFERRED_PYTHON = (3, 11)
OLDEST_PYTHON = (3, 11)
# A finished environment takes 1.4 GB with the CPU build; pip needs about as much again for downloads and unpacking.
VENV_FREE_BYTES = 3 * 1024**3
# The default build and its CUDA libraries take 4.5 GB, and pip keeps some 2.5 GB of downloads until it has finished.
CUDA_FREE_BYTES = 7 * 1024**3
HEARTBEAT_S = 15.0
APT_LOCK_WAIT_S = 120


class Interpreter(NamedTuple):
    path: str
    version: tuple[int, int, int]
    can_make_venv: bool


def main(argv: Sequence[str]) -> int:
    """Set up, then replace this process by MODULE ARGS... (or end, if none is given)."""
    try:
        HOME.mkdir(mode=0o700, exist_ok=True)
        HOME.chmod(0o700)  # the shell wrapper may have made it with the user's umask
        (HOME / "logs").mkdir(exist_ok=True)
        with _one_at_a_time():
            ensure_packages(os.environ)
            ensure_venv()
            ensure_kernels()
            ensure_command()
    except SetupFailed as failure:
        fail(str(failure))
        return 1
    except OSError as error:
        fail(explain_os_error(error, step="set-up"))
        return 1
    except KeyboardInterrupt:
        fail("interrupted: run it again to go on where it stopped")
        return 130
    if argv:
        os.chdir(
            str(ROOT)
        )  # modules are found from the working directory: nothing is installed into the venv
        python = str(VENV / "bin" / "python")
        os.execv(python, [python, "-m", *argv])
    return 0


class _one_at_a_time:
    """Only one set-up of a clone runs; a second one waits for it, and then finds everything done."""

    def __enter__(self) -> None:
        self._file = open(str(HOME / "bootstrap.lock"), "w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("  another set-up of this clone is at work: waiting for it")
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


# -- Debian's packages ---------------------------------------------------------------------------------------------


def missing_packages(environ: Mapping[str, str]) -> list[str]:
    """Debian packages that are needed and not there. A server that the environment names is not needed here."""
    missing = []
    if choose_interpreter(find_interpreters()) is None:
        missing.append("python3-venv")
    if not shutil.which("cc"):
        missing += ["gcc", "libc6-dev"]
    if not environ.get("AMQP_URL") and not os.path.exists("/usr/lib/rabbitmq/bin/rabbitmq-server"):
        missing.append("rabbitmq-server")
    if not environ.get("REDIS_URL") and not shutil.which("redis-server"):
        missing.append("redis-server")
    if not environ.get("DATABASE_URL") and not list(Path("/usr/lib/postgresql").glob("1[5-9]*/bin/initdb")):
        missing.append("postgresql")
    return missing


def ensure_packages(environ: Mapping[str, str]) -> None:
    missing = missing_packages(environ)
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise SetupFailed(
            "this is not a Debian system: install "
            + ", ".join(missing)
            + " yourself, or name running servers by DATABASE_URL, REDIS_URL and AMQP_URL, and run it again"
        )
    as_root = _root_prefix(missing)
    say("  Debian packages to install: " + " ".join(missing))
    with step("Debian packages"):
        _run_logged(
            [*as_root, "sh", "-c", APT_SCRIPT, "apt", *missing],
            log=HOME / "logs" / "apt.log",
            title="the Debian packages (" + " ".join(missing) + ")",
        )


# Runs as root. While it runs, services of the new packages are not started (policy-rc.d is Debian's way to say so):
# ours are private ones, on other ports. A policy that is already there is left alone; one that an earlier run of ours
# left when it was killed is recognised by its second line. The package lists are fetched only if the first try fails.
APT_SCRIPT = f"""
set -u
export DEBIAN_FRONTEND=noninteractive
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ] || grep -qs '^# roundhouse set-up$' "$policy"; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\\n# roundhouse set-up\\nexit 101\\n' > "$policy" && chmod 755 "$policy"
fi
install() {{
    apt-get -o DPkg::Lock::Timeout={APT_LOCK_WAIT_S} install -y --no-install-recommends "$@"
}}
dpkg --configure -a
install "$@" && exit 0
echo "--- trying again with fresh package lists ---"
apt-get -o DPkg::Lock::Timeout={APT_LOCK_WAIT_S} update && install "$@"
"""


def _root_prefix(missing: Sequence[str]) -> list[str]:
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo"):
        say("  installing Debian packages needs root: sudo may ask for your password")
        return ["sudo"]
    command = "apt-get update && apt-get install -y --no-install-recommends " + " ".join(missing)
    raise SetupFailed(
        f"Debian packages are missing and there is no sudo: run '{command}' as root, then run this again"
    )


# -- the virtual environment ---------------------------------------------------------------------------------------


def find_interpreters() -> list[Interpreter]:
    """The Pythons of this machine that could make the environment, each asked what it is."""
    named = os.environ.get("ROUNDHOUSE_PYTHON")
    candidates = (
        [named] if named else ["python3", "/usr/bin/python3", "python3.11", "python3.12", "python3.13"]
    )
    question = (
        "import sys, json\n"
        "try:\n import venv, ensurepip\n can = True\n"
        "except ImportError:\n can = False\n"
        "print(json.dumps([sys.executable, sys.version_info[:3], can]))"
    )
    found: dict[str, Interpreter] = {}
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        answer = subprocess.run([path, "-c", question], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if answer.returncode == 0:  # a pyenv shim exists for versions that it then refuses to run
            executable, version, can = json.loads(answer.stdout)
            found.setdefault(os.path.realpath(executable), Interpreter(executable, tuple(version), can))
    return list(found.values())


def choose_interpreter(found: Sequence[Interpreter]) -> Interpreter | None:
    """The Python to build on. Pure.

    1. One that cannot make environments, or is older than `OLDEST_PYTHON`, is out.
    2. The first of the preferred version; torch's CPU build is made for it.
    3. Otherwise the first of the rest. None: there is no usable one.
    """
    usable = [each for each in found if each.can_make_venv and each.version[:2] >= OLDEST_PYTHON]
    preferred = [each for each in usable if each.version[:2] == PREFERRED_PYTHON]
    return next(iter(preferred or usable), None)


def requirements_digest(folder: Path) -> str:
    """Changes when any pinned requirement changes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.txt")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def ensure_venv() -> None:
    """`.venv/` holds exactly the pinned packages.

    The stamp is written last and the `installing` mark is removed last: whoever finds the mark finds an environment
    that was left half-way (packages may be unpacked without their records), and builds it anew.
    """
    stamp, installing = VENV / ".roundhouse-stamp", VENV / ".roundhouse-installing"
    wanted = requirements_digest(REQUIREMENTS)
    if stamp.is_file() and not installing.exists() and stamp.read_text() == wanted and _runs(VENV):
        return
    if installing.exists() or (VENV.exists() and not _runs(VENV)):
        say("  an earlier set-up was broken off: building .venv anew")
        shutil.rmtree(str(VENV))
    _check_free_space(VENV_FREE_BYTES)
    if not VENV.exists():
        with step("virtual environment"):
            _make_venv(installing)
    installing.touch()
    log = HOME / "logs" / "pip.log"
    log.write_text("")
    with step("Python packages"):
        _pip(["-r", str(REQUIREMENTS / "dev.txt")], log, "the Python packages")
    with step("torch"):
        _install_torch(log)
    if not _is_cpu_build():
        with step("torch's CUDA libraries"):
            _pip(["--no-deps", "-r", str(REQUIREMENTS / "torch-cuda.txt")], log, "torch's CUDA libraries")
    stamp.write_text(wanted)
    installing.unlink()


def ensure_kernels() -> None:
    """The engine's C kernels, compiled for this clone. Without them it computes with torch alone: slower, not wrong."""
    build = ROOT / "services" / "worker" / "engine" / "native" / "build.py"
    made = [path.stat().st_mtime for path in build.parent.glob("_build/kernels-*.so")]
    if made and max(made) >= max(path.stat().st_mtime for path in build.parent.glob("*.[ch]")):
        return
    with step("C kernels"):
        done = subprocess.run(
            [str(VENV / "bin" / "python"), str(build)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
    if done.returncode:
        say(
            "    not compiled, the engine will be slower: "
            + done.stderr.decode(errors="replace").strip()[-300:]
        )


def ensure_command() -> None:
    """`.venv/bin/roundhouse`: the command of this clone, from whichever folder it is called."""
    command, wanted = VENV / "bin" / "roundhouse", command_text(ROOT, VENV)
    if command.is_file() and command.read_text() == wanted:
        return
    new = command.with_name(".roundhouse.new")
    new.write_text(wanted)
    new.chmod(0o755)
    os.replace(str(new), str(command))


def command_text(root: Path, venv: Path) -> str:
    """The shell script that runs the clone's code: it is not installed as a package. Pure.

    `-P`: a folder that happens to be called `services` where the user stands is not taken for ours.
    """
    python = shlex.quote(str(venv / "bin" / "python"))
    return (
        "#!/bin/sh\n# Written by set-up.\n"
        f'PYTHONPATH={shlex.quote(str(root))} exec {python} -P -m services.cli "$@"\n'
    )


def _install_torch(log: Path) -> None:
    """The CPU build where the configured indexes have one and there is no NVIDIA device, else the default build.

    Asked for by its full version first: pip prefers a file whose hash the index tells over one in a folder of wheels,
    so plain `torch==X` would take the default build of 2 to 3 GB although the CPU build lies at hand.
    """
    requirements = REQUIREMENTS / "torch.txt"
    if not os.path.exists("/dev/nvidiactl"):
        cpu = HOME / "torch-cpu.txt"
        cpu.write_text(cpu_requirements(requirements.read_text()))
        try:
            _pip(["--no-deps", "-r", str(cpu)], log, "torch")
            return
        except SetupFailed as failure:
            if "the package index has no file for" not in str(failure):
                raise
            say("    no CPU build of torch in the configured indexes: taking the default one (about 3 GB)")
    _check_free_space(CUDA_FREE_BYTES)
    _pip(["--no-deps", "-r", str(requirements)], log, "torch")


def cpu_requirements(text: str) -> str:
    """The same pins and hashes with torch's version narrowed to the CPU build. Pure."""
    narrowed, count = re.subn(r"(?m)^(torch==[\d.]+)(?=\s)", r"\1+cpu", text)
    if count != 1:
        raise ValueError("torch.txt must pin torch once")
    return narrowed


def _make_venv(installing: Path) -> None:
    python = choose_interpreter(find_interpreters())
    if python is None:
        raise SetupFailed(
            "no Python {}.{} or newer that can make virtual environments: install python3-venv (Debian 12 has 3.11) "
            "or name one by ROUNDHOUSE_PYTHON, and run it again".format(*OLDEST_PYTHON)
        )
    VENV.mkdir()
    installing.touch()
    _run_logged(
        [python.path, "-m", "venv", str(VENV)],
        log=HOME / "logs" / "venv.log",
        title="the virtual environment",
    )


def _runs(venv: Path) -> bool:
    """Whether the environment's Python still starts and has pip (its base may have been removed, or the folder moved)."""
    python = venv / "bin" / "python"
    if not python.exists() or not list(venv.glob("lib/python3*/site-packages/pip")):
        return False
    where = subprocess.run(
        [str(python), "-c", "import sys; print(sys.prefix)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return where.returncode == 0 and Path(where.stdout.decode().strip()) == venv


def _is_cpu_build() -> bool:
    """Read from the package's metadata: importing a CUDA build fails until its libraries are there."""
    question = "import importlib.metadata as m; print(m.version('torch'))"
    answer = subprocess.run(
        [str(VENV / "bin" / "python"), "-c", question], stdout=subprocess.PIPE, check=True
    )
    return answer.stdout.decode().strip().endswith("+cpu")


def _check_free_space(needed: int) -> None:
    free = shutil.disk_usage(str(ROOT)).free
    if free < needed:
        raise SetupFailed(
            f"the disk of {ROOT} has {free / 1024**3:.1f} GB free and set-up needs "
            f"{needed / 1024**3:.0f} GB: free some space and run it again"
        )


def _pip(arguments: Sequence[str], log: Path, title: str) -> None:
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--require-hashes", "--no-input"]
    _run_logged(
        [*command, "--disable-pip-version-check", "--progress-bar", "off", *arguments], log=log, title=title
    )


# -- running tools -------------------------------------------------------------------------------------------------


def _run_logged(command: Sequence[str], *, log: Path, title: str) -> None:
    """Run a tool with its output appended to `log`; its failure becomes one line. Says every now and then what it is at."""
    with open(str(log), "ab") as sink:
        start = sink.tell()
        process = subprocess.Popen(command, stdin=None, stdout=sink, stderr=subprocess.STDOUT, cwd=str(ROOT))
        ended = threading.Event()
        heartbeat = threading.Thread(target=_say_last_line, args=(log, ended), daemon=True)
        heartbeat.start()
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            ended.set()
    if code != 0:
        with open(str(log), "rb") as source:
            source.seek(start)
            output = source.read().decode(errors="replace")
        raise SetupFailed(explain(output, step=title, log=os.path.relpath(str(log), str(ROOT))))


def _say_last_line(log: Path, ended: threading.Event) -> None:
    started_s = time.monotonic()
    while not ended.wait(HEARTBEAT_S):
        with open(str(log), "rb") as source:
            source.seek(max(0, os.path.getsize(str(log)) - 2000))
            lines = source.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        shown = last if len(last) <= 90 else f"{last[:89].rstrip()}…"
        say(f"    {time.monotonic() - started_s:4.0f} s  {shown}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
