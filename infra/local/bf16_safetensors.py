"""Reads and writes safetensors files with numpy alone, the same bytes for the same tensors each time.

numpy has no bfloat16, and set-up should not pay seconds for importing torch: bf16 travels as its 16-bit pattern in uint16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shared.safetensors_header import LENGTH_PREFIX_BYTES, read_safetensors_header

Bf16 = npt.NDArray[np.uint16]
Float32 = npt.NDArray[np.float32]

# The reference writer pads the header to 8 bytes, so that mapped tensors are aligned.
HEADER_ALIGNMENT_BYTES = 8


def to_bf16(values: Float32) -> Bf16:
    """Round to the nearest bf16, ties to even, as torch does. Raises ValueError for what is not finite."""
    if not np.isfinite(values).all():
        raise ValueError("a weight is not finite")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )


def to_float32(values: Bf16) -> Float32:
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def write_bf16_safetensors(path: Path, tensors: Mapping[str, Bf16]) -> None:
    """Write in name order. The file is not fsynced: whoever publishes its folder does that."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % HEADER_ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(LENGTH_PREFIX_BYTES, "little"))
        file.write(raw)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).astype("<u2", copy=False).data)


def read_bf16_safetensors(path: Path) -> dict[str, Bf16]:
    """Raises SafetensorsError when the file is not sound, ValueError when it holds anything but bf16."""
    tensors: dict[str, Bf16] = {}
    with path.open("rb") as file:
        header = read_safetensors_header(file, path.stat().st_size)
        for name, entry in header.tensors.items():
            if entry.dtype != "BF16":
                raise ValueError(f"{path.name}: {name} is {entry.dtype}, not BF16")
            file.seek(entry.begin)
            tensors[name] = np.frombuffer(file.read(entry.end - entry.begin), dtype="<u2").reshape(
                entry.shape
            )
    return tensors
