"""Which images leave a folder that has a limit: pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredImage:
    """is_held: some worker of this host has it mapped, or pinned: removing it would free nothing, or undo a pin."""

    key: str
    size_bytes: int
    last_used_s: float
    is_held: bool


def choose_removals(images: Iterable[StoredImage], coming_bytes: int, limit_bytes: int) -> list[str] | None:
    """Keys of images to remove so that `coming_bytes` more fit; None: that is not possible.

    1. An image that is held stays.
    2. Of the others the longest unused go first, until what comes fits.
    3. Whoever need not have gone, once all is counted, stays: of those the last used first. So one large image that
       must go does not take the small ones before it along.
    """
    images = list(images)
    excess = sum(image.size_bytes for image in images) + coming_bytes - limit_bytes
    chosen: list[StoredImage] = []
    for image in sorted(images, key=lambda each: (each.last_used_s, each.key)):  # 2
        if excess <= 0:
            break
        if not image.is_held:  # 1
            chosen.append(image)
            excess -= image.size_bytes
    if excess > 0:
        return None
    for image in reversed(chosen.copy()):  # 3
        if excess + image.size_bytes <= 0:
            chosen.remove(image)
            excess += image.size_bytes
    return [image.key for image in chosen]
