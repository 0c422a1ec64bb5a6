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
    2. On a CUDA device the Triton kernels, where they can: not here, they take a slot (`cuda/placement.py`).
    3. Else plain torch; never where `config.kernels` asks for our kernels by name: that is refused with the reason.
    """
    if device.type == "cpu" and config.kernels != "torch":
        reason = refusal_reason(spec, config.precision, config.block_tokens)
        if reason is None:
            return NativeDecoder.pack(spec, weights, config.precision, config.threads or 1)
        if config.kernels == "native":
            raise ModelRefusal(f"the C kernels cannot serve this: {reason}")
    return TorchDecoder(spec, weights, config.precision, device)


def is_placed(spec: DecoderSpec, config: EngineConfig, device: torch.device) -> bool:
    """Rule 2 of `make_decoder`. Raises ModelRefusal where kernels were asked for that cannot serve this."""
    if device.type != "cuda" or config.kernels == "torch":
        return False
    # Not before: Triton is on machines with a GPU, and on those that test.
    from .cuda.decoder import refusal_reason as cuda_refusal_reason

    reason = cuda_refusal_reason(spec, config.precision, config.block_tokens)
    if reason is not None and config.kernels == "native":
        raise ModelRefusal(f"the Triton kernels cannot serve this: {reason}")
    return reason is None


def describe_kernels(decoder: Decoder, config: EngineConfig, device: torch.device) -> str:
    """What computes a loaded model, for a log: where it is not the fast way on a CPU, with the reason."""
    if isinstance(decoder, NativeDecoder):
        return f"C ({decoder.instructions}), {decoder.threads} threads"
    if isinstance(decoder, TorchDecoder) and device.type == "cpu" and config.kernels != "torch":
        return f"torch: {refusal_reason(decoder.spec, config.precision, config.block_tokens)}"
    return type(decoder).__name__
