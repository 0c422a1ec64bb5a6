"""Compiles the C files of this folder once for this machine's processor, and loads them.

    python services/worker/engine/native/build.py

Set-up runs that, so that no worker waits for a compiler; it needs no package. The library lies in `_build/`, named by what it was made from:
sources and flags. A machine without a compiler or without AVX-512 VNNI has no library; the engine then computes
with torch alone, slower, and `reason` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_BUILD = _HERE / "_build"
_FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"),
    "-mprefer-vector-width=512",
)
_NEEDED_CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma"})
_COMPILE_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """library: None where there is none, and `reason` says why."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def load_library() -> NativeLibrary:
    """Compiles if that was not done yet (some seconds); once for each process. Never raises for a machine's lacks."""
    missing = _NEEDED_CPU_FLAGS - _cpu_flags()
    if missing:
        return NativeLibrary(None, f"this processor lacks {', '.join(sorted(missing))}")
    try:
        compiler, path = find_compiler(), _library_path()
        if not path.exists():
            if compiler is None:
                return NativeLibrary(None, "no C compiler (cc) was found")
            _compile(compiler, path)
        from .bindings import declare

        library = ctypes.CDLL(str(path))
        declare(library)
        return NativeLibrary(library, "")
    except (OSError, subprocess.SubprocessError) as problem:
        detail = problem.stderr if isinstance(problem, subprocess.CalledProcessError) else problem
        return NativeLibrary(None, f"the C kernels could not be compiled: {detail}")


def find_compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.c"))


def _library_path() -> Path:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in (*_sources(), _HERE / "kernels.h"):
        digest.update(path.read_bytes())
    return _BUILD / f"kernels-{digest.hexdigest()[:16]}.so"


def _compile(compiler: str, path: Path) -> None:
    _BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_BUILD) as scratch:
        made = Path(scratch) / path.name
        subprocess.run(
            [compiler, *_FLAGS, "-o", str(made), *map(str, _sources()), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        # Whoever else compiles at the same time makes the same file: the last rename wins, and both are whole.
        os.replace(made, path)
    for old in _BUILD.glob("kernels-*.so"):
        if old != path:
            old.unlink(missing_ok=True)  # of other sources; who has it open keeps it


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def main() -> int:
    """Compiles for whatever machine will run it: an image may be built on another one."""
    compiler, path = find_compiler(), _library_path()
    _BUILD.mkdir(exist_ok=True)
    if path.exists() or platform.machine() not in ("x86_64", "AMD64"):
        return 0  # other processors have no such instructions: torch serves them
    if compiler is None:
        print("no C compiler (cc) was found: the engine will compute with torch alone", file=sys.stderr)
        return 1
    try:
        _compile(compiler, path)
    except subprocess.CalledProcessError as problem:
        print(problem.stderr, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
