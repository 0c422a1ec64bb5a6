"""Which devices this host has: its GPUs, or seats on its processors."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Literal

import structlog
from msgspec import Struct

log = structlog.get_logger()

NVIDIA_SMI_TIMEOUT_S = 20.0  # a cold driver takes seconds to answer
_DEVICE = re.compile(r"^(cpu|cuda):(\d{1,3})$")
_GPU_LINE = re.compile(r"^GPU (\d+):", re.MULTILINE)


class Device(Struct, frozen=True):
    name: str
    kind: Literal["cpu", "cuda"]

    @property
    def index(self) -> int:
        return int(self.name.partition(":")[2])


def parse_devices(text: str) -> list[Device]:
    """Read `cuda:0,cuda:1`. Raises ValueError for another form, an empty list or a device named twice."""
    devices: list[Device] = []
    for part in (p.strip() for p in text.split(",")):
        match = _DEVICE.match(part)
        if match is None:
            raise ValueError(f"{part!r} is not a device like cuda:0 or cpu:1")
        devices.append(Device(f"{match[1]}:{int(match[2])}", "cuda" if match[1] == "cuda" else "cpu"))
    if len({d.name for d in devices}) != len(devices):
        raise ValueError(f"a device is named twice in {text!r}")
    return devices


def gpus_in(listing: str) -> list[Device]:
    """The devices in the output of `nvidia-smi -L`."""
    return [Device(f"cuda:{int(index)}", "cuda") for index in _GPU_LINE.findall(listing)]


def find_devices(wanted: str, cpu_devices: int) -> list[Device]:
    """The devices to hand out. `auto`: all GPUs, or without one `cpu_devices` seats. Blocking; raises ValueError."""
    if wanted != "auto":
        return parse_devices(wanted)
    return _gpus_of_host() or [Device(f"cpu:{index}", "cpu") for index in range(cpu_devices)]


def _gpus_of_host() -> list[Device]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("gpus_not_listed", error=type(error).__name__)
        return []
    if done.returncode != 0:
        log.warning("gpus_not_listed", exit_code=done.returncode, output=done.stdout[:200])
        return []
    return gpus_in(done.stdout)
