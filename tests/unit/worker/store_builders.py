"""A model store with tiny models in it, as the gateway leaves them."""

from __future__ import annotations

import json
from pathlib import Path

from services.worker.engine import EngineConfig
from shared.model_files import ModelFolderLimits
from shared.model_folder import inspect_model_folder
from tests.unit.worker.engine.builders import save_model, tiny_config

CONFIG = EngineConfig(precision="bf16", max_batch=4, max_context_tokens=256, kv_tokens=1024)


def put_model(store: Path, name: str, seed: int = 0) -> Path:
    """The folder of a revision: `name` is e.g. `mod_1/1`."""
    folder = store / name
    save_model(folder, tiny_config(), seed=seed)
    manifest = inspect_model_folder(folder, ModelFolderLimits())
    (folder / "manifest.json").write_text(json.dumps(manifest.to_json()), encoding="utf-8")
    return folder
