"""From weights or an image to a decoder in a slot: arenas are packed in host memory, and only copied to the device."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from ..api import EngineConfig
from ..decoder import Decoder, activation_dtype
from ..decoder_weights import DecoderWeights
from ..family_weights import FamilyWeights
from ..images.host_images import HostImages
from ..images.image_file import ImageDamaged
from ..images.model_image import ModelImage
from ..spec import DecoderSpec
from .arena import Arena
from .decoder import CudaDecoder
from .slots import Slots, content_sum

ARENA = "arena"


def pack_arena(spec: DecoderSpec, weights: DecoderWeights, precision: str) -> Arena:
    """In host memory, byte for byte as a slot."""
    arena = Arena(spec, activation_dtype(precision), torch.device("cpu"))
    # What lies between tensors is part of the image: it has to be the same each time.
    arena.memory.zero_()
    arena.fill(weights)
    return arena


class Placement:
    """Calls from several threads take turns: they share one way to the device, and the host tier's memory."""

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        def make(spec: DecoderSpec) -> CudaDecoder:
            return CudaDecoder(spec, config.precision, device, config.max_batch, config.max_context_tokens)

        self._precision = config.precision
        self._slots = Slots(device, make)
        self._host = HostImages(config.host_image_bytes, is_pinned=device.type == "cuda")
        self._one_at_a_time = threading.Lock()

    def pack(self, spec: DecoderSpec, weights: FamilyWeights) -> CudaDecoder:
        """weights: all are read before anything is on the device."""
        arena = pack_arena(spec, weights, self._precision)
        weights.check_nothing_is_left()
        with self._one_at_a_time:
            return self._slots.place(spec, arena.memory)

    def load(self, found: ModelImage, wait: Callable[[int], None]) -> CudaDecoder:
        """Checksums are compared as the image comes into host memory, and a sum of all bytes once they are on the device.

        wait: see `Image.verify`. Raises ImageDamaged.
        """
        with self._one_at_a_time:
            content = self._host.get(found.key, found.image, ARENA, wait)
            decoder = self._slots.place(found.spec, content)
            if content_sum(decoder.arena.memory) != found.content_sum:
                self._host.forget(found.key)
                self._slots.leave(decoder)
                raise ImageDamaged("what arrived in the slot is not what was written")
            return decoder

    def forget(self, key: str) -> None:
        """Of an image that turned out to be damaged: the one that is made anew has the same key."""
        self._host.forget(key)

    def leave(self, decoder: Decoder) -> None:
        """Of a decoder that stands in no slot it is a no-op."""
        if isinstance(decoder, CudaDecoder):
            self._slots.leave(decoder)
