"""From a model folder to its image; needs no device: a GPU's images are packed in host memory as well."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..api import EngineConfig, ModelRefusal
from ..decoder import Decoder
from ..decoder_choice import is_placed, make_decoder
from ..detokenize import read_byte_table, read_tokenizer_file
from ..family_weights import FamilyWeights
from ..native.decoder import NativeDecoder
from ..spec import DecoderSpec, read_configs, spec_from_config
from ..torch_decoder import TorchDecoder
from ..weights import Checkpoint
from .canary import Canary, sing
from .model_image import ImageParts, save_model_image

_CPU = torch.device("cpu")
_NO_SUMS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class _Packed:
    tensors: Mapping[str, torch.Tensor]
    content_sum: int
    panel_sums: torch.Tensor
    canary: Canary


def convert(folder: Path, path: Path, key: str, config: EngineConfig) -> int:
    """Returns the image's bytes. Raises ModelRefusal, also where models of this kind have no images; OSError."""
    model_config, generation = read_configs(folder)
    spec = spec_from_config(model_config, generation)
    if spec.rope is not None:
        spec = replace(spec, max_positions=min(spec.max_positions, config.max_context_tokens))
    tokenizer = read_tokenizer_file(folder)
    with Checkpoint(folder) as checkpoint, torch.inference_mode():
        packed = _pack(spec, checkpoint, config)
    parts = ImageParts(
        config=model_config,
        generation_config=generation,
        weights=packed.tensors,
        content_sum=packed.content_sum,
        panel_sums=packed.panel_sums,
        byte_table=read_byte_table(tokenizer),
        tokenizer_digest=hashlib.sha256(tokenizer).digest(),
        canary=packed.canary,
    )
    return save_model_image(path, key, parts)


def _pack(spec: DecoderSpec, checkpoint: Checkpoint, config: EngineConfig) -> _Packed:
    weights = FamilyWeights(spec, checkpoint)
    if is_placed(spec, config, torch.device(config.device)):
        from ..cuda.placement import ARENA, pack_arena
        from ..cuda.slots import content_sum

        memory = pack_arena(spec, weights, config.precision).memory
        weights.check_nothing_is_left()
        # Plain torch says what is right: the device's kernels are then compared with something else than themselves.
        reference = TorchDecoder(spec, weights, config.precision, _CPU)
        return _Packed({ARENA: memory}, content_sum(memory), _NO_SUMS, _canary(reference, config))
    if config.device != "cpu":
        raise ModelRefusal("the Triton kernels do not compute this model, and others have no images")
    decoder = make_decoder(spec, weights, config, _CPU)
    weights.check_nothing_is_left()
    if not isinstance(decoder, NativeDecoder):
        raise ModelRefusal(f"{type(decoder).__name__} computes this model, and has no images")
    return _Packed(decoder.weights, 0, decoder.panel_sums(), _canary(decoder, config))


def _canary(decoder: Decoder, config: EngineConfig) -> Canary:
    return sing(decoder, config.precision, _CPU)
