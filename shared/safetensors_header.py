"""Reads and judges the header of a safetensors file without mapping or trusting any of its data.

Knows the format only: names, dtypes, shapes and byte ranges; not which tensors a model needs. Called by the folder check at
registration and by the set-up of the demo models. Format: 8 bytes little-endian header length, JSON header, then the tensors'
bytes, which must cover the rest of the file exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

# Bytes of one element. The 4- and 6-bit kinds of newer files are left out: no engine option here reads them.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip

LENGTH_PREFIX_BYTES = 8
# The reference reader refuses above 100 MB; 16 MiB holds over 100,000 tensors.
MAX_HEADER_BYTES = 16 * 1024 * 1024
# A real weight has at most 4 dimensions; a bound keeps a hostile shape list from costing time.
MAX_DIMENSIONS = 8
# Above any real tensor, and small enough that no product of allowed sizes is slow to compute.
MAX_DIMENSION = 2**40


class SafetensorsError(ValueError):
    """The file is not a sound safetensors file; the text says why, for people."""


class TruncatedSafetensorsError(SafetensorsError):
    """The file ends before what its own header promises."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    dtype: str
    shape: tuple[int, ...]
    # Byte range in the whole file (the header's own offsets count from the end of the header).
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_safetensors_header(file: BinaryIO, file_bytes: int) -> SafetensorsHeader:
    """Read from the start of `file`; `file_bytes` is its size. Raises SafetensorsError, or its subclass when cut short."""
    header_bytes = parse_header_length(file.read(LENGTH_PREFIX_BYTES), file_bytes)
    return parse_safetensors_header(file.read(header_bytes), file_bytes)


def parse_header_length(prefix: bytes, file_bytes: int) -> int:
    """The length of the JSON header, by the file's first 8 bytes: small enough to read, and within the file."""
    if len(prefix) < LENGTH_PREFIX_BYTES:
        raise TruncatedSafetensorsError("the file is shorter than its 8-byte length prefix")
    header_bytes = int.from_bytes(prefix[:LENGTH_PREFIX_BYTES], "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise SafetensorsError(f"the header claims {header_bytes} bytes; the limit is {MAX_HEADER_BYTES}")
    if LENGTH_PREFIX_BYTES + header_bytes > file_bytes:
        raise TruncatedSafetensorsError("the file ends inside its header")
    return header_bytes


def parse_safetensors_header(raw: bytes, file_bytes: int) -> SafetensorsHeader:
    """Judge the header's bytes against the size of the file they came from. Pure.

    1. It is UTF-8 JSON, an object, with no name twice and no NaN.
    2. `__metadata__`, if there, maps text to text.
    3. Each tensor has exactly dtype, shape and data_offsets, of known kinds and in range.
    4. shape x dtype equals the byte range.
    5. Ranges in order of their begin leave no gap and no overlap, and start at 0.
    6. The last range ends at the end of the file: before it is truncated, behind it is foreign data.
    """
    document = _parse_object(raw)  # 1
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):  # 2
        raise SafetensorsError("__metadata__ is not a map of text to text")
    data_begin = LENGTH_PREFIX_BYTES + len(raw)
    tensors = {name: _parse_entry(name, entry, data_begin) for name, entry in document.items()}  # 3, 4
    position = data_begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):  # 5
        if tensor.begin != position:
            kind = "overlaps another" if tensor.begin < position else "leaves a gap before it"
            raise SafetensorsError(f"tensor {name[:80]!r} {kind}")
        position = tensor.end
    if position > file_bytes:  # 6
        raise TruncatedSafetensorsError(f"the header promises {position} bytes, the file has {file_bytes}")
    if position < file_bytes:
        raise SafetensorsError(f"{file_bytes - position} bytes behind the last tensor")
    return SafetensorsHeader(tensors=tensors, metadata=metadata)


def _parse_object(raw: bytes) -> dict[str, object]:
    # The format lets writers pad the header with spaces at its end, and says that it begins with "{".
    if not raw.startswith(b"{"):
        raise SafetensorsError("the header is not a JSON object")
    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_refuse_doubles, parse_constant=_refuse_constant
        )
    except SafetensorsError:
        raise
    except (ValueError, RecursionError) as error:
        raise SafetensorsError("the header is not valid JSON") from error
    if not isinstance(document, dict):
        raise SafetensorsError("the header is not a JSON object")
    return document


def _parse_entry(name: str, entry: object, data_begin: int) -> TensorEntry:
    label = repr(name[:80])
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"tensor {label} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise SafetensorsError(f"tensor {label} has an unknown dtype")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_size(size) for size in shape)
    ):
        raise SafetensorsError(f"tensor {label} has a bad shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise SafetensorsError(f"tensor {label} has bad data_offsets")
    if math.prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise SafetensorsError(f"tensor {label} has a byte range that does not fit its shape and dtype")
    return TensorEntry(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIMENSION


def _refuse_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise SafetensorsError("the header names something twice")
    return document


def _refuse_constant(text: str) -> object:
    raise SafetensorsError(f"the header holds {text}")
