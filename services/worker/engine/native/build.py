"""Compiles the C files of this folder, once for each kind of processor they know, and loads the best that this one can run.

    python services/worker/engine/native/build.py

Set-up runs that, so that no worker waits for a compiler; it needs no package. The libraries lie in `_build/`, named by what they were
made from: sources and flags. A machine without a compiler or without AVX2 has none; the engine then computes with
torch alone, slower, and `reason` says why.
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
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra")
_COMPILE_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Build:
    """flags: the compiler's. cpu_flags: what /proc/cpuinfo must say of the processor: flags, or whose it is.

    rounds_rows: whether rows are rounded to bf16 where weights are, as other libraries do; else they stay fp32. Images of such
    a build are its own, since what a model says differs in the last bits.
    """

    name: str
    flags: tuple[str, ...]
    cpu_flags: frozenset[str]
    rounds_rows: bool = False


AVX512 = Build(
    "AVX-512",
    (
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mfma",
        "-mprefer-vector-width=512",
    ),
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma"}),
)
# The products of pairs of bf16 take one step for two on AMD's processors (Zen 4: twice as fast as fp32), two on Intel's.
AVX512_BF16 = Build(
    "AVX-512 BF16",
    (*AVX512.flags, "-mavx512bf16", "-DRH_BF16_ROWS"),
    AVX512.cpu_flags | {"avx512_bf16", "AuthenticAMD"},
    rounds_rows=True,
)
AVX2 = Build("AVX2", ("-mavx2", "-mfma"), frozenset({"avx2", "fma"}))
BUILDS = (AVX512_BF16, AVX512, AVX2)
"""The best first."""


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """library: None where there is none, and `reason` says why. build: which it is; the least that there would be."""

    library: ctypes.CDLL | None
    reason: str
    build: Build


@functools.cache
def load_library() -> NativeLibrary:
    """The best build for this processor; compiles it if that was not done yet (some seconds). Once for each process.

    An older compiler may not know the newest instructions: then the next build serves. Never raises for a machine's lacks.
    """
    suitable = [build for build in BUILDS if not missing_flags(build)] or [BUILDS[-1]]
    for build in suitable:
        found = load_build(build)
        if found.library is not None:
            break
    return found


def missing_flags(build: Build) -> list[str]:
    """What the build needs and this processor lacks."""
    return sorted(build.cpu_flags - _cpu_flags())


def load_build(build: Build) -> NativeLibrary:
    """As `load_library`, one build, each time anew."""
    if missing := missing_flags(build):
        return NativeLibrary(None, f"this processor lacks {', '.join(missing)}", build)
    try:
        compiler, path = find_compiler(), _library_path(build)
        if not path.exists():
            if compiler is None:
                return NativeLibrary(None, "no C compiler (cc) was found", build)
            _compile(compiler, build, path)
        from .bindings import declare

        library = ctypes.CDLL(str(path))
        declare(library)
        return NativeLibrary(library, "", build)
    except (OSError, subprocess.SubprocessError) as problem:
        detail = problem.stderr if isinstance(problem, subprocess.CalledProcessError) else problem
        return NativeLibrary(None, f"the C kernels could not be compiled: {detail}", build)


def find_compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _sources() -> list[Path]:
    return sorted(_HERE.glob("*.c"))


def _library_path(build: Build) -> Path:
    digest = hashlib.sha256(" ".join((*_FLAGS, *build.flags)).encode())
    for path in (*_sources(), *sorted(_HERE.glob("*.h"))):
        digest.update(path.read_bytes())
    return (
        _BUILD
        / f"kernels-{build.name.lower().replace('-', '').replace(' ', '-')}-{digest.hexdigest()[:16]}.so"
    )


def _compile(compiler: str, build: Build, path: Path) -> None:
    _BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_BUILD) as scratch:
        made = Path(scratch) / path.name
        subprocess.run(
            [compiler, *_FLAGS, *build.flags, "-o", str(made), *map(str, _sources()), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMPILE_TIMEOUT_S,
        )
        # Whoever else compiles at the same time makes the same file: the last rename wins, and both are whole.
        os.replace(made, path)
    wanted = {_library_path(each) for each in BUILDS}
    for old in _BUILD.glob("kernels-*.so"):
        if old not in wanted:
            old.unlink(missing_ok=True)  # of other sources; who has it open keeps it


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    first = {name.strip(): value for name, _, value in (line.partition(":") for line in reversed(lines))}
    return frozenset(f"{first.get('flags', '')} {first.get('vendor_id', '')}".split())


def main() -> int:
    """Compiles for whatever machine will run it: an image may be built on another one. Fails if nothing could be compiled."""
    compiler = find_compiler()
    _BUILD.mkdir(exist_ok=True)
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0  # other processors have no such instructions: torch serves them
    if compiler is None and not all(_library_path(build).exists() for build in BUILDS):
        print("no C compiler (cc) was found: the engine will compute with torch alone", file=sys.stderr)
        return 1
    for build in BUILDS:
        path = _library_path(build)
        try:
            if compiler is not None and not path.exists():
                _compile(compiler, build, path)
        except subprocess.CalledProcessError as problem:
            print(f"{build.name}: {problem.stderr}", file=sys.stderr)
    return 0 if any(_library_path(build).exists() for build in BUILDS) else 1


if __name__ == "__main__":
    sys.exit(main())
