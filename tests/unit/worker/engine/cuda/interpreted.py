"""Runs a module of checks under Triton's interpreter, which must be chosen before the kernels are defined.

The interpreter has no bf16 products: fp32 and fp16 stand for all. What only a GPU can show is in `loadtest.gpu_engine`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[5]


def run_checks(module: str, *arguments: str) -> None:
    """The module fails by an exception, whose text is then this test's."""
    outcome = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "checked" in outcome.stdout
