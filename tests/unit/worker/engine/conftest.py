"""One random tiny model of the Llama family for the whole session: making it costs more than using it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from services.worker.engine.native.build import load_library
from tests.unit.worker.engine.builders import save_model, save_tokenizer, tiny_config


@dataclass(frozen=True)
class TinyModel:
    """folder: as the engine loads it. oracle: the same weights in transformers."""

    folder: Path
    oracle: Any


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Threads cost more than they bring at this size."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("tiny-llama")
    return TinyModel(folder, save_model(folder, tiny_config()))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Both ways of computing on a CPU; the C kernels only where there can be any."""
    chosen: str = request.param
    library = load_library()
    if chosen == "native" and library.library is None:
        pytest.skip(library.reason)
    return chosen
