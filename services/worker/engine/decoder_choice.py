"""Which decoder computes a described model: chosen once, when the model is loaded."""

from __future__ import annotations

import torch

from .decoder import Decoder
from .decoder_weights import DecoderWeights
from .spec import DecoderSpec
from .torch_decoder import TorchDecoder


def make_decoder(spec: DecoderSpec, weights: DecoderWeights, precision: str, device: torch.device) -> Decoder:
    """Reads and packs all weights, on the calling thread. Raises ModelRefusal."""
    return TorchDecoder(spec, weights, precision, device)
