"""`make up` from its first step to its last line: demo models beside the servers, services, demo, what to do next."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.credentials import save_credentials, with_demo_key
from infra.local.demo import Demo, ensure_demo
from infra.local.demo_model import BASE_NAME, FINE_TUNES
from infra.local.failures import SetupFailed, explain
from infra.local.layout import ROOT, Layout, write_private
from infra.local.management_api import ManagementApi
from infra.local.ports import LOOPBACK
from infra.local.progress import done_line, say
from infra.local.up import ensure_running

MODELS_LOG = "demo-models"


@dataclass(frozen=True, slots=True)
class Stack:
    """A running system with its demo: what a client needs."""

    base_url: str
    admin_key: str = field(repr=False)
    demo: Demo


def start_everything(layout: Layout, environ: Mapping[str, str]) -> int:
    """`make up`: the stack, and words about it."""
    started_s = time.monotonic()
    stack = ensure_stack(layout, environ)
    say(done_line("from the start to the first answer", time.monotonic() - started_s))
    say(closing_words(stack, layout.env_file))
    return 0


def ensure_stack(layout: Layout, environ: Mapping[str, str]) -> Stack:
    """Everything runs, the demo resource is live and has answered, and `env` is written, when this returns.

    Raises SetupFailed; what runs then goes on running if it is the demo that failed.
    """
    layout.make_folders()
    models = DemoModels(layout)
    try:
        ports, credentials = ensure_running(layout, "all", environ)
        folders = models.wait()
    except BaseException:
        models.cancel()
        raise
    base_url = f"http://{LOOPBACK}:{ports.gateway_http}"
    platform = ManagementApi(base_url, credentials.admin_key)
    demo = ensure_demo(platform, credentials.demo_key, folders, device_kind())
    if demo.key != credentials.demo_key:
        save_credentials(layout, with_demo_key(credentials, demo.key))
    stack = Stack(base_url, credentials.admin_key, demo)
    write_private(layout.env_file, env_text(stack))
    return stack


class DemoModels:
    """The demo's model folders, made in a process of its own while the servers start."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._started_s = time.monotonic()
        self._log = layout.logs / f"{MODELS_LOG}.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "infra.local.demo_model", str(layout.models)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._took_s = 0.0
        self._waiter = threading.Thread(target=self._wait_for_end, daemon=True)
        self._waiter.start()

    def wait(self) -> list[str]:
        """The names of the folders. Raises SetupFailed if they could not be made."""
        self._waiter.join()
        if self._process.returncode != 0:
            output = self._log.read_text(errors="replace")
            raise SetupFailed(explain(output, step="the demo models", log=os.path.relpath(self._log, ROOT)))
        say(done_line("demo models (made beside the servers)", self._took_s))
        return [BASE_NAME, *FINE_TUNES]

    def cancel(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def _wait_for_end(self) -> None:
        self._process.wait()
        self._took_s = time.monotonic() - self._started_s


def device_kind() -> str:
    """What this machine's node agent will offer: its GPU, if it has one that the driver knows."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def env_text(stack: Stack) -> str:
    """`.local/env` in shell syntax."""
    values = {
        "ROUNDHOUSE_URL": stack.base_url,
        "ROUNDHOUSE_API_KEY": stack.demo.key,
        "ROUNDHOUSE_ADMIN_KEY": stack.admin_key,
        "ROUNDHOUSE_MODEL": stack.demo.model,
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def closing_words(stack: Stack, env_file: Path) -> str:
    demo, base_url = stack.demo, stack.base_url
    where = os.path.relpath(env_file, ROOT)
    return f"""
{demo.model} answered: {demo.answer}

  base URL   {base_url}/v1
  key        {demo.key}
  console    {base_url}/console
  model      {demo.model}

Next, for example:
  set -a; . {where}; set +a
  curl $ROUNDHOUSE_URL/v1/chat/completions -H "Authorization: Bearer $ROUNDHOUSE_API_KEY" -H 'Content-Type: application/json' \\
    -d '{{"model": "'$ROUNDHOUSE_MODEL'", "messages": [{{"role": "user", "content": "Hello"}}], "stream": true}}'
  make status   make logs   make down"""
