"""The examples of the page about the queue run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import jsonschema  # type: ignore[import-untyped]
import pytest

from loadtest.stack import running_stack
from tests.conftest import ROOT
from tests.queue_team import make, url_of

PAGE = (ROOT / "services" / "batch" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^## With ([\w-]+)\n.*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_get_their_results() -> None:
    assert [name for name, _ in EXAMPLES] == ["aio-pika", "pika"]
    with running_stack() as stack:
        stack.start_service("batch")
        stack.start_worker("worker", step_s=0.01, max_batch=32)
        credential = make(stack, "reader")
        environment = os.environ | {
            "QUEUE_URL": url_of(credential),
            "QUEUE_EXCHANGE": credential["exchange"],
            "QUEUE_REPLY": credential["reply_queue"],
            "ROUNDHOUSE_MODEL": stack.model,
        }
        for name, code in EXAMPLES:
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
            )
            assert done.returncode == 0, f"{name}: {done.stderr}"
            answers = [json.loads(line) for line in done.stdout.splitlines()]
            assert [each["type"] for each in answers] == ["accepted"] + ["result"] * 5, name
            assert {each["result"]["response"]["status_code"] for each in answers[1:]} == {200}


def test_the_message_on_the_page_is_one() -> None:
    (shown,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    schema = json.loads((ROOT / "shared" / "queue_format.v1.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(shown))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(json.loads(shown) | {"version": 2})
