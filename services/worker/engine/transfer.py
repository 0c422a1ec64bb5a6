"""From the host to the device without waiting for it."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from pinned memory does not wait for what a GPU has still to do; on a CPU these are `values` themselves."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
