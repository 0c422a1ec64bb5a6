"""Between host and device without waiting for what the device has still to do."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from pinned memory does not wait for what a GPU has still to do; on a CPU these are `values` themselves."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class ToHost:
    """A copy that begins when the device gets there, in the order of its work; what is launched later does not delay it."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values, self._arrival = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def wait(self) -> torch.Tensor:
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values
