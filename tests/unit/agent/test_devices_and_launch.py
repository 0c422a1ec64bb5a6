"""Devices, a worker's environment, and the bound on log files."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from services.worker.agent.devices import Device, find_devices, gpus_in, parse_devices
from services.worker.agent.launch import remove_old_logs, shorten_logs, worker_environment
from services.worker.agent.settings import AgentSettings
from services.worker.agent.state_file import AgentLocked, AgentState, hold_lock, load_state, save_state
from shared.messages import WorkerSpec
from shared.settings import SettingsError, load
from tests.unit.agent.test_decide import make_process, make_start

LISTING = """GPU 0: NVIDIA H200 (UUID: GPU-1)
  MIG 1g.18gb Device 0: (UUID: MIG-1)
GPU 1: NVIDIA H200 (UUID: GPU-2)
"""


def test_each_gpu_in_the_listing_is_a_device() -> None:
    assert gpus_in(LISTING) == [Device("cuda:0", "cuda"), Device("cuda:1", "cuda")]
    assert gpus_in("No devices found.") == []


def test_named_devices_are_used_as_they_are() -> None:
    assert find_devices("cuda:1, cpu:0", 9) == [Device("cuda:1", "cuda"), Device("cpu:0", "cpu")]


@pytest.mark.parametrize(
    "text", ["", "gpu:0", "cuda", "cuda:x", "cpu:0,cpu:0", "cpu:0,,cpu:1", "cpu:00,cpu:0"]
)
def test_a_bad_list_of_devices_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_devices(text)


def test_auto_is_what_nvidia_smi_lists_or_seats_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [d.name for d in find_devices("auto", 2)] == ["cpu:0", "cpu:1"]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: some (UUID: x)'\n")
    program.chmod(0o755)
    assert [d.name for d in find_devices("auto", 2)] == ["cuda:0"]
    program.write_text("#!/bin/sh\necho 'driver not loaded'; exit 9\n")
    assert [d.name for d in find_devices("auto", 1)] == ["cpu:0"]


@pytest.mark.parametrize(
    ("device", "visible"), [(Device("cuda:3", "cuda"), "3"), (Device("cpu:3", "cpu"), "")]
)
def test_a_worker_sees_its_own_device_only_and_no_database(device: Device, visible: str) -> None:
    spec = make_start().spec
    inherited = {
        "AMQP_URL": "amqp://x",
        "DATABASE_URL": "postgresql://x",
        "REDIS_URL": "x",
        "OPS_PORT": "9",
        "PATH": "/",
    }
    environment = worker_environment(inherited, spec, device, node_id="n1", home="/h", threads=3)
    assert environment["CUDA_VISIBLE_DEVICES"] == visible
    assert environment["ROUNDHOUSE_DEVICE"] == device.name
    assert environment["OMP_NUM_THREADS"] == "3"
    assert (environment["AMQP_URL"], environment["PATH"], environment["OPS_PORT"]) == ("amqp://x", "/", "0")
    assert environment.keys().isdisjoint({"DATABASE_URL", "REDIS_URL"})
    assert msgspec.json.decode(environment["ROUNDHOUSE_WORKER_SPEC"], type=WorkerSpec) == spec


def test_only_the_newest_logs_are_kept(tmp_path: Path) -> None:
    for age_s in range(5):
        path = tmp_path / f"inc_{age_s}.log"
        path.touch()
        os.utime(path, (1000 - age_s, 1000 - age_s))
    (tmp_path / "other.txt").touch()
    remove_old_logs(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inc_0.log", "inc_1.log", "other.txt"]


def test_the_state_file_gives_back_what_was_saved_and_a_damaged_one_counts_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "n1.json"
    state = AgentState(highest_epoch=7, processes=[make_process(told_to_stop=True)])
    save_state(path, state)
    assert load_state(path) == state
    path.write_bytes(path.read_bytes()[:-3])
    assert load_state(path) == AgentState()
    path.unlink()
    assert load_state(path) == AgentState()


def test_two_agents_of_one_node_do_not_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.agent.state_file.LOCK_WAIT_S", 0.0)
    path = tmp_path / "agent" / "n1.lock"
    held = hold_lock(path)
    with pytest.raises(AgentLocked):
        hold_lock(path)
    os.close(held)
    os.close(hold_lock(path))


def test_a_long_log_keeps_its_last_whole_lines_and_its_writer_goes_on(tmp_path: Path) -> None:
    (tmp_path / "short.log").write_bytes(b"short\n" * 10)
    with open(tmp_path / "long.log", "ab", buffering=0) as writer:
        writer.writelines(b"line %04d\n" % number for number in range(1000))
        assert shorten_logs(tmp_path, limit_bytes=1000) == 1
        writer.write(b"after\n")
    lines = (tmp_path / "long.log").read_bytes().splitlines()
    assert lines[-2:] == [b"line 0999", b"after"]
    assert lines == [b"line %04d" % number for number in range(1001 - len(lines), 1000)] + [b"after"]
    assert 400 < (tmp_path / "long.log").stat().st_size <= 510
    assert (tmp_path / "short.log").read_bytes() == b"short\n" * 10
    assert shorten_logs(tmp_path, limit_bytes=1000) == 0
    assert shorten_logs(tmp_path / "missing") == 0


GOOD = {"AMQP_URL": "amqp://x", "OPS_PORT": "0", "ROUNDHOUSE_NODE_ID": "n1", "ROUNDHOUSE_HOME": "/h"}


def test_the_worker_command_is_a_json_list() -> None:
    assert load(AgentSettings, GOOD).worker_command[1:] == ("-m", "services.worker")
    assert load(AgentSettings, GOOD | {"ROUNDHOUSE_WORKER_COMMAND": '["a","b"]'}).worker_command == ("a", "b")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ROUNDHOUSE_NODE_ID", "../n"),
        ("ROUNDHOUSE_NODE_ID", ""),
        ("ROUNDHOUSE_WORKER_LOGS", "nowhere"),
        ("ROUNDHOUSE_WORKER_COMMAND", "python"),
        ("ROUNDHOUSE_WORKER_COMMAND", "[]"),
        ("ROUNDHOUSE_CPU_DEVICES", "-1"),
    ],
)
def test_a_bad_setting_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=variable):
        load(AgentSettings, GOOD | {variable: value})
