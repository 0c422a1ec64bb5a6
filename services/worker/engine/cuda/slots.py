"""Where models of one type stand on a device: a slot is a decoder's arena, refilled by a few large copies.

A slot that a model left keeps its memory, its kernels and its CUDA graphs: whatever holds an address in it stays valid for
the next model. The copies run beside whoever computes, on a stream of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..spec import DecoderSpec
from .decoder import CudaDecoder

_CHUNK_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _FreeSlot:
    """left: when the device is done with what was in it; None where work is done once it is launched."""

    decoder: CudaDecoder
    left: torch.cuda.Event | None


class Slots:
    """There are never more slots than there were models resident at once, so what bounds models bounds them."""

    def __init__(self, device: torch.device, make: Callable[[DecoderSpec], CudaDecoder]) -> None:
        """make: a decoder whose arena is empty."""
        self._device, self._make = device, make
        self._lock = threading.Lock()
        self._free: list[_FreeSlot] = []
        self._stream: torch.cuda.Stream | None = None

    def leave(self, decoder: CudaDecoder) -> None:
        """Nobody asks anything of it any more; what was launched before may still run."""
        left = None
        if self._device.type == "cuda":
            left = torch.cuda.Event()
            left.record(torch.cuda.default_stream(self._device))
        with self._lock:
            self._free.append(_FreeSlot(decoder, left))

    def place(self, spec: DecoderSpec, content: torch.Tensor) -> CudaDecoder:
        """A decoder with `content` (uint8, as its arena is laid out) for weights, in a free slot or in a new one.

        Returns when the copy is done; it is fast from pinned memory. What fails leaves the slot free.
        """
        with self._lock:
            slot = next((each for each in self._free if _is_alike(each.decoder.spec, spec)), None)
            if slot is not None:
                self._free.remove(slot)
        if slot is None:
            slot = _FreeSlot(self._make(spec), None)
        try:
            self._fill(slot, content)
        except BaseException:
            with self._lock:
                self._free.append(slot)
            raise
        slot.decoder.spec = spec
        return slot.decoder

    def _fill(self, slot: _FreeSlot, content: torch.Tensor) -> None:
        memory = slot.decoder.arena.memory
        if content.shape != memory.shape:
            raise ValueError(f"{len(content)} bytes of weights for a slot of {len(memory)}")
        if self._device.type != "cuda":
            memory.copy_(content)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        if slot.left is not None:
            self._stream.wait_event(slot.left)
        with torch.cuda.stream(self._stream):
            for start in range(0, len(content), _CHUNK_BYTES):
                piece = slice(start, start + _CHUNK_BYTES)
                memory[piece].copy_(content[piece], non_blocking=True)
        self._stream.synchronize()


def content_sum(memory: torch.Tensor) -> int:
    """Of all bytes, as 64-bit numbers that wrap around: what a device adds up as fast as it reads. memory: uint8, whose
    length is a multiple of 8.
    """
    return int(memory.view(torch.int64).sum())


def _is_alike(one: DecoderSpec, other: DecoderSpec) -> bool:
    """Whether both have one layout and one computation: all but the tokens that end an answer."""
    return replace(one, eos_token_ids=()) == replace(other, eos_token_ids=())
