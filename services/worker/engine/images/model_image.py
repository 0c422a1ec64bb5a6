"""What an image of a model holds: its tensors for one kind of device, its configs, its tokenizer's bytes, its canary."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ..api import EngineConfig
from ..config_file import Config
from ..detokenize import ByteTable
from ..native.build import load_library
from ..spec import DecoderSpec, spec_from_config
from .canary import Canary
from .image_file import Image, ImageDamaged, open_image, write_image

# Another layout of tensors or of what is kept beside them needs another number: old images are then made anew.
_LAYOUT = 4
_PIECES, _PIECE_ENDS, _PANEL_SUMS = "tokenizer.pieces", "tokenizer.ends", "panel_sums"


def image_key(content: str, config: EngineConfig) -> str:
    """Names the one image that serves `content` under this config: 32 hex characters.

    content: says exactly which weights, such as a digest of what was registered.
    """
    device = config.device.partition(":")[0]
    parts = [str(_LAYOUT), content, device, config.precision]
    if device == "cpu" and config.precision == "bf16" and load_library().build.rounds_rows:
        parts.append("rounded rows")  # what its canary says differs
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class ImageParts:
    """What an image is made of. weights: the decoder's tensors. content_sum: of a GPU's, see `cuda.slots.content_sum`; else 0.
    panel_sums: of a CPU's, see `native.decoder.NativeDecoder`; else empty.
    tokenizer_digest: SHA-256 of the tokenizer.json that `byte_table` stands for.
    """

    config: Config
    generation_config: Config
    weights: Mapping[str, torch.Tensor]
    content_sum: int
    panel_sums: torch.Tensor
    byte_table: ByteTable
    tokenizer_digest: bytes
    canary: Canary


@dataclass(frozen=True, slots=True)
class ModelImage:
    """An image that is mapped: its parts, the tensors as views of the file."""

    key: str
    spec: DecoderSpec
    weights: Mapping[str, torch.Tensor]
    content_sum: int
    panel_sums: torch.Tensor
    tokenizer_digest: bytes
    canary: Canary
    image: Image

    def unsummed_bytes(self) -> int:
        """Of the image's body, before the weights that have sums of their own."""
        return min(self.image.offset(name) for name in self.weights if _has_sums(name))

    def byte_table(self) -> ByteTable:
        tensors = self.image.tensors
        ends = array("i")
        ends.frombytes(tensors[_PIECE_ENDS].view(torch.uint8).numpy())
        return ByteTable(_Pieces(tensors[_PIECES].numpy().tobytes(), ends))


def save_model_image(path: Path, key: str, parts: ImageParts) -> int:
    """Returns the file's bytes. Raises OSError."""
    pieces = parts.byte_table.pieces
    text = bytearray(b"".join(pieces))
    tokenizer = {
        _PIECES: torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8),
        _PIECE_ENDS: torch.tensor(list(accumulate(map(len, pieces))), dtype=torch.int32),
    }
    meta = {
        "key": key,
        "config": parts.config,
        "generation_config": parts.generation_config,
        "content_sum": parts.content_sum,
        "tokenizer_sha256": parts.tokenizer_digest.hex(),
        "canary": {"greedy": parts.canary.greedy, "margins": parts.canary.margins},
    }
    # Last those that have sums of their own: whoever compares these verifies only what is before them.
    summed = {name: tensor for name, tensor in parts.weights.items() if _has_sums(name)}
    others = {name: tensor for name, tensor in parts.weights.items() if not _has_sums(name)}
    return write_image(path, {**others, **tokenizer, _PANEL_SUMS: parts.panel_sums, **summed}, meta)


def open_model_image(path: Path, key: str, max_positions: int) -> ModelImage:
    """Maps it; nothing is verified but the header. Raises OSError, ImageDamaged."""
    image = open_image(path)
    meta = image.meta
    if meta["key"] != key:
        raise ImageDamaged(f"it is the image {meta['key']}, not {key}")
    spec = spec_from_config(meta["config"], meta["generation_config"])
    if spec.rope is not None:
        spec = replace(spec, max_positions=min(spec.max_positions, max_positions))
    canary = meta["canary"]
    return ModelImage(
        key=key,
        spec=spec,
        weights={
            name: tensor
            for name, tensor in image.tensors.items()
            if not name.startswith("tokenizer.") and name != _PANEL_SUMS
        },
        content_sum=meta["content_sum"],
        panel_sums=image.tensors[_PANEL_SUMS],
        tokenizer_digest=bytes.fromhex(meta["tokenizer_sha256"]),
        canary=Canary(tuple(canary["greedy"]), tuple(canary["margins"])),
        image=image,
    )


def _has_sums(name: str) -> bool:
    return name.endswith(".packed")


class _Pieces(Sequence[bytes]):
    """The bytes of each token, cut out of one string when they are asked for."""

    def __init__(self, data: bytes, ends: array[int]) -> None:
        self._data, self._ends = data, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, token: Any) -> Any:
        if not 0 <= token < len(self._ends):
            raise IndexError(token)
        return self._data[self._ends[token - 1] if token else 0 : self._ends[token]]
