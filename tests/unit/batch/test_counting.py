"""Lines that no tokenizer survives end a count: all others wait behind it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from services.batch import counting
from services.batch.counting import Subject, count_lines
from services.batch.input_lines import AcceptedLine, Problem
from services.batch.quote import Answers
from shared.inference.errors import ApiError
from shared.inference.principal import ModelView


class Files:
    async def read_range(self, path: str, start: int, size: int) -> bytes:
        return b"x" * size


class BusyTokenizers:
    def __init__(self) -> None:
        self.asked = 0

    async def prepare(self, *_of: Any) -> list[Any]:
        self.asked += 1
        raise ApiError(503, "tokenizer_unavailable", "The tokenizer ended.")


async def test_a_count_that_never_succeeds_ends_as_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "BUSY_RETRY_S", 0.001)
    monkeypatch.setattr(counting, "BUSY_LIMIT_S", 0.05)
    tokenizers = BusyTokenizers()
    model = ModelView("mod_1", "team_a", "acme", "tiny", 1, "mod_1/1", "0" * 16, "tiny", 64, 258, (257,), 0)
    counted = await count_lines(
        Subject("bq_1", "team_1", "key_1", "/v1/completions", "in"),
        [AcceptedLine(1, "a", 0, 10)],
        model,
        2048,
        Answers(basis="none"),
        cast(Any, Files()),
        cast(Any, tokenizers),
    )
    assert isinstance(counted, Problem) and counted.code == "count_unavailable"
    assert "The tokenizer ended" in counted.message and tokenizers.asked > 1
