"""`python -m loadtest.batch_quote`: what a batch on GPUs of its own was quoted, next to what it took and cost.

The real stack with scheduler, node agent and the real model; answers end by themselves. A first batch, whose quote knows
nothing, is what the second one's is made of: other lines of the same kind.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from openai import OpenAI

from infra.local.scratch import execute
from loadtest.report import Row, print_table, write_json
from loadtest.stack import MODEL_TYPE, Stack, post, running_stack

ENDPOINT = "/v1/chat/completions"
FIRST_LINES, LINES, QUICK = 150, 500, (80, 40)
MAX_TOKENS = 128
MAX_BATCH, KV_TOKENS = 16, 16 * 1024
NEAR = 0.2
RATE_NANOUSD = 600_000_000
PRICES_NANOUSD = (20, 60)
LIMIT_S = 1800.0
MEASURED_LIMIT_S = 120.0
SUBJECTS = (
    "a river",
    "a clock",
    "the moon",
    "a carpenter",
    "an old bridge",
    "bread",
    "a lighthouse",
    "winter",
)


def lines(stack: Stack, first: int, count: int) -> bytes:
    def one(number: int) -> str:
        text = f"Write one or two sentences about {SUBJECTS[number % len(SUBJECTS)]}, number {number}."
        body = {
            "model": stack.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": MAX_TOKENS,
        }
        return json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body})

    return "\n".join(one(number) for number in range(first, first + count)).encode()


class Proof:
    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._client = OpenAI(base_url=f"{stack.base_url}/v1", api_key=stack.api_key, max_retries=5)

    def upload(self, content: bytes) -> str:
        return self._client.files.create(file=("lines.jsonl", io.BytesIO(content)), purpose="batch").id

    def quote(self, file_id: str) -> dict[str, Any]:
        body = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "4h", "max_gpus": 1}
        made = post(f"{self._stack.base_url}/api/batches/quote", self._stack.api_key, body)
        while made["status"] == "counting":
            time.sleep(0.5)
            made = self._get(f"/api/batches/quotes/{made['quote_id']}")
        return made

    def quote_once_measured(self, file_id: str) -> dict[str, Any]:
        """Billing tells what GPUs did some seconds later."""
        deadline_s = time.monotonic() + MEASURED_LIMIT_S
        while True:
            made = self.quote(file_id)
            if made["quote"]["resources"][0]["pace_basis"] == "batches":
                return made
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"nothing was measured: {made}")
            time.sleep(3)

    def run(self, file_id: str, quote_id: str) -> dict[str, Any]:
        """Run the batch on a resource of its own; return it when its last minutes are posted."""
        made = self._client.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="4h",  # type: ignore[arg-type]
            extra_body={"own_resource": {"max_gpus": 1, "quote_id": quote_id}},
        )  # fmt: skip
        deadline_s = time.monotonic() + LIMIT_S
        before = -1
        while True:
            time.sleep(2)
            batch = self._get(f"/v1/batches/{made.id}")
            if batch["status"] == "failed" or time.monotonic() > deadline_s:
                raise RuntimeError(f"the batch did not go well: {batch}")
            own = batch["roundhouse"]["own_resource"]
            if own["state"] == "released":
                time.sleep(20)
                batch = self._get(f"/v1/batches/{made.id}")
                minutes = batch["roundhouse"]["own_resource"]["real"]["minutes"]
                if minutes and minutes == before:
                    return batch
                before = minutes

    def _get(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self._stack.base_url + path)
        request.add_header("Authorization", f"Bearer {self._stack.api_key}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))


def measure(parsed: argparse.Namespace) -> list[Row]:
    with running_stack() as stack:
        prompt, completion = PRICES_NANOUSD
        execute(
            stack.database_url,
            f"""
            UPDATE scheduler.performance_options
                SET max_batch = {MAX_BATCH}, kv_tokens = {KV_TOKENS}, hourly_rate_nanousd = {RATE_NANOUSD};
            INSERT INTO billing.prices (price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at)
                VALUES ('price_quote', '{MODEL_TYPE}', 'batch', {prompt}, {completion}, now());
            """,
        )
        stack.start_service("batch")
        stack.start_service("billing")
        stack.start_fleet(1, "services.worker", {})
        proof = Proof(stack)
        first = proof.upload(lines(stack, 0, parsed.first))
        proof.run(first, proof.quote(first)["quote_id"])
        file_id = proof.upload(lines(stack, parsed.first, parsed.lines))
        made = proof.quote_once_measured(file_id)
        batch = proof.run(file_id, made["quote_id"])
    own, quoted = batch["roundhouse"]["own_resource"], made["quote"]
    usage = batch["usage"]
    tokens_cost = prompt * usage["input_tokens"] + completion * usage["output_tokens"]
    pairs = [
        ("prompt tokens", "tokens", usage["input_tokens"], quoted["counted"]["prompt_tokens"]),
        ("answer tokens", "tokens", usage["output_tokens"], quoted["counted"]["completion_tokens"]),
        ("cost by the token", "nano-USD", tokens_cost, quoted["tokens"]["cost_nanousd"]),
        ("time until it is over", "s", own["real"]["finish_s"], own["quoted"]["finish_s"]),
        ("GPU minutes", "minutes", own["real"]["minutes"], own["quoted"]["minutes"]),
        ("cost of its own GPU", "nano-USD", own["real"]["cost_nanousd"], own["quoted"]["cost_nanousd"]),
    ]
    return [near(*pair) for pair in pairs]


def near(name: str, unit: str, real: float, quoted: float) -> Row:
    """ours: what it was; theirs: what was quoted. The ratio is above 1 if these are within a fifth of each other."""
    off = abs(quoted - real) / real
    return Row(name, unit, real, theirs=quoted, ratio=round(NEAR / max(off, 0.01), 2), floor=1)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.batch_quote", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--first", type=int, default=FIRST_LINES, help="lines of the batch that is measured")
    parser.add_argument("--lines", type=int, default=LINES, help="lines of the batch that is quoted")
    parser.add_argument("--quick", action="store_true", help="a few lines: only shows that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.first, parsed.lines = QUICK
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
