"""Two readers of one adapter must agree: the check at registration, and the engine that loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from services.worker.engine import ModelRefusal
from services.worker.engine.lora import read_adapter
from services.worker.engine.spec import spec_from_config
from shared.adapter_config import MAX_RANK
from shared.adapter_folder import inspect_adapter_folder
from shared.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shared.model_folder import ModelFolderError, ModelFolderLimits
from shared.model_type import ARCHITECTURES
from tests.contract.test_model_type_agreement import CASES, GPT_CASES, SIZES
from tests.model_folders import ADAPTER, make_base, write_json

RANK = 2
SIZED = [*((architecture, SIZES | changes) for architecture, changes in CASES), *GPT_CASES]
ONE_OF_EACH = {architecture: changes for architecture, changes in reversed(SIZED)}


def test_every_architecture_is_tried() -> None:
    assert ONE_OF_EACH.keys() == ARCHITECTURES.keys()


def config_of(architecture: str) -> dict[str, Any]:
    kind = getattr(transformers, architecture).config_class
    config: dict[str, Any] = kind(**ONE_OF_EACH[architecture]).to_dict()
    return {**config, "architectures": [architecture]}


def adapted(architecture: str, below: str) -> dict[str, tuple[int, int]]:
    """Each linear module in the layers of transformers' own class -> (outputs, inputs); `below`: which class trains it."""
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**ONE_OF_EACH[architecture]))
    model = model.base_model if below == "bare" else model
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and any(part.isdigit() for part in name.split(".")):
            rows, columns = weight.shape
            found[name] = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
    return found


def make_adapter(folder: Path, modules: dict[str, tuple[int, int]], **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    names = sorted({name.rsplit(".", 1)[-1] for name in modules})
    write_json(folder / ADAPTER_CONFIG, ADAPTER | {"r": RANK, "target_modules": names} | changes)
    tensors = {}
    for name, (outputs, inputs) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(RANK, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(outputs, RANK)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


def verdicts(folder: Path, base: Path, config: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the registration and the engine take it."""
    taken = [True, True]
    try:
        inspect_adapter_folder(folder, base, ModelFolderLimits())
    except ModelFolderError:
        taken[0] = False
    try:
        read_adapter(folder, "adapter", spec_from_config(config, {}))
    except ModelRefusal:
        taken[1] = False
    return taken[0], taken[1]


@pytest.mark.parametrize("below", ["with a head", "bare"])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_product_of_every_architecture_can_be_adapted(
    tmp_path: Path, architecture: str, below: str
) -> None:
    config = config_of(architecture)
    base = make_base(tmp_path / "base", config)
    modules = adapted(architecture, below)
    assert len(modules) >= 4 * 3
    folder = make_adapter(tmp_path / "adapter", modules)
    assert verdicts(folder, base, config) == (True, True)
    manifest = inspect_adapter_folder(folder, base, ModelFolderLimits())
    assert manifest.adapter_rank == RANK
    assert manifest.parameter_count == sum(RANK * (outputs + inputs) for outputs, inputs in modules.values())

    # Transposed, as a reader that took one class for another would have it
    name, (outputs, inputs) = next((n, shape) for n, shape in modules.items() if shape[0] != shape[1])
    wrong = make_adapter(tmp_path / "wrong", modules | {name: (inputs, outputs)})
    assert verdicts(wrong, base, config) == (False, False)


CONFIGS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"bias": None}, True),
    ({"target_modules": ".*_proj"}, True),
    ({"use_rslora": True}, True),
    ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "task_type": None}, True),
    ({"alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None, "use_dora": False}, True),
    ({"peft_type": "IA3"}, False),
    ({"peft_type": None}, False),
    ({"task_type": "SEQ_CLS"}, False),
    ({"bias": "all"}, False),
    ({"use_dora": True}, False),
    ({"rank_pattern": {"q_proj": 4}}, False),
    ({"modules_to_save": ["lm_head"]}, False),
    ({"init_lora_weights": "pissa"}, False),
    ({"of_the_future": 1}, False),
    ({"r": 0}, False),
    ({"r": True}, False),
    ({"r": RANK + 1}, False),
    ({"lora_alpha": "8"}, False),
    ({"lora_alpha": True}, False),
    ({"use_rslora": 1}, False),
    ({"target_modules": []}, False),
    ({"target_modules": None}, False),
    ({"target_modules": [1]}, False),
    ({"target_modules": ["q_proj"]}, False),
]


@pytest.mark.parametrize(("changes", "is_taken"), CONFIGS)
def test_one_config_has_one_verdict(tmp_path: Path, changes: dict[str, Any], is_taken: bool) -> None:
    config = config_of("LlamaForCausalLM")
    base = make_base(tmp_path / "base", config)
    folder = make_adapter(tmp_path / "adapter", adapted("LlamaForCausalLM", "with a head"), **changes)
    assert verdicts(folder, base, config) == (is_taken, is_taken)


def test_one_file_of_tensors_has_one_verdict(tmp_path: Path) -> None:
    config = config_of("LlamaForCausalLM")
    base = make_base(tmp_path / "base", config)
    modules = adapted("LlamaForCausalLM", "with a head")
    folder = make_adapter(tmp_path / "adapter", modules)
    sound = load_file(folder / ADAPTER_WEIGHTS)
    first = min(sound)
    half = first.replace(".lora_A.", ".lora_B.")
    assert half != first
    extra = torch.zeros(RANK, 32)
    for tensors in (
        {},
        {name: tensor for name, tensor in sound.items() if name != half},
        {name: tensor for name, tensor in sound.items() if name != first},
        sound | {"base_model.model.lm_head.lora_A.weight": extra},
        sound | {"base_model.model.model.embed_tokens.lora_embedding_A": extra},
        sound | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": extra},
        sound | {first: sound[first].to(torch.int32)},
        sound | {first: torch.zeros(RANK + 1, sound[first].shape[1])},
    ):
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        assert verdicts(folder, base, config) == (False, False), tensors.keys() ^ sound.keys()
    # A few layers only are an adapter, too
    some = {name: tensor for name, tensor in sound.items() if ".layers.1." in name}
    save_file(some, folder / ADAPTER_WEIGHTS)
    assert verdicts(folder, base, config) == (True, True)


def test_the_registration_alone_bounds_the_rank(tmp_path: Path) -> None:
    config = config_of("LlamaForCausalLM")
    base = make_base(tmp_path / "base", config)
    folder = make_adapter(tmp_path / "adapter", adapted("LlamaForCausalLM", "with a head"), r=MAX_RANK + 1)
    with pytest.raises(ModelFolderError, match="from 1 to 256"):
        inspect_adapter_folder(folder, base, ModelFolderLimits())
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["r"] == MAX_RANK + 1
