"""`python -m loadtest.batch`: a batch through the openai client, end to end: how fast, how much memory, each line once.

Everything is real but the engine, which takes no time (with `--real` it is the real one, with the real model). With
`--kill` each process is killed (-9) in turn while the batch runs, and started again. In the end every line must be in the
output once and right, every answer must have one record in billing, and the audit must find nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import asyncpg
from openai import OpenAI
from openai.types import Batch

from loadtest.audit import settled_audit
from loadtest.report import Row, print_table, write_json
from loadtest.stack import Stack, running_stack

ENDPOINT = "/v1/chat/completions"
LINES, REAL_LINES, QUICK_LINES = 10_000, 200, 200
FLOOR_LINES_S, TARGET_LINES_S = 300.0, 500.0
MEMORY_LIMIT_MIB = 300.0
STUB_TOKENS, REAL_TOKENS = 8, 32
LIMIT_S = 3600.0
LOOK_S = 0.25
AUDIT_WAIT_S = 60.0
KILLED = ("batch", "worker", "gateway", "billing")
OURS = ("gateway", "batch", "billing")
"""Whose memory is bounded; a worker's is its models'."""


class Run:
    """One batch on one stack."""

    def __init__(self, stack: Stack, lines: int, *, real: bool) -> None:
        self.stack, self.lines, self.real = stack, lines, real
        self.max_tokens = REAL_TOKENS if real else STUB_TOKENS
        self.memory_bytes: dict[str, int] = {}
        self.processor_s: dict[str, float] = {}
        """From the batch's creation to its end."""
        self.start_worker()

    def start_worker(self) -> None:
        if self.real:
            self.stack.start_real_worker("worker")
        else:
            self.stack.start_worker("worker", step_s=0.0, max_batch=64, tokens_per_step=STUB_TOKENS)

    @property
    def client(self) -> OpenAI:
        """A new one each time: a killed gateway leaves dead connections."""
        return OpenAI(base_url=f"{self.stack.base_url}/v1", api_key=self.stack.api_key, max_retries=5)

    def content(self) -> bytes:
        def line(index: int) -> str:
            messages = [{"role": "user", "content": f"Say something about the number {index}."}]
            body = {"model": self.stack.model, "messages": messages, "max_tokens": self.max_tokens}
            return json.dumps({"custom_id": f"line-{index}", "method": "POST", "url": ENDPOINT, "body": body})

        return "\n".join(map(line, range(self.lines))).encode()

    def run(self, kill: bool) -> tuple[Batch, float]:
        """Upload, create, wait; return the batch and the seconds from its creation to its end."""
        client = self.client
        file = client.files.create(file=("lines.jsonl", io.BytesIO(self.content())), purpose="batch")
        before_s = self.stack.processor_s()
        started_s = time.monotonic()
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        victims = list(KILLED) if kill else []
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            if time.monotonic() - started_s > LIMIT_S:
                raise RuntimeError(f"not over after {LIMIT_S} s: {batch}")
            time.sleep(LOOK_S)
            batch = client.batches.retrieve(batch.id)
            for name, size in self.stack.memory_bytes().items():
                self.memory_bytes[name] = max(size, self.memory_bytes.get(name, 0))
            done = batch.request_counts.completed if batch.request_counts else 0
            if victims and done > self.lines * (1 - len(victims) / (len(KILLED) + 1)):
                self._kill(victims.pop(0))
                client = self.client
        took_s = time.monotonic() - started_s
        for name, now_s in self.stack.processor_s().items():
            self.processor_s[name] = now_s - before_s.get(name, 0.0)
        return batch, took_s

    def _kill(self, victim: str) -> None:
        print(f"kill -9 {victim}", file=sys.stderr)
        process = self.stack.processes.pop(victim)
        process.kill()
        process.wait()
        if victim == "worker":
            self.start_worker()
        elif victim == "gateway":
            self.stack.restart_gateway()
        else:
            self.stack.start_service(victim)

    def wrong_lines(self, batch: Batch) -> int:
        """Lines that are not in the output once, in their place, with their whole answer."""
        if batch.output_file_id is None:
            return self.lines
        found = [json.loads(line) for line in self.client.files.content(batch.output_file_id).iter_lines()]
        wrong = sum(not self._is_right(index, line) for index, line in enumerate(found))
        return wrong + abs(self.lines - len(found))

    def _is_right(self, index: int, line: dict[str, Any]) -> bool:
        body = line["response"]["body"]
        tokens, text = body["usage"]["completion_tokens"], body["choices"][0]["message"]["content"]
        if line["custom_id"] != f"line-{index}" or line["response"]["status_code"] != 200:
            return False
        if self.real:
            return 0 < tokens <= self.max_tokens and bool(text)
        return bool(tokens == self.max_tokens and text == "".join(f"t{i} " for i in range(self.max_tokens)))

    async def wrong_records(self, batch: Batch) -> int:
        """Answers that billing knows not once, and other jobs of the batch that cost something."""
        connection = await asyncpg.connect(self.stack.database_url)
        try:
            deadline_s = time.monotonic() + AUDIT_WAIT_S
            while True:
                wrong: int = await connection.fetchval(
                    """
                    SELECT (SELECT count(*) FROM batch.lines l WHERE l.batch_id = $1 AND 1 <> (
                                SELECT count(*) FROM billing.requests r
                                WHERE r.request_id = l.request_id AND r.outcome = 'succeeded'))
                         + (SELECT count(*) FROM billing.requests r
                            WHERE r.work_class = 'batch' AND r.outcome <> 'succeeded' AND r.charged_nanousd <> 0)
                         + (SELECT count(*) FROM billing.requests r
                            WHERE r.work_class = 'batch' AND r.outcome = 'succeeded' AND NOT EXISTS (
                                SELECT 1 FROM batch.lines l WHERE l.request_id = r.request_id))
                    """,
                    batch.id,
                )
                if not wrong or time.monotonic() > deadline_s:
                    return wrong
                await asyncio.sleep(0.5)
        finally:
            await connection.close()


def measure(parsed: argparse.Namespace) -> list[Row]:
    with running_stack() as stack:
        stack.start_service("batch")
        stack.start_service("billing")
        run = Run(stack, parsed.lines, real=parsed.real)
        batch, took_s = run.run(parsed.kill)
        wrong_lines = run.wrong_lines(batch)
        wrong_records = asyncio.run(run.wrong_records(batch))
        _, results = asyncio.run(settled_audit(stack.database_url, [], AUDIT_WAIT_S))
        findings = [finding for result in results for finding in result.findings]
        for finding in findings[:20]:
            print(finding, file=sys.stderr)
    rate = run.lines / took_s
    rows = [Row("lines end to end", "lines/s", round(rate, 1))]
    if not parsed.kill and not parsed.real:
        ratio = round(rate / FLOOR_LINES_S, 2)
        target = round(TARGET_LINES_S / FLOOR_LINES_S, 2)
        rows = [Row("lines end to end", "lines/s", round(rate, 1), ratio=ratio, floor=1, target=target)]
    rows.append(_none("lines that are not there once and right", f"of {run.lines}", wrong_lines))
    rows.append(_none("records that do not fit", "records", wrong_records))
    rows.append(_none("the audit's findings", "findings", len(findings)))
    if not parsed.kill:
        for name, spent_s in [*sorted(run.processor_s.items()), ("all", sum(run.processor_s.values()))]:
            rows.append(Row(f"processor time for a line: {name}", "ms", round(spent_s / run.lines * 1000, 2)))
    for name, size in sorted(run.memory_bytes.items()):
        mib = round(size / 2**20, 1)
        bounded = name in OURS
        share = round(MEMORY_LIMIT_MIB / mib, 2) if bounded else None
        rows.append(Row(f"memory: {name}", "MiB", mib, ratio=share, floor=1 if bounded else None))
    return rows


def _none(name: str, unit: str, count: int) -> Row:
    return Row(name, unit, count, ratio=0 if count else 1, floor=1, target=1)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.batch", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--lines", type=int, help=f"default: {LINES}; {REAL_LINES} with --real")
    parser.add_argument("--real", action="store_true", help="the real engine with the real model")
    parser.add_argument("--kill", action="store_true", help="kill -9 each process in turn meanwhile")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_LINES} lines: only shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    if parsed.lines is None:
        parsed.lines = QUICK_LINES if parsed.quick else REAL_LINES if parsed.real else LINES
    return parsed


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    rows = measure(parsed)
    print_table(rows)
    if parsed.json:
        write_json(rows, parsed.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
