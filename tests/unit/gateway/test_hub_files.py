from __future__ import annotations

import pytest

from services.gateway.hub_files import choose_files
from shared.model_files import ModelFolderError, ModelFolderLimits

LIMITS = ModelFolderLimits(total_bytes=1000, tokenizer_file_bytes=500, config_file_bytes=100, files=6)
SHARDS = {f"model-0000{n}-of-00002.safetensors": 300 for n in (1, 2)}
INDEX = {"model.safetensors.index.json": 50}
ONE = {"config.json": 10, "tokenizer.json": 20, "model.safetensors": 400}
ADAPTER = {"adapter_config.json": 5, "adapter_model.safetensors": 60}


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        (ONE, ONE),
        (
            ONE
            | {"README.md": 1, "x.bin": 5, "consolidated.safetensors": 9, "sub/config.json": 1, "a.py": 1},
            ONE,
        ),
        ({"config.json": 1} | SHARDS | INDEX, {"config.json": 1} | SHARDS | INDEX),
        # Both forms of one model
        (ONE | SHARDS | INDEX, ONE),
        (ADAPTER | {"tokenizer.json": 9, "optimizer.bin": 9}, ADAPTER),
        # Beside a whole model an adapter is not the model
        (ONE | ADAPTER, ONE),
        # Sizes of what is left out do not count
        (ONE | {"pytorch_model.bin": 10**9, "other.txt": None}, ONE),
    ],
)
def test_what_makes_a_model_is_chosen(listed: dict[str, int | None], chosen: dict[str, int]) -> None:
    assert choose_files(listed, LIMITS) == chosen


@pytest.mark.parametrize(
    ("listed", "code"),
    [
        ({}, "missing_file"),
        ({"config.json": 1, "pytorch_model.bin": 5}, "missing_file"),
        ({"adapter_config.json": 1, "model.safetensors": 5}, "missing_file"),
        (ONE | {"config.json": None}, "missing_file"),
        (ONE | {"config.json": -1}, "missing_file"),
        (ONE | {"config.json": 101}, "model_too_large"),
        (ONE | {"model.safetensors": 990}, "model_too_large"),
        (ONE | {n: 1 for n in ("generation_config.json", "vocab.json", "merges.txt", "chat_template.jinja")}, "model_too_large"),
    ],
)  # fmt: skip
def test_what_makes_none_is_refused(listed: dict[str, int | None], code: str) -> None:
    with pytest.raises(ModelFolderError) as refusal:
        choose_files(listed, LIMITS)
    assert refusal.value.code == code
