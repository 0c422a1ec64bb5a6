"""The measuring scripts run as their page says. What they measure here, beside other tests, is not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.layout import ROOT
from loadtest.child_process import SideError
from loadtest.engine_sides import Sides, SideSpec
from services.worker.engine.native.build import load_library
from tests.conftest import Servers

SCRIPTS = (
    "path",
    "batch",
    "batch_gaps",
    "batch_quote",
    "billing_catchup",
    "budget_check",
    "chaos",
    "storm",
    "audit",
    "engine",
    "hotswap",
    "hotswap_soak",
    "scaling_real",
)


def run_script(*arguments: str, servers: Servers | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ}
    if servers is not None:
        environment |= {
            "DATABASE_URL": servers.database_url,
            "REDIS_URL": servers.redis_url,
            "AMQP_URL": servers.amqp_url,
            "AMQP_MANAGEMENT_URL": servers.amqp_management_url,
        }
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_how_it_is_called(script: str) -> None:
    done = run_script(f"loadtest.{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m loadtest.{script}" in done.stdout
    assert "--json" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_path_is_measured(servers: Servers, tmp_path: Path) -> None:
    done = run_script("loadtest.path", "--quick", "--json", str(tmp_path / "rows.json"), servers=servers)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    for name in (
        "added latency p50 at 100/s",
        "added latency p99 at 100/s",
        "requests at saturation",
        "tokens streamed to clients",
    ):
        assert rows[name]["ours"] > 0 and rows[name]["ratio"] > 0, rows[name]
        assert rows[name]["floor"] == 1, rows[name]
        assert name in done.stdout
    assert (rows["requests at saturation"]["target"], rows["tokens streamed to clients"]["target"]) == (
        2.4,
        2,
    )
    for name in ("gateway", "worker", "rabbitmq"):
        assert rows[f"memory of {name}"]["ours"] > 20, "MiB"
    assert set(rows["requests at saturation"]) == {
        *("name", "unit", "ours", "theirs", "ratio", "floor", "target")
    }


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_engine_is_measured_against_transformers(tmp_path: Path) -> None:
    done = run_script("loadtest.engine", "--quick", "--threads", "1", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    for name in (
        "16 ragged, bf16 | HF generate bf16, best static batch",
        "16 ragged, bf16 | HF generate bf16, one by one",
        "16 ragged, int8 | HF generate fp32, best static batch",
        "16 ragged, int8 | HF generate bf16, best static batch",
        "16 ragged, bf16 | HF generate_batch bf16",
        "one stream, int8 | HF generate bf16, one by one",
        "one stream, int8 | HF generate bf16, one by one, decoding alone",
        "GPT-J 4 layers, 16 ragged, bf16 | HF generate, best precision and static batch",
    ):
        row = rows[name]
        assert row["ours"] > 0 and row["theirs"] > 0, row
        # One pair: its ratio is the row's.
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"]), row
        assert name in done.stdout
    assert rows["perplexity, fp32 | HF fp32"]["ratio"] == pytest.approx(1, abs=1e-3)
    assert rows["perplexity, int8 | fp32"]["floor"] == pytest.approx(1 / 1.02)
    assert rows["greedy tokens equal, fp32 | HF fp32"]["ratio"] > 0.9
    for precision in ("fp32", "bf16", "int8"):
        assert 0 < rows[f"cold start to first token, {precision}"]["ours"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(load_library().library is None, reason="images are of the C kernels")
def test_hotswap_is_measured_on_all_its_sides(servers: Servers, tmp_path: Path) -> None:
    arguments = ("--quick", "--threads", "1", "--json", str(tmp_path / "rows.json"))
    done = run_script("loadtest.hotswap", *arguments, servers=servers)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    for name in (
        "image to first token | from_pretrained",
        "image to first token | from_pretrained and its tokenizer",
        "A decodes 1 while B loads | A alone",
        "A decodes 8 while B loads | A alone",
        "8 models in turn, memory for 3 | one less",
    ):
        assert rows[name]["ours"] > 0 and rows[name]["ratio"] > 0, rows[name]
    for side in ("a worker", "our engine, FIFO", "from_pretrained, FIFO"):
        assert rows[f"{side}: in time of 4 arrivals/s"]["ours"] > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_scaling_simulator_is_held_against_a_real_run(servers: Servers, tmp_path: Path) -> None:
    arguments = ("--seconds", "45", "--json", str(tmp_path / "rows.json"))
    done = run_script("loadtest.scaling_real", *arguments, servers=servers)
    rows = {row["name"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    (mean,) = (row for name, row in rows.items() if name.startswith("mean wait of "))
    assert mean["ours"] > 0 and mean["theirs"] > 0 and mean["floor"] == 0.8, done.stderr
    assert rows["a start in the real run"]["ours"] >= 12
    assert rows["a token in the real run"]["ours"] >= 40
    assert rows["starts in the real run"]["ours"] >= 1, "a crowd started nobody"


@pytest.mark.timeout(60)
def test_a_side_that_cannot_start_says_why(tmp_path: Path) -> None:
    with Sides(tmp_path) as sides, pytest.raises(SideError, match="config.json"):
        sides.get(SideSpec("ours", str(tmp_path / "nothing"), "bf16", 1))
