"""Which decoder computes a described model: chosen once, when the model is loaded."""

from __future__ import annotations

import torch

from .api import EngineConfig, ModelRefusal
from .decoder import Decoder
from .decoder_weights import DecoderWeights
from .native.decoder import NativeDecoder, refusal_reason
from .spec import DecoderSpec
from .torch_decoder import TorchDecoder


def make_decoder(
    spec: DecoderSpec, weights: DecoderWeights, config: EngineConfig, device: torch.device
) -> Decoder:
    """Reads and packs all weights, on the calling thread. Raises ModelRefusal.

    1. On a CPU the C kernels, where they can: this machine, the shapes, the precision.
    2. Else plain torch; never where `config.kernels` asks for the C kernels by name: that is refused with the reason.
    """
    if device.type == "cpu" and config.kernels != "torch":
        reason = refusal_reason(spec, config.precision, config.block_tokens)
        if reason is None:
            return NativeDecoder(spec, weights, config.precision, config.threads or 1)
        if config.kernels == "native":
            raise ModelRefusal(f"the C kernels cannot serve this: {reason}")
    return TorchDecoder(spec, weights, config.precision, device)
