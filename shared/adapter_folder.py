"""Decides whether a folder holds an adapter (LoRA) that fits its base, whose folder in the store was checked before.

Runs in the same child as the check of a whole model (`model_folder.py`, which says why). Tokenizer, chat template and stop tokens
are the base's: such files beside an adapter are left where they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from shared.adapter_config import AdapterConfig, AdapterConfigError, read_adapter_config
from shared.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ModelFolderError,
    ModelFolderErrorCode,
    ModelFolderLimits,
    open_model_files,
)
from shared.model_folder import WEIGHT_DTYPES, ModelManifest, read_object, refuse_code_keys
from shared.model_type import ARCHITECTURES, ModelType, describe_model_type
from shared.safetensors_header import TensorEntry

_PREFIX = "base_model.model."
_IN_A_LAYER = re.compile(r"(.*?\.)?[0-9]+\..+\.weight")


def inspect_adapter_folder(folder: Path, base: Path, limits: ModelFolderLimits) -> ModelManifest:
    """Judge the folder against the base's, and describe the adapter. Raises ModelFolderError.

    1. Names, kinds and sizes of files; both of an adapter's are there.
    2. The config is one that can be served, and asks for no code.
    3. The weights are sound safetensors: pairs of matrices that fit products of the base's layers, and nothing else.
    4. What it says of itself beside its files is what its base says.
    """
    of_base = ModelManifest.from_json(json.loads((base / "manifest.json").read_text(encoding="utf-8")))
    base_type = describe_model_type(json.loads((base / "config.json").read_text(encoding="utf-8")))
    with open_model_files(folder, limits, adapter=True) as files:  # 1
        for required in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if required not in files:
                raise ModelFolderError(ModelFolderErrorCode.MISSING_FILE, f"{required} is missing")
        document = read_object(files, ADAPTER_CONFIG)  # 2
        refuse_code_keys(ADAPTER_CONFIG, document)
        try:
            config = read_adapter_config(document)
        except AdapterConfigError as error:
            raise ModelFolderError(
                ModelFolderErrorCode.INVALID_ADAPTER, f"{ADAPTER_CONFIG}: {error}"
            ) from error
        tensors = files.read_weights_header(ADAPTER_WEIGHTS).tensors  # 3
        check_adapter_tensors(tensors, config, base_type)
        return dataclasses.replace(  # 4
            of_base,
            files=files.manifest,
            parameter_count=sum(math.prod(tensor.shape) for tensor in tensors.values()),
            adapter_rank=config.rank,
        )


def check_adapter_tensors(tensors: Mapping[str, TensorEntry], config: AdapterConfig, base: ModelType) -> None:
    """Compare the tensors with the products of the base's layers. Pure; raises ModelFolderError.

    1. There are some, each half of a pair A and B for a product of a layer.
    2. The product is among the target modules.
    3. A is (rank, inputs), B is (outputs, rank).
    4. They are floating point numbers of a kind that weights have.
    """
    products = _products(base, tensors)
    wanted: dict[str, tuple[str, tuple[int, int]]] = {}
    for module, (outputs, inputs) in products.items():
        wanted[f"{_PREFIX}{module}.lora_A.weight"] = (module, (config.rank, inputs))
        wanted[f"{_PREFIX}{module}.lora_B.weight"] = (module, (outputs, config.rank))
    if not tensors:  # 1
        raise _mismatch("no tensor adapts a layer of the base")
    for name, tensor in tensors.items():
        if name not in wanted:
            raise _mismatch(f"tensor {name[:120]!r} adapts nothing that can be adapted here")
        module, shape = wanted[name]
        other = (
            name.replace(".lora_A.", ".lora_B.")
            if ".lora_A." in name
            else name.replace(".lora_B.", ".lora_A.")
        )
        if other not in tensors:
            raise _mismatch(f"tensor {other!r} is missing")
        if not config.targets(module):  # 2
            raise _mismatch(f"target_modules do not name {module}, which is adapted")
        if tensor.shape != shape:  # 3
            raise _mismatch(f"tensor {name!r} is {list(tensor.shape)}, base and rank ask for {list(shape)}")
        if tensor.dtype not in WEIGHT_DTYPES:  # 4
            raise _mismatch(
                f"tensor {name!r} is {tensor.dtype}; weights are {', '.join(sorted(WEIGHT_DTYPES))}"
            )


def _products(base: ModelType, tensors: Mapping[str, TensorEntry]) -> dict[str, tuple[int, int]]:
    """Each module that can be adapted, under the name that the adapter has for it -> (outputs, inputs).

    What stands before the layers depends on whether a head was there when the adapter was trained.
    """
    transposed = getattr(ARCHITECTURES[base.architecture], "is_transposed", False)
    usual = base.names.prefixes[0]
    below = {
        name.removeprefix(usual).removesuffix(".weight"): (shape[1], shape[0])
        if transposed
        else (shape[0], shape[1])
        for name, shape in base.tensors.items()
        if len(shape) == 2 and _IN_A_LAYER.fullmatch(name)
    }
    for prefix in base.names.prefixes:
        products = {prefix + module: shape for module, shape in below.items()}
        if any(f"{_PREFIX}{module}.lora_A.weight" in tensors for module in products):
            return products
    return {usual + module: shape for module, shape in below.items()}


def _mismatch(message: str) -> ModelFolderError:
    return ModelFolderError(ModelFolderErrorCode.TENSOR_MISMATCH, f"{ADAPTER_WEIGHTS}: {message}")
