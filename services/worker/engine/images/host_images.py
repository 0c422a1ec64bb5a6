"""Images in this process's own host memory, pinned where the device is a GPU: the tier between the disk and a slot.

Bounded; the longest unused gives its memory to the next.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from .image_file import Image

_CHUNK_BYTES = 64 * 1024 * 1024


class HostImages:
    def __init__(self, limit_bytes: int, *, is_pinned: bool) -> None:
        self._limit_bytes, self._is_pinned = limit_bytes, is_pinned
        self._lock = threading.Lock()
        self._images: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, key: str, image: Image, name: str, wait: Callable[[int], None]) -> torch.Tensor:
        """The tensor `name` of the image, (bytes,) uint8. Verified when it is copied here. Raises ImageDamaged.

        wait: see `Image.verify`. One that is larger than the limit is the mapped file's own, as are all where the limit is 0.
        """
        with self._lock:
            found = self._images.get(key)
            if found is not None:
                self._images.move_to_end(key)
                return found
        image.verify(wait)
        content = image.tensors[name]
        if content.nbytes > self._limit_bytes:
            return content
        memory = self._room_for(content.nbytes)
        for start in range(0, len(content), _CHUNK_BYTES):
            memory[start : start + _CHUNK_BYTES].copy_(content[start : start + _CHUNK_BYTES])
        with self._lock:
            self._images[key] = memory
        return memory

    def forget(self, key: str) -> None:
        with self._lock:
            self._images.pop(key, None)

    def _room_for(self, size_bytes: int) -> torch.Tensor:
        """Pinning takes a second for some GB, so the memory of an image of the same size is used again."""
        with self._lock:
            held = sum(each.nbytes for each in self._images.values())
            while held + size_bytes > self._limit_bytes:
                _, oldest = self._images.popitem(last=False)
                if oldest.nbytes == size_bytes:
                    return oldest
                held -= oldest.nbytes
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
