"""A real worker process (around the stub engine, or the real one) for tests of the job path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shared.ids import new_id
from shared.messages import EmbedJob, GenerateJob, Job, ModelRef, SamplingParams, WorkerSpec
from shared.model_folder import ModelManifest

MODEL = ModelRef(model_id="mod_stub", revision=1, name="team/stub", folder="mod_stub/1", signature="0" * 16)


def stub_store(folder: Path) -> Path:
    """A model store whose one model has no files: the stub engine reads none."""
    target = folder / MODEL.folder
    target.mkdir(parents=True)
    manifest = ModelManifest(
        files=(),
        architecture="LlamaForCausalLM",
        signature=MODEL.signature,
        canonical_config={},
        context_tokens=2048,
        vocab_size=1 << 16,
        eos_token_ids=(),
        parameter_count=1,
        has_chat_template=False,
    )
    (target / "manifest.json").write_text(json.dumps(manifest.to_json()))
    return folder


@dataclass
class WorkerProcess:
    amqp_url: str
    store: Path
    resource_id: str
    log: Path
    max_batch: int = 64
    step_s: float = 0.02
    module: str = "loadtest.stub_worker"
    environment: dict[str, str] = field(default_factory=dict)
    preload: list[ModelRef] = field(default_factory=list)

    def start(self) -> WorkerProcess:
        spec = WorkerSpec(
            worker_id=new_id("wrk"),
            resource_id=self.resource_id,
            place=0,
            incarnation=new_id("inc"),
            pool=False,
            model_type="stub",
            precision="bf16",
            device_kind="cpu",
            max_batch=self.max_batch,
            max_context_tokens=2048,
            kv_tokens=32768,
            preload=self.preload,
        )
        self.spec = spec
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            cwd=Path(__file__).resolve().parents[2],
            env={
                **os.environ,
                "AMQP_URL": self.amqp_url,
                "OPS_PORT": "0",
                "ROUNDHOUSE_WORKER_SPEC": msgspec.json.encode(spec).decode(),
                "ROUNDHOUSE_MODEL_STORE": str(self.store),
                "STUB_STEP_S": str(self.step_s),
                **self.environment,
            },
            stderr=self.log.open("ab"),
        )
        return self

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


def stub_embed_job(
    owner_queue: str, resource_id: str, inputs: list[list[int]], dimensions: int | None = None
) -> EmbedJob:
    job = stub_job(owner_queue, resource_id, max_tokens=1)
    common = {name: getattr(job, name) for name in Job.__struct_fields__}
    return EmbedJob(**common, operation="embeddings", inputs=inputs, dimensions=dimensions)


def stub_job(owner_queue: str, resource_id: str, *, max_tokens: int, deadline_s: float = 60.0) -> GenerateJob:
    import time

    now_ms = time.time_ns() // 1_000_000
    return GenerateJob(
        job_id=new_id("job"),
        request_id=new_id("req"),
        team_id="team_a",
        key_id="key_a",
        resource_id=resource_id,
        billing="ppt",
        work_class="live",
        operation="text_completion",
        model_type="stub",
        model=MODEL,
        owner_queue=owner_queue,
        prompt_tokens=[1, 2, 3],
        max_tokens=max_tokens,
        accepted_unix_ms=now_ms,
        deadline_unix_ms=now_ms + int(deadline_s * 1000),
        sampling=SamplingParams(temperature=0.0),
    )
