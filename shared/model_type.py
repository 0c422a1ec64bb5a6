"""What a model's config says about its arithmetic: the canonical config, the type's signature and the tensors it needs.

Pure: takes the parsed config.json, opens nothing. Knows the architectures that the engine's own decoders describe and no
others: `llama_types.py` and `gpt_types.py`, a row each. Called by the folder check at registration; a GPU process may hold two
models exactly when their signatures are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.gpt_types import GPT_ARCHITECTURES, GptArchitecture, describe_gpt
from shared.llama_types import LLAMA_ARCHITECTURES, LlamaArchitecture, describe_llama
from shared.model_config import (
    MAX_VOCABULARY,
    CheckpointNames,
    Json,
    ModelTypeError,
    ModelTypeErrorCode,
    Shape,
    invalid,
    size,
    unsupported,
)

# Raised when the meaning of the canonical config changes, so that old and new signatures never compare equal by accident.
SIGNATURE_VERSION = 1
SIGNATURE_HEX_CHARS = 16
# An added token or two must not split a type: embeddings of one type are laid out for the padded size.
VOCABULARY_PADDING = 128

ARCHITECTURES: Mapping[str, LlamaArchitecture | GptArchitecture] = {
    **LLAMA_ARCHITECTURES,
    **GPT_ARCHITECTURES,
}


@dataclass(frozen=True, slots=True)
class ModelType:
    architecture: str
    signature: str
    # What the signature is made of.
    canonical: Mapping[str, Any]
    context_tokens: int
    vocab_size: int
    tied_embeddings: bool
    # Every tensor that a checkpoint must hold, and its shape; the head's weight only when it is not tied.
    tensors: Mapping[str, Shape]
    # Under which other names a checkpoint may hold them.
    names: CheckpointNames


def describe_model_type(config: Json) -> ModelType:
    """Judge a parsed config.json. Raises ModelTypeError.

    1. Exactly one architecture, a known one, and the model_type that belongs to it.
    2. Full-precision weights.
    3. Its row describes it.
    4. The canonical config holds architecture, shapes and all that changes the arithmetic. The vocabulary is padded up.
    """
    name, row = _architecture(config)  # 1
    if config.get("quantization_config") is not None:  # 2
        raise unsupported("quantized checkpoints are not served; register the full-precision weights")
    if isinstance(row, LlamaArchitecture):  # 3
        description = describe_llama(config, row)
    else:
        description = describe_gpt(config, row)
    vocab_size = size(config, "vocab_size", MAX_VOCABULARY)
    canonical = {  # 4
        **description.canonical,
        "version": SIGNATURE_VERSION,
        "architecture": name,
        "padded_vocab_size": -(-vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING,
    }
    return ModelType(
        architecture=name,
        signature=sign_canonical_config(canonical),
        canonical=canonical,
        context_tokens=description.context_tokens,
        vocab_size=vocab_size,
        tied_embeddings=description.tied_embeddings,
        tensors=description.tensors,
        names=description.names,
    )


def sign_canonical_config(canonical: Mapping[str, Any]) -> str:
    raw = json.dumps(canonical, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(raw.encode()).hexdigest()[:SIGNATURE_HEX_CHARS]


def _architecture(config: Json) -> tuple[str, LlamaArchitecture | GptArchitecture]:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise invalid("architectures must name exactly one class")
    row = ARCHITECTURES.get(names[0])
    if row is None:
        raise ModelTypeError(ModelTypeErrorCode.UNSUPPORTED_ARCHITECTURE, _why_not(names[0]))
    if config.get("model_type") != row.model_type:
        raise invalid(f"model_type must be {row.model_type!r} for {names[0]}")
    for key in row.required:
        if key not in config:
            raise invalid(f"{key} must be given for {names[0]}")
    return names[0], row


def _why_not(name: str) -> str:
    """Which tensors another class needs, and whether the engine's slow path can run it, only transformers could tell: it is
    not here, and a model that no worker may be able to load is not registered.
    """
    served = ", ".join(sorted(ARCHITECTURES))
    if name.endswith("ForConditionalGeneration"):
        return (
            f"{name[:80]!r} is not served: encoder-decoder and multimodal models are not; served are {served}"
        )
    return (
        f"{name[:80]!r} is not served; served are {served}. The engine alone runs other causal language models through "
        "transformers, slowly; they cannot be registered"
    )
